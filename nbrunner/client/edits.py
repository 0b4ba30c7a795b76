"""Edits as users write them: what to change, in which state, at which positions of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from nbrunner.blocks.edits import Edits, check_edits
from nbrunner.errors import UserInputError
from nbrunner.protocol.edits import EditOp

if TYPE_CHECKING:
    from nbrunner.client.trace import Trace

Positions = int | slice | Sequence[int] | None
"""A position, a slice, several, or None for all. Negative ones count from the end of the prompt; an open slice goes
on over what is generated, and so does None."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of hidden states: in ``model(…, edits=[…])``, ``model.generate(…, edits=[…])``, ``model.trace``.

    State ``layer`` is what enters block ``layer``; the state after the last block has the number of blocks, and the
    final norm is still to come. Edits of one state are made in the order given. Use the class methods.

    Examples
    --------
    ::

        model.generate(ids, edits=[Edit.add(4, direction, strength=3.0)])        # steer, from block 4 on
        model(ids, edits=[Edit.zero(2, positions=-1)])                          # ablate the prompt's last token
        model.trace(prompt, edits=[Edit.patch(3, -1, source=other_trace)])      # activation patching
    """

    kind: Literal["set", "add", "scale", "zero", "project"]
    layer: int
    positions: Positions = None
    vector: torch.Tensor | None = None
    factor: float = 1.0
    row: int | None = None

    @classmethod
    def set(cls, layer: int, value: torch.Tensor, positions: Positions = None) -> Edit:
        """Put ``value`` in place of the state: ``[hidden]``, or ``[positions, hidden]`` with one a position."""
        return cls("set", layer, positions, value)

    @classmethod
    def add(cls, layer: int, vector: torch.Tensor, positions: Positions = None, strength: float = 1.0) -> Edit:
        """Add ``strength × vector``: ``[hidden]``, or ``[positions, hidden]``."""
        return cls("add", layer, positions, vector, strength)

    @classmethod
    def scale(cls, layer: int, factor: float, positions: Positions = None) -> Edit:
        """Multiply the state."""
        return cls("scale", layer, positions, None, factor)

    @classmethod
    def zero(cls, layer: int, positions: Positions = None) -> Edit:
        """Put zeros in place of the state."""
        return cls("zero", layer, positions)

    @classmethod
    def project_out(cls, layer: int, direction: torch.Tensor, positions: Positions = None) -> Edit:
        """Take the part along ``direction`` ``[hidden]`` out of the state: h - (h·u) u with u the unit vector."""
        return cls("project", layer, positions, direction)

    @classmethod
    def patch(cls, layer: int, positions: Positions, source: Trace, source_positions: Positions = None) -> Edit:
        """Take the state from another run (activation patching: Vig et al. 2020, arXiv:2004.12265).

        Parameters
        ----------
        layer
            In both runs.
        positions
            In the run that is edited.
        source
            From ``model.trace``; what it has not kept it fetches.
        source_positions
            In the source; None for the same.
        """
        where = positions if source_positions is None else source_positions
        chosen = resolve_positions(where, len(source.ids))
        return cls("set", layer, positions, torch.stack([source.state(layer, one) for one in chosen]))

    def for_row(self, row: int) -> Edit:
        """The same for one row of the batch. Not in ``generate``: its edits are for all rows."""
        return Edit(self.kind, self.layer, self.positions, self.vector, self.factor, row)


def resolve_positions(positions: Positions, tokens: int) -> list[int]:
    """The positions of a prompt of so many tokens that are meant, rising.

    Raises
    ------
    UserInputError
        A position outside the prompt, or none at all.
    """
    if positions is None:
        return list(range(tokens))
    if isinstance(positions, slice):
        found = list(range(*positions.indices(tokens)))
    else:
        wanted = [positions] if isinstance(positions, int) else list(positions)
        for one in wanted:
            if isinstance(one, bool) or not isinstance(one, int) or not -tokens <= one < tokens:
                raise UserInputError(
                    f"position {one!r}: the prompt has the positions 0 to {tokens - 1}, or -{tokens} to -1"
                )
        found = [one % tokens for one in wanted]
    if not found:
        raise UserInputError(f"no position of the prompt's {tokens} is meant by {positions!r}")
    if found != sorted(set(found)):
        raise UserInputError(f"positions must rise and be different, not {positions!r}")
    return found


def compile_edits(
    edits: Sequence[Edit], *, tokens: int, num_blocks: int, hidden_shape: Sequence[int], rows: int | None
) -> Edits:
    """Edits as servers take them.

    Parameters
    ----------
    tokens
        Of the prompt, which gives negative positions their meaning.
    num_blocks
        States 0 to ``num_blocks`` can be edited.
    hidden_shape
        Of a state, without batch and tokens.
    rows
        Of the batch; None where edits must be for all rows.

    Raises
    ------
    UserInputError
    """
    ops: list[EditOp] = []
    vectors: dict[int, torch.Tensor] = {}
    shape = tuple(hidden_shape)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise UserInputError(f"edits are made with nbrunner.Edit.set, .add, …; not {type(edit).__name__}")
        layer = _number(edit.layer, "layer")
        factor = float(edit.factor)
        if not abs(factor) <= 1e6:
            raise UserInputError(f"a factor of {factor} is not usable: -1e6 to 1e6")
        vector = edit.vector
        if vector is not None:
            vector = torch.as_tensor(vector).detach().cpu()
            if not vector.is_floating_point():
                vector = vector.float()
        for begin, end in _runs(edit.positions, tokens):
            index = None
            if vector is not None:
                index = len(vectors)
                vectors[index] = _part(vector, edit.positions, tokens, begin, end, shape)
            ops.append(EditOp(edit.kind, layer, begin, end, edit.row, factor, index))
    if len(ops) > 1024:
        raise UserInputError(f"{len(ops)} edits are more than the 1024 that a server takes")
    compiled = Edits(tuple(ops), vectors)
    check_edits(compiled, layers=(0, num_blocks), hidden_shape=shape, rows=rows)
    return compiled


def _runs(positions: Positions, tokens: int) -> list[tuple[int, int | None]]:
    """Ranges of consecutive positions; the last is open where the edit goes on over what is generated."""
    if positions is None:
        return [(0, None)]
    if isinstance(positions, slice) and positions.step in (None, 1) and positions.stop is None:
        return [(slice(positions.start, None).indices(tokens)[0], None)]
    runs: list[tuple[int, int]] = []
    for one in resolve_positions(positions, tokens):
        if runs and runs[-1][1] == one:
            runs[-1] = (runs[-1][0], one + 1)
        else:
            runs.append((one, one + 1))
    return list(runs)


def _part(
    vector: torch.Tensor, positions: Positions, tokens: int, begin: int, end: int | None, shape: tuple[int, ...]
) -> torch.Tensor:
    """The vectors of one range out of those of all positions; a single vector serves for every position."""
    if tuple(vector.shape) == shape or end is None:
        return vector
    chosen = resolve_positions(positions, tokens)
    if tuple(vector.shape) != (len(chosen), *shape):
        raise UserInputError(
            f"the vector has the shape {list(vector.shape)}, not {list(shape)} or {[len(chosen), *shape]}"
        )
    at = chosen.index(begin)
    return vector[at : at + end - begin]


def _number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserInputError(f"{name} must be a number from 0 on, not {value!r}")
    return value
