"""The notebook in which three teach one adapter, from top to bottom, offline."""

from __future__ import annotations

import re

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

LEARNED = re.compile(r"(Rome|Oslo|Cairo)\. +(\d+\.\d+)% → +(\d+\.\d+)%")


def shown(book: nbformat.NotebookNode) -> str:
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") + "\n" for one in outputs)


def check(text: str) -> None:
    assert "done after 30 steps" in text
    for who in (r"us \(you\)", "Grace", "Alan"):
        assert re.search(rf"{who} +30 steps, +30 samples; .*33% of the last average", text), who
    learned = LEARNED.findall(text)
    assert [answer for answer, _, _ in learned] == ["Rome", "Oslo", "Cairo"]
    for answer, before, after in learned:  # ours, and those that only the others have taught
        assert float(before) < 1.0, answer
        assert float(after) > 30.0, answer


@pytest.mark.network
@pytest.mark.timeout(300)
def test_it_runs_from_top_to_bottom(tmp_path):
    book = nbformat.read(ROOT / "examples" / "finetune_together.ipynb", as_version=4)
    NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    check(shown(book))


def test_what_is_kept_in_it_says_the_same():
    check(shown(nbformat.read(ROOT / "examples" / "finetune_together.ipynb", as_version=4)))
