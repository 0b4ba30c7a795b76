"""What entered block 0 of a session so far: the tensors from which any lost server can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nbrunner.errors import UserInputError
from nbrunner.protocol.steps import CacheOp


@dataclass(frozen=True)
class Snapshot:
    """A state of a `History`; cheap, because appending never changes what is before."""

    hidden: torch.Tensor | None
    length: int
    mask: torch.Tensor | None
    positions: torch.Tensor | None


class History:
    """Hidden states [batch, length, ...] of a session with its mask [batch, length] and position ids.

    The buffer doubles as it grows, so that a step costs its own tokens and not the session's length.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self.length = 0
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    @property
    def hidden(self) -> torch.Tensor:
        """[batch, length, ...]; a view."""
        if self._buffer is None:
            raise UserInputError("the session holds no tokens yet")
        return self._buffer[:, : self.length]

    @property
    def batch(self) -> int:
        """Rows; 0 before the first step."""
        return 0 if self._buffer is None else self._buffer.shape[0]

    def snapshot(self) -> Snapshot:
        return Snapshot(self._buffer, self.length, self.mask, self.positions)

    def restore(self, snapshot: Snapshot) -> None:
        self._buffer, self.length = snapshot.hidden, snapshot.length
        self.mask, self.positions = snapshot.mask, snapshot.positions

    def apply(self, ops: Sequence[CacheOp]) -> None:
        """Apply a step's ops, as every server does to its caches."""
        for op in ops:
            if op.kind == "crop":
                self._crop(op.count)
            elif op.kind == "reset":
                self._buffer, self.length, self.mask, self.positions = None, 0, None, None
            else:
                rows = (
                    torch.tensor(op.rows, dtype=torch.long)
                    if op.kind == "select"
                    else torch.arange(self.batch).repeat_interleave(op.count)
                )
                self._take_rows(rows)

    def append(self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """Add a step's tokens.

        Parameters
        ----------
        hidden
            [batch, tokens, ...].
        mask
            [batch, length + tokens] bool, cumulative; None when all true.
        positions
            [1 or batch, tokens] int64; None when they are what a server derives from length and mask.
        """
        batch, tokens = hidden.shape[:2]
        if self._buffer is not None and self.length and batch != self.batch:
            raise UserInputError(f"the session has {self.batch} rows, this step has {batch}")
        end = self.length + tokens
        self._reserve(hidden, end)
        if self._buffer is not None:
            self._buffer[:, self.length : end] = hidden
        if positions is not None or self.positions is not None:
            earlier = self.positions
            if earlier is None:
                earlier = default_positions(self.mask, 0, self.length)
            now = positions if positions is not None else default_positions(mask, self.length, end)
            self.positions = _join_rows(earlier, now)
        self.length, self.mask = end, mask

    def _reserve(self, like: torch.Tensor, end: int) -> None:
        old = self._buffer
        if old is not None and self.length and old.shape[1] >= end:
            return
        capacity = max(end, 64, 2 * self.length)
        new = like.new_empty((like.shape[0], capacity, *like.shape[2:]))
        if old is not None and self.length:
            new[:, : self.length] = old[:, : self.length]
        self._buffer = new

    def _crop(self, count: int) -> None:
        if count >= self.length:
            return
        # what follows will be overwritten, and a snapshot may still need it
        self._buffer = None if self._buffer is None else self._buffer[:, : self.length].clone()
        self.length = count
        self.mask = None if self.mask is None else self.mask[:, :count]
        self.positions = None if self.positions is None else self.positions[:, :count]

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer[:, : self.length].index_select(0, rows)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions.index_select(0, rows)


def default_positions(mask: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    """Position ids [1 or batch, end - begin] that a server derives itself: counted from each row's first token."""
    if mask is None:
        return torch.arange(begin, end).unsqueeze(0)
    counted = mask[:, :end].long().cumsum(-1) - 1
    return counted.masked_fill(~mask[:, :end].bool(), 0)[:, begin:]


def _join_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows = max(a.shape[0], b.shape[0])
    return torch.cat([a.expand(rows, -1), b.expand(rows, -1)], dim=1)
