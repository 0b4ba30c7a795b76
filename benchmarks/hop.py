"""What one more server adds to a step: (time over n servers - time of the local model) / n."""

from __future__ import annotations

from benchmarks.report import Report, Result
from benchmarks.timing import decode_over_servers

TOKENS = 64


def run() -> Report:
    """Decode steps of ``tiny8``, which has next to no work in it, and of ``mid``."""
    results = []
    for name in ("tiny8", "mid"):
        for servers in (1, 2):
            ours, theirs = decode_over_servers(name, servers, TOKENS)
            results.append(
                Result(
                    f"{name}, {servers} server{'s' if servers > 1 else ''}: added per server and step",
                    1000 * (ours - theirs) / servers,
                    "ms",
                    reach=1.5 if name == "tiny8" else None,
                    at_most=True,
                )
            )
    return Report("hop", results, {"tokens": TOKENS, "batch": 1, "threads": 1})
