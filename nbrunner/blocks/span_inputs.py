"""What can enter the blocks of a span; `UserInputError` says what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserInputError
from .cache import SpanCache


def check_hidden(hidden: Tensor, hidden_shape: Sequence[int]) -> tuple[int, int]:
    """(rows, tokens) of hidden states ``[batch, tokens, *hidden_shape]``."""
    if hidden.ndim != 2 + len(hidden_shape) or tuple(hidden.shape[2:]) != tuple(hidden_shape):
        raise UserInputError(
            "a hidden state of this model has the shape [batch, tokens, "
            f"{', '.join(map(str, hidden_shape))}], not {list(hidden.shape)}"
        )
    batch, tokens = hidden.shape[:2]
    if not batch or not tokens:
        raise UserInputError("a step needs at least one row and one token")
    return batch, tokens


def check_cache(cache: SpanCache, batch: int, start: int, end: int) -> int:
    """Tokens that the cache of a session holds, if blocks ``[start, end)`` can be run with it for so many rows."""
    if not cache.start <= start < end <= cache.end:
        raise UserInputError(
            f"blocks [{start}, {end}) are not inside the session's blocks [{cache.start}, {cache.end})"
        )
    rows = cache.batch_rows
    if rows is not None and rows != batch:
        raise UserInputError(f"the session has {rows} rows, the step {batch}")
    return cache.length


def check_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, *, batch: int, tokens: int, past: int
) -> None:
    """The mask is of all tokens, the positions are of the new ones."""
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + tokens):
        raise UserInputError(
            f"the attention mask has the shape {list(attention_mask.shape)}, not [{batch}, {past + tokens}]"
        )
    if position_ids is not None and (
        position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens
    ):
        raise UserInputError(f"positions have the shape {list(position_ids.shape)}, not [{batch}, {tokens}]")


def check_carry(start: int, wanted: Collection[int], carry: Collection[int] | None) -> None:
    """All parts of the previous block's result that block ``start`` wants besides the hidden state are there."""
    missing = set(wanted) - set(carry or ())
    if missing:
        raise UserInputError(
            f"block {start} of this model also takes part {min(missing)} of what block {start - 1} returned"
        )


def check_differentiable(model: nn.Module, device: torch.device) -> None:
    """Refuse 4-bit weights on a CPU: gradients would be silently wrong (measured: 99.7 % of them lost).

    There bitsandbytes repacks the weights at the first forward without gradients, and its product for packed
    weights has no backward, while the result still says that it has one.
    """
    if device.type == "cpu" and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise UserInputError(
            "there are no gradients through 4-bit weights on a CPU; train over servers with other weights"
        )
