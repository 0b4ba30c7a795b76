"""The notebooks of ``examples/`` as they are committed: to be read without being run, and of no machine."""

from __future__ import annotations

import sys

import nbformat
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import keep_outputs

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PICTURES = {  # what the static twins of widgets are known by
    "quickstart": ["class='nbx'", "<caption>"],
    "look_inside": ["class='nbx'", "<caption>Logit lens"],
    "host_blocks": ["nbr-host", "nbr-ruler"],
    "swarm_with_friends": ["nbr-host", "<caption>"],
    "finetune_facts": ["nbr-tune-done", "<caption>Answers", "<caption>Steps"],
    "classify": ["nbr-tune-done", "<caption>Answers", "<caption>Steps"],
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def kept(request):
    return request.param, nbformat.read(request.param, as_version=4)


def test_they_have_the_outputs_of_their_code(kept):
    path, book = kept
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert book.metadata.nbrunner.outputs_of == keep_outputs.digest(book), (
        f"make notebooks: {path.name} has changed"
    )
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 4
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    nbformat.validate(book)


def test_they_name_no_machine_and_need_no_kernel(kept):
    path, book = kept
    assert keep_outputs.foreign(book) == []
    text = path.read_text("utf-8")
    assert "widget-view" not in text
    assert "widget-state" not in text
    assert path.stat().st_size < 400_000
    html = "".join(
        one.get("data", {}).get("text/html", "")
        for cell in book.cells
        for one in (cell.outputs if cell.cell_type == "code" else [])
    )
    for words in PICTURES.get(path.stem, []):
        assert words in html, words


def test_they_can_be_opened_where_they_run(kept):
    path, book = kept
    first = book.cells[0].source
    assert f"colab.research.google.com/github/nbrunner/nbrunner/blob/main/examples/{path.name}" in first
    if path.stem in ("quickstart", "look_inside", "custom_paths"):  # Binder hosts nothing
        assert f"mybinder.org/v2/gh/nbrunner/nbrunner/main?urlpath=lab/tree/examples/{path.name}" in first


def test_what_is_taken_out():
    said = "join nbr1-" + "aZ9_-" * 20 + " at /ip4/10.1.2.3/tcp/1 or /ip4/127.0.0.1/tcp/1 or /ip6/fe80::1/tcp/1"
    output = nbformat.v4.new_output("stream", text=said)
    empty = nbformat.v4.new_output("display_data", {"text/plain": "", "text/html": "<div></div>"})
    cell = nbformat.v4.new_code_cell("1", outputs=[output, empty], execution_count=1)
    cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    book = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    assert keep_outputs.foreign(book) != []
    (only,) = keep_outputs.kept(book).cells
    assert [one.text for one in only.outputs] == [
        "join nbr1-… at /ip4/192.0.2.2/tcp/1 or /ip4/127.0.0.1/tcp/1 or /ip4/192.0.2.2/tcp/1"
    ]
    assert (only.metadata, "widgets" in book.metadata) == ({}, False)
    assert keep_outputs.foreign(book) == []


@pytest.mark.parametrize("words", ["/home/me/x.py", "in /tmp/abc", "/ip4/10.0.0.7/tcp/1"])
def test_what_must_not_be_kept(words):
    output = nbformat.v4.new_output("stream", text=f"it is {words}")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    assert len(keep_outputs.foreign(book)) == 1
