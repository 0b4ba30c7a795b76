"""The notebooks about hosting, from top to bottom, offline, as a reader would run them."""

from __future__ import annotations

import time

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

EXPECTED = {
    "host_blocks": ["● online", "[4, 8)", "Paris", "peers served: 1 tokens: True", "paused\nonline", "ended []"],
    "swarm_with_friends": ["let a friend use it for an hour", "(4, 8)", "not host blocks", "Rome", "ended ended"],
}


def shown(book: nbformat.NotebookNode) -> str:
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in outputs)


@pytest.mark.network
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    began = time.monotonic()
    client = NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert time.monotonic() - began < 90
    text = shown(book)
    for words in EXPECTED[name]:
        assert words in text
    assert "widget-view" not in str(book.cells)  # buttons are gone, the card has stayed


@pytest.mark.parametrize("name", EXPECTED)
def test_its_kept_outputs_say_the_same(name):
    text = shown(nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4))
    for words in EXPECTED[name]:
        assert words in text
