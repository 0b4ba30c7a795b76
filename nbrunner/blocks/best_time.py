"""How long something takes at best: what a processor can do, whatever else the machine is busy with."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_seconds(run: Callable[[], object], tries: int) -> float:
    """The shortest of several runs, in seconds."""
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
