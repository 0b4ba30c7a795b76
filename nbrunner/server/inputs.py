"""Tensors of a request, checked against what the span takes. In the compute thread: checks read every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.tensors import take

CARRY = "carry."
_CARRY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


@dataclass(frozen=True)
class Form:
    """What hidden states of a span look like.

    Attributes
    ----------
    dtype
        On the wire and in the span.
    token_shape
        Dimensions after [batch, tokens].
    max_positions
        Position ids must be below.
    """

    dtype: torch.dtype
    token_shape: tuple[int, ...]
    max_positions: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one row."""
        count = 1
        for size in self.token_shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """Inputs of a span for tokens ``[begin, end)``, on the host."""

    hidden: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    carry: dict[int, torch.Tensor]


def sizes(tensors: Mapping[str, RawTensor]) -> tuple[int, int]:
    """(batch, tokens) as a frame claims them; the rest is checked later. `BadPeerDataError` if there are none."""
    raw = tensors.get("hidden")
    if raw is None or len(raw.spec.shape) < 3:
        raise BadPeerDataError("tensor 'hidden' [batch, tokens, ...] is missing")
    return raw.spec.shape[0], raw.spec.shape[1]


def take_inputs(
    tensors: Mapping[str, RawTensor],
    form: Form,
    *,
    position: int = 0,
    begin: int = 0,
    positions_from: int = 0,
) -> Inputs:
    """The inputs for tokens ``[begin, end of the part)``.

    Parameters
    ----------
    position
        Of the first token in ``hidden``.
    begin
        First token wanted, not before ``position``.
    positions_from
        First token that ``positions`` speaks of.

    Raises
    ------
    BadPeerDataError
        Anything that is not as it must be; the caller names the peer.
    """
    batch, tokens = sizes(tensors)
    end, skip = position + tokens, begin - position
    hidden = take(tensors, "hidden", dtype=form.dtype, shape=[batch, tokens, *form.token_shape])
    return Inputs(
        hidden=hidden[:, skip:],
        mask=_take_mask(tensors, batch, end),
        positions=_take_positions(tensors, form, batch, begin - positions_from, end - positions_from),
        carry=_take_carry(tensors, CARRY, batch, tokens, skip),
    )


def take_gradients(
    tensors: Mapping[str, RawTensor], form: Form, shape: tuple[int, int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Gradients with respect to a span's outputs of (rows, tokens): ``grad`` and ``grad_carry.N``."""
    batch, tokens = shape
    grad = take(tensors, "grad", dtype=form.dtype, shape=[batch, tokens, *form.token_shape])
    return grad, _take_carry(tensors, "grad_" + CARRY, batch, tokens, 0)


def _take_mask(tensors: Mapping[str, RawTensor], batch: int, end: int) -> torch.Tensor | None:
    if "mask" not in tensors:
        return None
    mask = take(tensors, "mask", dtype=torch.bool, shape=[batch, None])
    if mask.shape[1] < end:
        raise BadPeerDataError(f"mask of {mask.shape[1]} tokens for positions up to {end}")
    return mask[:, :end]


def _take_positions(
    tensors: Mapping[str, RawTensor], form: Form, batch: int, begin: int, end: int
) -> torch.Tensor | None:
    if "positions" not in tensors:
        return None
    positions = take(tensors, "positions", dtype=torch.int64, shape=[None, None])
    if positions.shape[0] not in (1, batch) or begin < 0 or positions.shape[1] < end:
        raise BadPeerDataError(f"position ids of shape {list(positions.shape)} do not cover [{begin}, {end})")
    positions = positions[:, begin:end]
    # an index outside a table of learned positions kills a CUDA context for everybody
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < form.max_positions:
        raise BadPeerDataError(f"position ids outside [0, {form.max_positions})")
    return positions


def _take_carry(
    tensors: Mapping[str, RawTensor], prefix: str, batch: int, tokens: int, skip: int
) -> dict[int, torch.Tensor]:
    carry: dict[int, torch.Tensor] = {}
    for name in tensors:
        if name.startswith(prefix):
            number = name[len(prefix) :]
            if not (number.isascii() and number.isdecimal() and len(number) <= 3):
                raise BadPeerDataError(f"tensor {name!r} is not a name of this protocol")
            tensor = take(tensors, name, dtype=_CARRY_DTYPES, shape=[batch, tokens, -1])
            carry[int(number)] = tensor[:, skip:]
    return carry


def windows(begin: int, end: int, size: int) -> Sequence[tuple[int, int]]:
    """``[begin, end)`` in consecutive pieces of at most ``size``, or of 1 if that is less."""
    size = max(1, size)
    return [(at, min(at + size, end)) for at in range(begin, end, size)]
