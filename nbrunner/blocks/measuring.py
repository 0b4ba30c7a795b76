"""What is said of hidden states instead of sending them: pure functions, the same on servers and in the client.

Formulas. *norm*: ``‖h‖₂``. *cosine*: ``h·g / (‖h‖ ‖g‖)``, 0 where one of them is zero. With ``z`` the logits of the
lens and ``p = softmax(z)``: *log-probability* ``z_t - logsumexp(z)``, *rank* how many tokens have a higher logit,
*entropy* ``-Σ p ln p`` (nats), *KL* ``Σ q ln(q / p)`` with ``q`` the distribution after the last block (nats; the
"forward KL" of the tuned lens, Belrose et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserInputError
from ..protocol.measure import Measure
from .lens import Lens


@torch.no_grad()
def measure_states(
    states: Mapping[int, Tensor], measure: Measure, *, lens: Lens | None = None, final: Tensor | None = None
) -> dict[str, Tensor]:
    """Measure some states.

    Parameters
    ----------
    states : mapping of int to Tensor
        State index → ``[batch, tokens, *hidden_shape]``; all of ``measure.layers``, and for similarity also the one
        before each, where there is one.
    measure : Measure
        What is wanted.
    lens : Lens, optional
        Needed where ``measure.needs_lens``.
    final : Tensor, optional
        ``[batch, positions, *hidden_shape]``, what left the last block at the positions measured; needed with
        ``measure.final``.

    Returns
    -------
    dict of str to Tensor
        On the CPU, as `nbrunner.protocol.measure.measured_shapes` says: ``[layers, batch, positions, ...]``. The
        cosine of state 0 to the one before is 1.

    Raises
    ------
    UserInputError
        Something that is needed is missing.
    """
    if measure.needs_lens and lens is None:
        raise UserInputError("a lens is needed for token probabilities: load a model with a language-model head")
    if measure.final and final is None:
        raise UserInputError("the last block's output is needed for comparisons with it")
    taken = {layer: _at(states[layer], measure.positions) for layer in measure.layers}
    found: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(value)

    for layer, state in taken.items():
        flat = _flat(state)
        if measure.norm:
            add("norm", flat.norm(dim=-1))
        if measure.similarity:
            before = _flat(_at(states[layer - 1], measure.positions)) if layer else flat
            add("cos_previous", _cosine(flat, before))
            if final is not None and measure.final:
                add("cos_last", _cosine(flat, _flat(final)))
        if measure.hidden:
            add("hidden", state.cpu())
    if measure.needs_lens and lens is not None:
        found |= _through_lens(list(taken.values()), measure, lens, final)
    return {name: torch.stack(values) for name, values in found.items()}


def join_layers(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Measurements of consecutive layers as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Measurements of consecutive rows of a batch as one."""
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]} if parts else {}


def _through_lens(
    states: Sequence[Tensor], measure: Measure, lens: Lens, final: Tensor | None
) -> dict[str, list[Tensor]]:
    """Each result one tensor a layer. A chunk of positions goes through all layers: they share the last one's."""
    batch, positions = states[0].shape[:2]
    flat = [state.reshape(batch * positions, *state.shape[2:]) for state in states]
    last = None if final is None or not measure.final else final.reshape(batch * positions, *final.shape[2:])
    chunks: dict[str, list[list[Tensor]]] = {}
    for begin in range(0, batch * positions, lens.chunk):
        rows = slice(begin, begin + lens.chunk)
        target = None if last is None else torch.log_softmax(lens.logits(last[rows]), dim=-1).clamp_min(-1e30)
        for index, state in enumerate(flat):
            for name, value in _of_logits(lens.logits(state[rows]), measure, target).items():
                chunks.setdefault(name, [[] for _ in flat])[index].append(value)
    return {
        name: [torch.cat(pieces).reshape(batch, positions, *pieces[0].shape[1:]) for pieces in layers]
        for name, layers in chunks.items()
    }


def _of_logits(logits: Tensor, measure: Measure, target: Tensor | None) -> dict[str, Tensor]:
    log_probs = torch.log_softmax(logits, dim=-1).clamp_min(-1e30)  # tokens a model rules out have -inf
    found: dict[str, Tensor] = {}
    if measure.top:
        best = log_probs.topk(measure.top, dim=-1)
        found["top_ids"] = best.indices.to(torch.int32)
        found["top_log_probs"] = best.values
        found["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
    if measure.tokens:
        ids = torch.tensor(measure.tokens, dtype=torch.long)
        chosen = logits[:, ids]
        found["token_log_probs"] = log_probs[:, ids]
        ranks = [(logits > chosen[:, column : column + 1]).sum(-1) for column in range(len(measure.tokens))]
        found["token_ranks"] = torch.stack(ranks, dim=-1).to(torch.int32)
    if target is not None:
        found["kl"] = (target.exp() * (target - log_probs)).sum(-1).clamp_min(0.0)
    return found


def _at(state: Tensor, positions: Sequence[int]) -> Tensor:
    return state[:, list(positions)] if positions else state


def _flat(state: Tensor) -> Tensor:
    return state.flatten(2).float().cpu()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    scale = one.norm(dim=-1) * other.norm(dim=-1)
    return torch.where(scale > 0, (one * other).sum(-1) / scale.clamp_min(1e-30), 0.0)
