"""``docs/performance.md``, made from what the benchmarks printed.

    python -m benchmarks all --json | python -m benchmarks.page > docs/performance.md

Names that were not run keep the rows that the page has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

INTRODUCTION = """# Performance

What `python -m benchmarks NAME` printed, everything on one machine: see the conditions under each table.
References are plain transformers on the same checkpoint and threads, or what the row says, measured in turn;
each figure is the median of five or more. `tiny` is the bundled model, `tiny8` a random Llama of hidden 256 and
8 blocks, `mid` one of hidden 1024 and 16 blocks. Such machines vary by ten percent from hour to hour. `make
bench-report` makes this page.
"""

REASONS = {
    "concurrent": "Eight sessions: their one client computes its head for each, 5 ms one after the other. Four "
    "processes: both cores are busy. For a token of each, two passes of two rows over 8 blocks take each server "
    "70 ms (one row takes 30, four take 60: the products of MKL), and the four heads take 44 ms, as they do in "
    "plain transformers.",
    "fairness": "The steps of both peers run in one pass, and one of nine rows takes twice as long as one of a "
    "single row (122 ms and 58 on one core in float32). Serving the peers in turn would take most of the speed of "
    "the eight and give next to nothing to the one.",
    "decode": "A step of `mid` reads 800 MB of weights and is bound by the memory of a machine that others use "
    "too: one version gave 0.919 to 0.945 within an hour. Over two servers, each process rests while the other one "
    "computes, and the code of a step leaves its processor's caches: a server rehearses before a step is due "
    "(decision 0018), and its 8 blocks then take 29.3 ms, and 28.6 in the plain model; what it does around them "
    "takes 0.5. A message from one process to the next takes 0.4 ms.",
    "hop": "A step of `tiny8` is all overhead. Where there is one server, all that a client does for a step counts "
    "for it: 0.5 ms of processor time. The rest is the server's: to take a part, check it and pass it on, with "
    "caches that have gone cold since the last step. It was 1.1 to 1.4 ms in quiet runs of one night.",
    "start": "Plain transformers needs as long by itself here, nearly all of it to import torch and transformers.",
    "train": "Servers of 8 blocks each work on four groups of 64 tokens, and wait for one group's time at each end "
    "of both passes; a block runs 64 tokens at 0.87 of the speed of 256; and nobody has work while the "
    "client follows the last group to the loss and back. Eight runs of one night gave 1.24 to 1.38 with LoRA "
    "(1.34 in the middle) and 1.38 to 1.44 with prompt tuning; noisy hours give 1.0 to 1.2. Servers that both have "
    "all 16 blocks take half of the batch each and do not wait for one another.",
}
"""Why a benchmark misses its line, shown under its table when it does."""

_HEADINGS = "| what | measured | reference | ratio | set as the goal | reached |\n" + "| --- " * 6 + "|"


def page(lines: Iterable[str], before: str = "") -> str:
    """The page for JSON lines of benchmarks; sections of others are taken over from ``before``."""
    sections = dict(_sections(before))
    for line in lines:
        if line.strip():
            report = json.loads(line)
            sections[report["name"]] = _section(report)
    return "\n".join([INTRODUCTION, *(sections[name] for name in sorted(sections))])


def _sections(text: str) -> Iterable[tuple[str, str]]:
    for part in text.split("\n## ")[1:]:
        yield part.split("\n", 1)[0].strip().strip("`"), f"## {part.rstrip()}\n"


def _section(report: dict[str, Any]) -> str:
    rows = [_row(result) for result in report["results"]]
    parts = [f"## `{report['name']}`\n", _HEADINGS, *rows, ""]
    if any(result["met"] is False for result in report["results"]):
        reason = REASONS.get(report["name"], "Not reached in this run, and why has not been found out.")
        parts += [reason, ""]
    conditions = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    return "\n".join([*parts, f"*{conditions}*\n"])


def _row(result: dict[str, Any]) -> str:
    unit = f" {result['unit']}" if result["unit"] else ""
    reach = result["reach"]
    at_most = _at_most(result)
    cells = [
        result["case"],
        f"{result['value']:.4g}{unit}",
        "" if result["reference"] is None else f"{result['reference']:.4g}{unit}",
        "" if result["ratio"] is None else f"{result['ratio']:.2f}",
        "" if reach is None else f"{'≤' if at_most else '≥'} {reach:g}",
        {True: "yes", False: "**no**", None: ""}[result["met"]],
    ]
    return "| " + " | ".join(cells) + " |"


def _at_most(result: dict[str, Any]) -> bool:
    """Whether the goal is an upper bound: told by whether it was met."""
    measured = result["value"] if result["ratio"] is None else result["ratio"]
    return result["reach"] is not None and (measured <= result["reach"]) == result["met"]


if __name__ == "__main__":
    sys.stdout.write(page(sys.stdin, PAGE.read_text() if PAGE.exists() else ""))
