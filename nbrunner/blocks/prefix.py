"""The first tokens of a session, where others have the same or where its rows do: held once, never changed.

Whoever goes on after a prefix appends to buffers of its own, so that nothing is copied because somebody writes.
Everything here is immutable; a session whose prefix becomes shorter, or whose rows change, has another `Prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FrozenTokens:
    """Consecutive tokens that passed through a span.

    Attributes
    ----------
    tokens, rows : int
        How many.
    layers : mapping of int to (Tensor, Tensor)
        By slot, keys and values ``[rows, heads, tokens, width]``.
    outputs : mapping of str to Tensor
        ``[rows, tokens, …]``, what left the span; on the host.
    """

    tokens: int
    rows: int
    layers: Mapping[int, tuple[Tensor, Tensor]]
    outputs: Mapping[str, Tensor]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [tensor for pair in self.layers.values() for tensor in pair] + [*self.outputs.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Piece:
    """The first ``tokens`` of frozen ones, and which of their rows each row of a session has (None: its own)."""

    frozen: FrozenTokens
    tokens: int
    rows: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Rows of the session."""
        return self.frozen.rows if self.rows is None else len(self.rows)

    @cached_property
    def single(self) -> int | None:
        """The row that all rows of the session have; None if they have different ones."""
        rows = range(self.frozen.rows) if self.rows is None else self.rows
        return rows[0] if len(set(rows)) == 1 else None

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """Its part of one of the tensors, in the session's rows; a view where all have the same, or their own."""
        part = tensor.narrow(axis, 0, self.tokens)
        if self.rows is None:
            return part
        if self.single is not None:
            return part[self.single : self.single + 1].expand(len(self.rows), *part.shape[1:])
        return part.index_select(0, torch.tensor(self.rows, device=part.device))


@dataclass(frozen=True, eq=False)
class Prefix:
    """Pieces one after the other, all of equally many rows."""

    pieces: tuple[Piece, ...] = ()

    @cached_property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def rows(self) -> int:
        """Rows of the session; means nothing without pieces."""
        return self.pieces[0].count

    def followed_by(self, frozen: FrozenTokens) -> Prefix:
        return Prefix((*self.pieces, Piece(frozen, frozen.tokens)))

    def first(self, tokens: int) -> Prefix:
        """The same up to a token; all of it if it is shorter."""
        if tokens >= self.tokens:
            return self
        kept, left = [], tokens
        for piece in self.pieces:
            if left > 0:
                kept.append(Piece(piece.frozen, min(piece.tokens, left), piece.rows))
            left -= piece.tokens
        return Prefix(tuple(kept))

    def select(self, rows: Sequence[int]) -> Prefix:
        """Row ``i`` becomes what row ``rows[i]`` was. Copies nothing."""
        return Prefix(
            tuple(
                Piece(
                    piece.frozen,
                    piece.tokens,
                    tuple(rows) if piece.rows is None else tuple(piece.rows[row] for row in rows),
                )
                for piece in self.pieces
            )
        )

    def original(self) -> Prefix:
        """With the rows it was frozen with."""
        return Prefix(tuple(Piece(piece.frozen, piece.tokens) for piece in self.pieces))

    def outputs(self, name: str, begin: int, end: int) -> list[Tensor]:
        """``[rows, tokens, …]`` of what left the span for tokens ``[begin, end)``, as far as they are in here."""
        found, at = [], 0
        for piece in self.pieces:
            first, last = max(begin - at, 0), min(end - at, piece.tokens)
            if first < last:
                found.append(piece.of(piece.frozen.outputs[name], 1)[:, first:last])
            at += piece.tokens
        return found
