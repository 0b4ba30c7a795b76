"""What a benchmark returns, and how it is shown."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version


class NotHereError(Exception):
    """A benchmark that this machine has nothing to run on; says what is missing, in one line."""


@dataclass
class Result:
    """One measured case.

    Attributes
    ----------
    value, unit
        What was measured for nbrunner.
    reference
        The same for plain transformers in the same run; None where there is nothing to compare with.
    ratio
        Speed of nbrunner over speed of the reference (1 is equal, higher is faster).
    reach
        What the project has set itself; compared with ``ratio`` or, if that is None, with ``value``.
    at_most
        Whether ``reach`` is an upper bound.
    """

    case: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    reach: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.reach is None:
            return None
        measured = self.value if self.ratio is None else self.ratio
        return measured <= self.reach if self.at_most else measured >= self.reach

    def to_json(self) -> dict[str, object]:
        row = asdict(self)
        row.pop("at_most")
        return {**row, "met": self.met}


@dataclass
class Report:
    name: str
    results: list[Result]
    conditions: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        conditions = {**machine(), **self.conditions}
        rows = [result.to_json() for result in self.results]
        return json.dumps({"name": self.name, "conditions": conditions, "results": rows}, ensure_ascii=False)

    def print_table(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.name, title_justify="left")
        for column in ("case", "value", "reference", "ratio", "reach", "met"):
            table.add_column(column, justify="left" if column == "case" else "right")
        for result in self.results:
            sign = "≤" if result.at_most else "≥"
            table.add_row(
                result.case,
                f"{result.value:.4g} {result.unit}",
                "" if result.reference is None else f"{result.reference:.4g} {result.unit}",
                "" if result.ratio is None else f"{result.ratio:.3f}",
                "" if result.reach is None else f"{sign} {result.reach:g}",
                {True: "yes", False: "NO", None: ""}[result.met],
            )
        console = Console()
        console.print(table)
        for key, value in {**machine(), **self.conditions}.items():
            console.print(f"  {key}: {value}", highlight=False)


def machine() -> dict[str, object]:
    """The conditions every table must state."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": round(load, 2),
        "python": platform.python_version(),
        **versions(("torch", "transformers", "hivemind", "nbrunner")),
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed; not all benchmarks need all of them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def interleaved(cases: Sequence[Callable[[], float]], rounds: int = 5) -> list[float]:
    """The median of each case, measured in turn so that a busy moment of the machine hits all of them."""
    samples: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case()
    for _ in range(rounds):
        for measured, case in zip(samples, cases, strict=True):
            measured.append(case())
    return [statistics.median(measured) for measured in samples]
