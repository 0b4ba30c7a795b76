"""What a path consists of: blocks of a model in any order, and modules of the user's own between them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import nn

from nbrunner.blocks.edits import Edits
from nbrunner.client.blocks_view import RemoteBlocks
from nbrunner.errors import UserInputError
from nbrunner.protocol.edits import EditOp
from nbrunner.protocol.finite import all_finite

Entry = int | nn.Module
"""A block, or a module that takes and gives [batch, tokens, ...]."""

MAX_ENTRIES = 4096
"""Each run of blocks is a session on servers, so a path that is thousands long is a slip of the pen."""


@dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of the model at consecutive places of a path.

    Attributes
    ----------
    place
        Of the first, in the path.
    start, end
        The blocks ``[start, end)``.
    """

    place: int
    start: int
    end: int

    @property
    def after(self) -> int:
        """The place after the last."""
        return self.place + self.end - self.start

    def edits(self, edits: Edits | None, *, after_first: bool = False) -> Edits | None:
        """Edits of a path's states, as these blocks must be told; None if there are none."""
        if edits is None:
            return None
        mine = edits.within(self.place + after_first, self.after)
        shift = self.start - self.place
        ops = tuple(_moved(op, op.layer + shift) for op in mine.ops)
        return Edits(ops, mine.vectors) if ops else None


@dataclass(frozen=True)
class Insert:
    """A module of the user's at one place of a path."""

    place: int
    module: nn.Module

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run it in its own dtype, and see that what it gives can enter a block. `UserInputError` if not."""
        weight = next((one for one in self.module.parameters() if one.is_floating_point()), hidden)
        result = self.module(hidden.to(weight))
        name = f"{type(self.module).__name__} at place {self.place} of the path"
        if not isinstance(result, torch.Tensor):
            raise UserInputError(f"{name} gave a {type(result).__name__}; a tensor like its input is wanted")
        if result.shape != hidden.shape or not result.is_floating_point():
            raise UserInputError(
                f"{name} made {result.dtype} {list(result.shape)} of {hidden.dtype} {list(hidden.shape)}; hidden "
                "states of the same shape are wanted"
            )
        if not all_finite(result):
            raise UserInputError(f"{name} gave NaN or infinity")
        return result


Part = BlockRun | Insert


def entries_of(path: Sequence[Any], runner: Any, num_blocks: int) -> tuple[Entry, ...]:
    """What the user wrote, as blocks and modules.

    Parameters
    ----------
    path
        Block numbers (negative from the end), ranges of them, ``model.blocks[a:b]``, or modules.
    runner
        Of the model: blocks of another one are refused.
    num_blocks
        It has.

    Raises
    ------
    UserInputError
        Nothing, too much, blocks that there are not, or something else than blocks and modules.
    """
    if isinstance(path, (str, bytes, Mapping, nn.Module)) or not hasattr(path, "__iter__"):
        raise UserInputError(f"a path is a list such as [0, 1, 2, 2, 3], not {type(path).__name__}")
    entries: list[Entry] = []
    for one in path:
        if isinstance(one, RemoteBlocks):
            if not one.runs_on(runner):
                raise UserInputError("these blocks are of another model, or of another path")
            entries += range(one.start, one.end)
        elif isinstance(one, nn.Module):
            entries.append(one)
        elif isinstance(one, range):
            entries += [_block(number, num_blocks) for number in one[: MAX_ENTRIES + 1]]
        else:
            entries.append(_block(one, num_blocks))
        if len(entries) > MAX_ENTRIES:
            raise UserInputError(f"a path may have {MAX_ENTRIES} places, this one has more")
    if not any(isinstance(one, int) for one in entries):
        raise UserInputError(f"this path has no blocks: give some of 0 to {num_blocks - 1}")
    return tuple(entries)


def _block(number: Any, num_blocks: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise UserInputError(
            f"{number!r} cannot be in a path: give block numbers, ranges, model.blocks[a:b], or torch modules"
        )
    if not -num_blocks <= number < num_blocks:
        raise UserInputError(f"block {number} does not exist: there are 0 to {num_blocks - 1}")
    return number % num_blocks


def parts_of(entries: Sequence[Entry], start: int = 0, end: int | None = None) -> list[Part]:
    """The places ``[start, end)`` of a path as runs of consecutive blocks and modules."""
    parts: list[Part] = []
    for place in range(start, len(entries) if end is None else end):
        entry = entries[place]
        last = parts[-1] if parts else None
        if not isinstance(entry, int):
            parts.append(Insert(place, entry))
        elif isinstance(last, BlockRun) and last.end == entry:
            parts[-1] = replace(last, end=entry + 1)
        else:
            parts.append(BlockRun(place, entry, entry + 1))
    return parts


def check_joints(parts: Sequence[Part], carry: Sequence[frozenset[int]], slots: Sequence[frozenset[int]]) -> None:
    """Refuse a path that breaks what blocks share besides the hidden state.

    Parameters
    ----------
    carry
        For each block, the parts of the previous block's result that it takes (`blocks.examine.Architecture`).
    slots
        For each block, the cache slots it writes.
    """
    for part in parts:
        if not isinstance(part, BlockRun):
            continue
        if part.start < len(carry) and carry[part.start]:
            raise UserInputError(
                f"block {part.start} of this model takes more of block {part.start - 1} than its hidden state, so "
                "no path can part the two; break it elsewhere"
            )
        inside = frozenset[int]().union(*slots[part.start : part.end])
        outside = frozenset[int]().union(*slots[: part.start], *slots[part.end :])
        if inside & outside:
            raise UserInputError("blocks of this model share their caches, so no path can pick some of them")


def _moved(op: EditOp, layer: int) -> EditOp:
    return msgspec.structs.replace(op, layer=layer)
