"""Runs the example notebooks and keeps their outputs in them, so that they can be read without being run.

`make notebooks`. What belongs to this machine or to this run only is taken out: invites, times of cells, states of
widgets, outputs that show nothing. A path of this machine in an output is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
INVITE = re.compile(r"nbr1-[\w-]{40,}")
MACHINE = re.compile(r"/(?:home|root|Users|tmp|work|var|mnt|opt)/[\w.-]+|/ip4/(?!127\.|192\.0\.2\.)\d[\d.]*")
"""Paths, and addresses other than of loopback and of documents (RFC 5737)."""
ADDRESS = re.compile(r"/ip4/(?!127\.)\d[\d.]*|/ip6/(?!::1/)[\da-f:]+")
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}


def digest(book: nbformat.NotebookNode) -> str:
    """Names what its code cells say, so that a test sees when kept outputs are of other code."""
    code = "\0".join(cell.source for cell in book.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def executed(path: Path, *, timeout: int) -> nbformat.NotebookNode:
    """The notebook, run from top to bottom in a fresh kernel, away from the files of this project."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            book,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute()
    return book


def kept(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is committed."""
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # random ones would change with every edit
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [_tidy(output) for output in cell.outputs if not _is_empty(output)]
    book.metadata = {**METADATA, "nbrunner": {"outputs_of": digest(book)}}
    return book


def foreign(book: nbformat.NotebookNode) -> list[str]:
    """What in the outputs belongs to a machine."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return sorted(
        {found for output in outputs for found in MACHINE.findall(_text(output)) + INVITE.findall(_text(output))}
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(map(_text, value.values()))
    return "\n".join(map(_text, value)) if isinstance(value, list) else ""


def _tidy(value: Any) -> Any:
    """Without invites (they let nobody in when their swarm is gone, but who knows that) and addresses."""
    if isinstance(value, str):
        return ADDRESS.sub("/ip4/192.0.2.2", INVITE.sub("nbr1-…", value))
    if isinstance(value, dict):
        return nbformat.from_dict({name: _tidy(one) for name, one in value.items()})
    return [_tidy(one) for one in value] if isinstance(value, list) else value


def _is_empty(output: Any) -> bool:
    """Whether it shows nothing, as what is left of a button that is gone."""
    data = output.get("data")
    return data is not None and not any(re.sub(r"<[^>]*>", "", str(one)).strip() for one in data.values())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--timeout", type=int, default=120, help="seconds that one cell may take (default: 120)")
    options = parser.parse_args()
    wrong = 0
    for path in options.notebooks:
        book = kept(executed(path, timeout=options.timeout))
        if found := foreign(book):
            print(f"{path.name}: not kept, its outputs name this machine: {', '.join(found)}")
            wrong += 1
            continue
        nbformat.validate(book)
        nbformat.write(book, path)
        print(f"{path.name}: kept, {path.stat().st_size / 1e3:.0f} kB")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
