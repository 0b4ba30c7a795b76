"""The notebooks that look inside and make paths, from top to bottom, offline, as a reader would run them."""

from __future__ import annotations

import re
import time

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

EXPECTED = {
    # the capital appears in the last state; the country moves the answer early, the last token late
    "look_inside": [
        r"state 5: .*P\(' Paris'\) = 0\.000",
        r"state 8: ' Paris' +P\(' Paris'\) = 0\.9",
        r"\n +0 +0\.9\d+ +0\.000\n",
        r"\n +8 +0\.000 +0\.9\d+\n",
        r"1\.0 × \(Spain - France\): ' Madrid",
    ],
    "custom_paths": [
        r"8 blocks:  Paris",
        r"without block 7: ' French",
        r"computes blocks 6 to 7",
        r"after:  ' Rome",
        r"unchanged: ' Paris",
        r"at once: True",
        r"block 8 does not exist",
    ],
}


def shown(book: nbformat.NotebookNode) -> str:
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") + "\n" for one in outputs)


@pytest.mark.network
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    began = time.monotonic()
    NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert time.monotonic() - began < 90
    for words in EXPECTED[name]:
        assert re.search(words, shown(book)), words


@pytest.mark.parametrize("name", EXPECTED)
def test_its_kept_outputs_say_the_same(name):
    book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    for words in EXPECTED[name]:
        assert re.search(words, shown(book)), words
