"""Declarative changes of hidden states on their way through the blocks. Never code: only the five kinds below.

All kinds are affine maps with a symmetric linear part: gradients go back through them by the same few lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nbrunner.protocol.finite import all_finite

from ..errors import BadPeerDataError, UserInputError

if TYPE_CHECKING:
    from ..protocol.edits import EditOp
    from ..protocol.frames import RawTensor

PREFIX = "edit."
MAX_BYTES = 16 << 20
"""Vectors of one session or request: 512 states of hidden 8192 in float32. A session keeps them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WITH_VECTOR = ("set", "add", "project")


@dataclass(frozen=True)
class Edits:
    """Edits in the order in which they are made, and the vectors they name.

    State ``layer`` is what enters block ``layer``; the state after the last block has the number of blocks.

    Attributes
    ----------
    ops : tuple of EditOp
    vectors : mapping of int to Tensor
        ``[*hidden_shape]``, or ``[end - begin, *hidden_shape]`` with one vector a position; finite.
    """

    ops: tuple[EditOp, ...] = ()
    vectors: Mapping[int, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ops)

    def within(self, start: int, end: int) -> Edits:
        """Those at states ``[start, end)``: what a server with blocks ``[start, end)`` has to do."""
        ops = tuple(op for op in self.ops if start <= op.layer < end)
        return Edits(ops, {op.vector: self.vectors[op.vector] for op in ops if op.vector is not None})

    def touches(self, layer: int) -> bool:
        return any(op.layer == layer for op in self.ops)

    def apply(self, hidden: Tensor, layer: int, position: int = 0) -> Tensor:
        """The state with its edits made; the argument itself stays as it is.

        Parameters
        ----------
        hidden : Tensor
            ``[batch, tokens, *hidden_shape]``.
        layer : int
            Which state it is.
        position : int
            Of its first token.
        """
        for op in self.ops:
            if op.layer == layer:
                vector = None if op.vector is None else self.vectors[op.vector]
                hidden = _apply_one(hidden, op, vector, position)
        return hidden

    def pull_back(self, grad: Tensor, layer: int, position: int = 0) -> Tensor:
        """Gradient with respect to the state before its edits, from that with respect to the state after them."""
        from ..protocol.edits import EditOp

        for op in reversed(self.ops):
            if op.layer != layer or op.kind == "add":
                continue
            linear = EditOp("zero", op.layer, op.begin, op.end, op.row) if op.kind == "set" else op
            vector = None if linear.vector is None else self.vectors[linear.vector]
            grad = _apply_one(grad, linear, vector, position)
        return grad

    def packed(self, start: int, end: int) -> tuple[list[EditOp], list[RawTensor]]:
        """What is sent to a server that runs blocks ``[start, end)``."""
        from ..protocol.tensors import pack

        some = self.within(start, end)
        return list(some.ops), [pack(f"{PREFIX}{index}", vector) for index, vector in some.vectors.items()]


def check_edits(edits: Edits, *, layers: tuple[int, int], hidden_shape: Sequence[int], rows: int | None) -> None:
    """`UserInputError` for edits that cannot be made.

    Parameters
    ----------
    layers : tuple of int
        First and last state that may be edited.
    hidden_shape : sequence of int
        What follows ``[batch, tokens]`` in a hidden state.
    rows : int or None
        Of the batch; None where edits must be for all rows, as in sessions.
    """
    shape = tuple(hidden_shape)
    for op in edits.ops:
        where = f"edit {op.kind!r} of state {op.layer}"
        if not layers[0] <= op.layer <= layers[1]:
            raise UserInputError(f"{where}: there are states {layers[0]} to {layers[1]} here")
        if op.end is not None and op.end <= op.begin:
            raise UserInputError(f"{where}: positions [{op.begin}, {op.end}) are none")
        if op.row is not None and (rows is None or op.row >= rows):
            raise UserInputError(
                f"{where}: row {op.row} of {rows or 'a session, which takes edits of all rows only'}"
            )
        if (op.vector is not None) != (op.kind in _WITH_VECTOR):
            raise UserInputError(f"{where}: a vector is {'needed' if op.vector is None else 'of no use'}")
        if op.vector is None:
            continue
        vector = edits.vectors.get(op.vector)
        if vector is None:
            raise UserInputError(f"{where}: vector {op.vector} is missing")
        per_position = (op.end - op.begin, *shape) if op.end is not None else None
        if tuple(vector.shape) not in (shape, per_position):
            raise UserInputError(
                f"{where}: the vector has the shape {list(vector.shape)}, not {list(shape)}"
                + (f" or {list(per_position)}" if per_position else "")
            )
        if not vector.is_floating_point() or not all_finite(vector):
            raise UserInputError(f"{where}: the vector has NaN or infinity in it, or is not of floating point")
        if op.kind == "project" and not bool((vector != 0).any()):
            raise UserInputError(f"{where}: the direction is zero")
    size = sum(vector.numel() * vector.element_size() for vector in edits.vectors.values())
    if size > MAX_BYTES:
        raise UserInputError(f"the edits' vectors have {size >> 20} MB, {MAX_BYTES >> 20} MB are allowed")


def take_edits(
    ops: Sequence[EditOp],
    tensors: Mapping[str, RawTensor],
    *,
    blocks: tuple[int, int],
    hidden_shape: Sequence[int],
    rows: int | None,
) -> Edits:
    """Edits from a frame, for whoever runs blocks ``[start, end)``. `BadPeerDataError` unless they can be made."""
    from ..protocol.tensors import take

    names = {f"{PREFIX}{op.vector}" for op in ops if op.vector is not None}
    extra = [name for name in tensors if name.startswith(PREFIX) and name not in names]
    if extra:
        raise BadPeerDataError(f"tensor {extra[0]!r} belongs to no edit")
    vectors = {
        op.vector: take(tensors, f"{PREFIX}{op.vector}", dtype=_DTYPES, shape=[-1])
        for op in ops
        if op.vector is not None
    }
    edits = Edits(tuple(ops), vectors)
    try:
        check_edits(edits, layers=(blocks[0], blocks[1] - 1), hidden_shape=hidden_shape, rows=rows)
    except UserInputError as error:
        raise BadPeerDataError(str(error)) from None
    return edits


def _apply_one(hidden: Tensor, op: EditOp, vector: Tensor | None, position: int) -> Tensor:
    tokens = hidden.shape[1]
    begin = max(op.begin - position, 0)
    end = tokens if op.end is None else min(op.end - position, tokens)
    if begin >= end:
        return hidden
    rows = slice(None) if op.row is None else slice(op.row, op.row + 1)
    window = hidden[rows, begin:end]
    if vector is not None:
        vector = vector.to(window.device, window.dtype)
        if vector.ndim == hidden.ndim - 1:  # one a position
            first = position + begin - op.begin
            vector = vector[first : first + end - begin]
    edited = hidden.clone()
    edited[rows, begin:end] = _changed(window, op, vector)
    return edited


def _changed(window: Tensor, op: EditOp, vector: Tensor | None) -> Tensor:
    if vector is None:
        return window * op.factor if op.kind == "scale" else torch.zeros_like(window)
    if op.kind == "set":
        return vector.expand_as(window)
    if op.kind == "add":
        return window + op.factor * vector
    # In float32: a squared norm of thousands of bfloat16 numbers has no digits left.
    wide, direction = window.float(), vector.float()
    dims = tuple(range(2 - window.ndim, 0))
    unit = direction / direction.pow(2).sum(dims, keepdim=True).sqrt()
    along = (wide * unit).sum(dims, keepdim=True)
    return (wide - op.factor * along * unit).to(window.dtype)
