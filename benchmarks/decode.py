"""Batch 1 decoding: tokens per second over one and two servers against plain transformers."""

from __future__ import annotations

from benchmarks.report import Report, Result
from benchmarks.timing import decode_over_servers

TOKENS = 64
REACH = {("mid", 2): 0.92}


def run() -> Report:
    """64 tokens, greedy, one torch thread in each process."""
    results = []
    for name in ("tiny8", "mid"):
        for servers in (1, 2):
            ours, theirs = decode_over_servers(name, servers, TOKENS)
            results.append(
                Result(
                    f"{name}, {servers} server{'s' if servers > 1 else ''}",
                    1 / ours,
                    "tokens/s",
                    reference=1 / theirs,
                    ratio=theirs / ours,
                    reach=REACH.get((name, servers)),
                )
            )
    return Report("decode", results, {"tokens": TOKENS, "batch": 1, "dtype": "float32", "threads": 1})
