"""The logit lens: what a model's own final norm and head make of a state from between its blocks.

"interpreting GPT: the logit lens", nostalgebraist 2020. What an architecture does between its last layer and its
logits (norm, scaling, soft-caps, several streams that are joined) is not copied but run: the outer model's own
forward, in which the one layer left returns the state that was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserInputError
from .checkpoint import Checkpoint
from .shadows import is_hollow
from .skeleton import Skeleton, instead_of_layers, load_client_model

CHUNK_BYTES = 64 << 20
"""Of float32 logits computed at once."""


class Lens:
    """Final norm and head of one model.

    Attributes
    ----------
    vocabulary : int
        How many logits there are.
    nbytes : int
        Of the parameters it holds.
    """

    def __init__(self, model: Any) -> None:
        if model.get_output_embeddings() is None:
            raise UserInputError(f"{type(model).__name__} has no language-model head to look through")
        skeleton: Skeleton = model.nbrunner_skeleton
        self._model = model
        self._weight = next(skeleton.base.parameters())
        self._like = next(model.get_output_embeddings().parameters(), self._weight)
        self.hidden_shape: tuple[int, ...] = skeleton.hidden_shape
        self.vocabulary = int(self.logits(torch.zeros(1, *self.hidden_shape)).shape[-1])
        self.nbytes = sum(
            parameter.numel() * parameter.element_size()
            for parameter in model.parameters()
            if not is_hollow(parameter)
        )

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Lens:
        """Load embeddings, final norm and head of a checkpoint, for a server.

        Raises
        ------
        UnsupportedModelError, CheckpointError
            As `load_client_model`.
        """
        model = load_client_model(
            checkpoint, "AutoModelForCausalLM", lambda *_: nn.Identity(), dtype=dtype, device=device, shadows=False
        )
        return cls(model.requires_grad_(False))

    @classmethod
    def of(cls, model: Any) -> Lens:
        """The lens of a client's model; shares its weights. `UserInputError` if the model has no head."""
        return cls(model)

    @property
    def chunk(self) -> int:
        """How many states to ask about at once, for memory's sake."""
        return max(1, CHUNK_BYTES // (4 * self.vocabulary))

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Logits as if these states had left the last block.

        Parameters
        ----------
        states : Tensor
            ``[..., *hidden_shape]``, any floating dtype; converted to the model's.

        Returns
        -------
        Tensor
            ``[..., vocabulary]`` float32 on the CPU.
        """
        dims = len(self.hidden_shape)
        if tuple(states.shape[states.ndim - dims :]) != self.hidden_shape:
            raise UserInputError(f"states end in {list(states.shape)[-dims:]}, not in {list(self.hidden_shape)}")
        leading = states.shape[: states.ndim - dims]
        # each a sequence of its own: what comes after the last block looks at no other token
        given = states.reshape(-1, 1, *self.hidden_shape).to(self._weight.device, self._weight.dtype)
        ids = torch.zeros(given.shape[0], 1, dtype=torch.long, device=given.device)
        with instead_of_layers(given):
            logits: Tensor = self._model(input_ids=ids, use_cache=False, return_dict=True).logits
        return logits[:, 0].float().cpu().reshape(*leading, -1)
