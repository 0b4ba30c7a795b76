"""Cutting a training batch into groups of rows that are under way at the same time, so that no server waits.

While the second server of a chain works on the first group, the first works on the second: with two servers and
``n`` groups a pass takes ``(n + 1) / 2n`` of the time of one after the other. Servers of the same blocks share the
groups. What it costs: on a CPU blocks of hidden 1024 run 64 rows at 0.87 of the speed of 256 (measured, float32).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits

GROUPS_PER_SERVER = 2

LEAST_TOKENS = 64
"""Of a group: products with fewer rows use a processor badly."""


@dataclass(frozen=True)
class Batch:
    """Rows of a pass, and what belongs to them."""

    hidden: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    edits: Edits | None
    adapter: SpanAdapter | None

    def rows(self, rows: slice) -> Batch:
        """Some of them. Edits must be of all rows."""
        positions, adapter = self.positions, self.adapter
        return replace(
            self,
            hidden=self.hidden[rows],
            mask=None if self.mask is None else self.mask[rows],
            positions=positions if positions is None or positions.shape[0] == 1 else positions[rows],
            adapter=None if adapter is None else replace(adapter, first_row=adapter.first_row + rows.start),
        )


def micro_batches(batch: Batch, servers: int) -> list[tuple[slice, Batch]]:
    """The batch in groups for so many servers; one group where more would not help."""
    rows, tokens = batch.hidden.shape[:2]
    least = -(-LEAST_TOKENS // tokens)  # rows of a group
    groups = min(servers * GROUPS_PER_SERVER, rows // least) if servers > 1 else 1
    if groups < 2 or any(op.row is not None for op in (batch.edits.ops if batch.edits else ())):
        return [(slice(0, rows), batch)]
    bounds = [rows * index // groups for index in range(groups + 1)]
    cuts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return [(one, batch.rows(one)) for one in cuts]
