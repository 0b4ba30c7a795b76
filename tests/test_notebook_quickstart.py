"""``examples/quickstart.ipynb`` from top to bottom, as a reader would run it."""

from __future__ import annotations

import time

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

QUICKSTART = ROOT / "examples" / "quickstart.ipynb"


def shown(cell) -> str:
    """What a code cell shows, as text."""
    return "\n".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in cell.outputs)


@pytest.mark.network
@pytest.mark.timeout(400)
def test_it_runs_from_top_to_bottom(tmp_path):
    book = nbformat.read(QUICKSTART, as_version=4)
    client = NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    began = time.monotonic()
    client.execute()
    assert time.monotonic() - began < 90
    cells = {cell.source: shown(cell) for cell in book.cells if cell.cell_type == "code"}

    def of(beginning: str) -> str:
        return next(text for source, text in cells.items() if beginning in source)

    first = of("The capital of France")
    assert "starting a swarm of 2 servers" in first
    assert "Paris" in first
    assert "[0, 4) → …" in first
    assert "Tokyo" in of("{{ country }}")
    assert "● online" in of("%swarm status")
    assert "goes through 2 servers" in of("%swarm chain")
    killed = of("victim.kill()")
    assert "killed process" in killed
    assert "chain changed once" in of("-b -n 60")
    assert of("again.ids == result.ids") == "True"
    assert "Explorer: 'The capital of France is', 9 layers × 6 tokens" in of("%explore")
    assert "Rome" in of("The capital of Italy")
    assert "Madrid" in of("The capital of Spain")
    assert "Brasilia" in of("What is the capital of Brazil")
    assert "Athens" in of("import nbrunner\n")
    assert "True" in of("backward()")
    assert "widget-view" not in str(book.cells)
