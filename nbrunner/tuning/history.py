"""What happened in each step, as a table of columns, and the marks on its curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "smoothed",
    "eval_loss",
    "eval_accuracy",
    "lr",
    "grad_norm",
    "tokens",
    "seconds",
    "tokens_per_second",
    "client_seconds",
    "wire_seconds",
    "server_seconds",
)

_SMOOTH = 0.9
"""Weight of what was before, in the smoothed loss."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: ``kind`` is ``lr``, ``resumed`` or ``error``."""

    step: int
    kind: str
    text: str


@dataclass
class StepRow:
    """One optimiser step; None where there is nothing. Step 0 is what was measured before the first."""

    step: int
    epoch: float = 0.0
    loss: float | None = None
    smoothed: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    client_seconds: float | None = None
    wire_seconds: float | None = None
    server_seconds: float | None = None
    servers: dict[str, float] = field(default_factory=dict)
    """PeerID → seconds that it computed."""


class History(Mapping[str, Sequence[Any]]):
    """A table of columns: ``history["loss"]``, ``history.rows``, ``pandas.DataFrame(dict(history))``."""

    def __init__(self, rows: Sequence[StepRow] = (), marks: Sequence[Mark] = ()) -> None:
        self.rows: list[StepRow] = list(rows)
        self.marks: list[Mark] = list(marks)

    # -- to look at ----------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return COLUMNS

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.rows), len(COLUMNS)

    def __getitem__(self, column: str) -> list[Any]:
        if column not in COLUMNS:
            raise KeyError(f"{column!r}: the columns are {', '.join(COLUMNS)}")
        return [getattr(row, column) for row in self.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)

    def to_dict(self, orient: str = "list") -> Any:
        """As pandas' ``to_dict`` with the orients ``list`` and ``records``."""
        if orient == "records":
            return [{name: getattr(row, name) for name in COLUMNS} for row in self.rows]
        return {name: self[name] for name in COLUMNS}

    def __repr__(self) -> str:
        last = self.last
        ends = f", the last with loss {last.loss:.4g}" if last is not None and last.loss is not None else ""
        return f"<History of {sum(row.loss is not None for row in self.rows)} steps{ends}>"

    @property
    def last(self) -> StepRow | None:
        """The last row that has a loss."""
        return next((row for row in reversed(self.rows) if row.loss is not None), None)

    def curve(self, column: str) -> list[tuple[int, float]]:
        """(step, value) where a column has a value that is a number."""
        return [
            (row.step, value)
            for row in self.rows
            if (value := getattr(row, column)) is not None and math.isfinite(value)
        ]

    # -- as it grows ---------------------------------------------------------------------------------------------

    def row(self, step: int) -> StepRow:
        """The row of a step, made if it is new."""
        if not self.rows or self.rows[-1].step < step:
            self.rows.append(StepRow(step))
        return self.rows[-1]

    def learned(self, step: int, loss: float, **values: Any) -> StepRow:
        """Note a step with its loss, and go on with the smoothed one."""
        before = self.last
        row = self.row(step)
        row.loss = loss
        for name, value in values.items():
            setattr(row, name, value)
        row.smoothed = loss
        if before is not None and before.smoothed is not None and math.isfinite(before.smoothed):
            # the first steps weigh more: otherwise the curve would start with the very first loss and stay there
            count = sum(one.loss is not None for one in self.rows)
            keep = min(_SMOOTH, 1 - 1 / count)
            row.smoothed = keep * before.smoothed + (1 - keep) * loss
        return row

    def mark(self, step: int, kind: str, text: str) -> None:
        """Note what was done at a step."""
        self.marks.append(Mark(step, kind, text))

    # -- to keep -------------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "marks": [dataclasses.asdict(mark) for mark in self.marks],
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> History:
        """From `dump`; KeyError and TypeError for what is no history."""
        return cls([StepRow(**row) for row in data["rows"]], [Mark(**mark) for mark in data["marks"]])
