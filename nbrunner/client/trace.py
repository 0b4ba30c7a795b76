"""What `DistributedModel.trace` finds out about one text: numbers for every layer and token, as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nbrunner.client.edits import Edit
from nbrunner.errors import UserInputError

if TYPE_CHECKING:
    from nbrunner.client.model import DistributedModel

Grid = NDArray[np.float32]
"""[layers, positions] float32."""


@dataclass(frozen=True)
class TraceHop:
    """Who ran blocks ``[start, end)``, and how many seconds its device took. ``peer`` is a PeerID."""

    peer: str
    start: int
    end: int
    seconds: float


@dataclass(eq=False)
class Trace:
    """One run of a model, looked at from inside.

    State 0 is what enters the first block (the embeddings), state ``i`` what leaves block ``i - 1``, state
    ``num_blocks`` what leaves the last one, before the final norm. The *lens* of a state is the distribution over
    tokens that the model's own final norm and head make of it (logit lens, nostalgebraist 2020); at the last state
    it is the model's prediction.

    Attributes
    ----------
    model_name : str
    ids, tokens : list of int, list of str
        The text; all of it, whatever ``positions`` says.
    layers, positions : list of int
        Which states, at which positions: the axes ``[L, P]`` of everything below.
    num_blocks : int
    norm : array [L, P] or None
        Euclidean norm of the state.
    cos_previous, cos_last : array [L, P] or None
        Cosine to the state one layer before (1 for state 0, which has none), and to the last state.
    entropy : array [L, P] or None
        Of the lens, in nats.
    kl : array [L, P] or None
        KL(prediction ‖ lens) in nats.
    top_ids, top_probs : array [L, P, K] int32 and float32, or None
        The lens's most probable tokens, the best first.
    chosen : list of int
        Token ids that were asked for.
    chosen_probs, chosen_ranks : array [L, P, C] float32 and int32, or None
        Their probability in the lens, and how many tokens are more probable.
    hidden : torch.Tensor [L, P, ...] or None
        The states, if they were to be kept.
    hops : list of TraceHop
    bytes_sent, bytes_received : int
        Of tensors, to and from servers.
    seconds : float
        In all.
    edits : tuple of Edit
    """

    model: DistributedModel | None
    model_name: str
    ids: list[int]
    tokens: list[str]
    layers: list[int]
    positions: list[int]
    num_blocks: int
    norm: Grid | None = None
    cos_previous: Grid | None = None
    cos_last: Grid | None = None
    entropy: Grid | None = None
    kl: Grid | None = None
    top_ids: NDArray[np.int32] | None = None
    top_probs: NDArray[np.float32] | None = None
    chosen: list[int] = field(default_factory=list)
    chosen_probs: NDArray[np.float32] | None = None
    chosen_ranks: NDArray[np.int32] | None = None
    hidden: torch.Tensor | None = None
    hops: list[TraceHop] = field(default_factory=list)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    edits: tuple[Edit, ...] = ()
    tokenizer: Any = field(default=None, repr=False)
    _fetched: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def token_text(self, token: int) -> str:
        """A token as text; its number in angle brackets where there is no tokenizer."""
        if self.tokenizer is None:
            return f"<{token}>"
        return str(self.tokenizer.decode([int(token)]))

    def peer_of(self, layer: int) -> str | None:
        """Who computed a state; None for state 0, which is made here."""
        return next((hop.peer for hop in self.hops if hop.start < layer <= hop.end), None)

    def prob(self, token: int | str) -> Grid:
        """[L, P] probability of a chosen token in the lens."""
        probs: Grid = _chosen(self.chosen_probs)[..., self._index(token)]
        return probs

    def rank(self, token: int | str) -> NDArray[np.int32]:
        """[L, P] number of tokens that are more probable in the lens than a chosen one."""
        ranks: NDArray[np.int32] = _chosen(self.chosen_ranks)[..., self._index(token)]
        return ranks

    def state(self, layer: int, position: int) -> torch.Tensor:
        """The state ``[hidden]`` of one layer and position; asked for again if it was not kept.

        Raises
        ------
        UserInputError
            Outside the text or the model.
        """
        position = position + len(self.ids) if position < 0 else position
        if not 0 <= layer <= self.num_blocks or not 0 <= position < len(self.ids):
            raise UserInputError(
                f"there is no state {layer} at position {position}: states 0 to {self.num_blocks}, positions 0 to "
                f"{len(self.ids) - 1}"
            )
        if self.hidden is not None and layer in self.layers and position in self.positions:
            return self.hidden[self.layers.index(layer), self.positions.index(position)]
        if (layer, position) not in self._fetched:
            if self.model is None:
                raise UserInputError("this trace has no model any more, so that states it has not kept are gone")
            found = self.model.trace(
                self.ids,
                layers=[layer],
                positions=[position],
                keep=("hidden",),
                edits=self.edits,
                tokenizer=self.tokenizer,
            )
            if found.hidden is None:
                raise RuntimeError("a trace that keeps hidden states has none")
            self._fetched[layer, position] = found.hidden[0, 0]
        return self._fetched[layer, position]

    def figure(
        self,
        kind: Literal["lens", "norms", "trajectory", "pca"] = "lens",
        *,
        position: int | None = None,
        dark: bool = False,
    ) -> Any:
        """A picture, as a plain plotly ``Figure``.

        Parameters
        ----------
        kind
            ``lens``: what each state would say, dashed lines where another server goes on; ``norms``: length of
            the states over the layers, of each token or, of many, the largest, median and smallest; ``trajectory``:
            probability over the layers of the tokens asked for, or of the last state's best, with gaps where those
            were not among the best; ``pca``: paths of the tokens in the plane of the first two principal components
            of the states' directions. For that states are fetched if they were not kept.
        position
            Of the trajectory; the last by default.
        dark
            For a dark page: the figure paints its own background.

        Raises
        ------
        UserInputError
            The trace has not kept what the picture shows.
        """
        from nbrunner.client.figures import trace_figure

        return trace_figure(self, kind, position=position, dark=dark)

    def __repr__(self) -> str:
        return (
            f"<Trace of {len(self.ids)} tokens in {self.model_name or 'a model'}: {len(self.layers)} states × "
            f"{len(self.positions)} positions, {self.seconds:.2f} s, {self.bytes_received / 1e6:.1f} MB received>"
        )

    def _index(self, token: int | str) -> int:
        wanted = token if isinstance(token, int) else token_id(self.tokenizer, token)
        if wanted not in self.chosen:
            raise UserInputError(f"token {token!r} was not asked for: model.trace(…, tokens=[{token!r}])")
        return self.chosen.index(wanted)


def _chosen(values: Any) -> Any:
    if values is None:
        raise UserInputError("no tokens were asked for: model.trace(…, tokens=[…])")
    return values


def token_id(tokenizer: Any, text: str) -> int:
    """The one token of a text. `UserInputError` if it is several, or there is no tokenizer."""
    if tokenizer is None:
        raise UserInputError(f"to find the token {text!r} a tokenizer is needed: pass tokenizer=…")
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        parts = [tokenizer.decode([one]) for one in ids]
        raise UserInputError(f"{text!r} is {len(ids)} tokens {parts}: choose one, perhaps with a space before it")
    return int(ids[0])
