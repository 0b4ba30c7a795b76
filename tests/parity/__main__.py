"""Run the parity checks for all families (or those named), print the outcome, write the documentation."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from .checks import CHECKS, Family, check_family
from .families import LAYERS, names

HEADINGS = {
    "prefill_and_decode": "prefill, 8 steps",
    "left_padding": "left padding",
    "sampling": "sampling",
    "beam_search": "beams",
    "rollback": "rollback",
    "gradients": "gradient",
    "hidden_states": "hidden states",
}


def quiet() -> None:
    """No reports of transformers between the lines of the table."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("families", nargs="*", help="all, when left out")
    parser.add_argument(
        "--split", type=int, default=1, help="first block of the second span (default: %(default)s)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table, such as docs/architectures.md")
    options = parser.parse_args(arguments)
    quiet()
    results = []
    begun = time.monotonic()
    for name in options.families or names():
        with tempfile.TemporaryDirectory() as folder:
            result = check_family(name, options.split, Path(folder))
        results.append(result)
        print(f"{name:34} {line(result)}", flush=True)
    print(f"{summary(results)} ({time.monotonic() - begun:.0f} s)")
    if options.write:
        options.write.write_text(document(results, options.split))
    return 0 if all(result.equal or result.refused or result.not_run for result in results) else 1


def line(result: Family) -> str:
    """One family in one line."""
    if result.refused or result.not_run:
        return f"refused: {result.refused}" if result.refused else f"not run: {result.not_run}"
    cells = []
    for check in CHECKS:
        outcome = result.outcomes[check.__name__]
        if outcome.plain_cannot:
            cells.append(f"n/a ({outcome.problem})")
        elif outcome.difference is None:
            cells.append(outcome.problem)
        else:
            cells.append("=" if outcome.equal else f"{outcome.difference:.0e}")
    return " | ".join(cells)


def summary(results: Iterable[Family]) -> str:
    results = list(results)
    return (
        f"{sum(result.equal for result in results)} of {len(results)} equal in all that the plain model can do, "
        f"{sum(result.equal_in_all for result in results)} of them in every check; "
        f"{sum(bool(result.refused) for result in results)} refused, "
        f"{sum(bool(result.not_run) for result in results)} not run"
    )


def document(results: list[Family], split: int) -> str:
    """docs/architectures.md."""
    equal = [result for result in results if result.equal]
    different = [result for result in results if result.outcomes and not result.equal]
    lines = [
        "# Model families",
        "",
        "<!-- Written by `python -m tests.parity --write docs/architectures.md`; changes by hand are lost. -->",
        "",
        f"Every decoder-only family of transformers {transformers.__version__}, as a tiny model with random "
        f"weights, cut into the blocks [0, {split}) and [{split}, {LAYERS}) and run by two spans in one process "
        "behind the client's model class, compared with the plain model in float32: logits of a prefill and 8 "
        "decode steps, a batch of two with left padding, sampling with a seed, beam search with 3 beams, a "
        "rollback, gradients with respect to the input, and the hidden states of every layer. Tokens must be the "
        "same and numbers within 1e-5 (`torch.allclose`).",
        "",
        f"**{len(equal)} families and variants are equal to the plain model** "
        f"({sum(result.equal_in_all for result in equal)} in every check; for the others, what is marked n/a is "
        "something that the plain model cannot do either). `family#variant` is a family with other settings.",
        "",
        f"| family | {' | '.join(HEADINGS[check.__name__] for check in CHECKS)} |",
        f"|---|{'---|' * len(CHECKS)}",
    ]
    notes: list[str] = []
    for result in [*equal, *different]:
        cells = []
        for check in CHECKS:
            outcome = result.outcomes[check.__name__]
            if outcome.equal:
                cells.append("equal")
                continue
            notes.append(
                f"`{result.name}`, {HEADINGS[check.__name__]}: "
                + (f"plain transformers: {outcome.problem}" if outcome.plain_cannot else _wrong(outcome))
            )
            cells.append(f"{'n/a' if outcome.plain_cannot else '**differs**'} ({len(notes)})")
        lines.append(f"| {result.name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    lines += [
        "## Refused",
        "",
        "These cannot be split so that the parts compute what the whole does. They are recognised by running the "
        "model's own forward over placeholders (`nbrunner/blocks/examine.py`) and refused by name before any "
        "weight is read.",
        "",
        "| family | why |",
        "|---|---|",
        *(f"| {result.name} | {result.refused} |" for result in results if result.refused),
        "",
    ]
    skipped = [result for result in results if result.not_run]
    if skipped:
        lines += [
            "## Not run",
            "",
            "No tiny model of these could be made here, so nothing is known about them.",
            "",
        ]
        lines += ["| family | why |", "|---|---|", *(f"| {one.name} | {one.not_run} |" for one in skipped), ""]
    return "\n".join(lines)


def _wrong(outcome: object) -> str:
    difference = getattr(outcome, "difference", None)
    return f"differs by {difference:.1e}" if difference is not None else str(getattr(outcome, "problem", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
