"""The driver behind `make demo`, on notebooks of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT

GROWS = """
import time
from IPython.display import HTML, display
handle = display({"text/plain": "The capital of"}, raw=True, display_id=True)
text = "The capital of"
for word in (" France", " is", " Paris."):
    text += word
    handle.update({"text/plain": text, "text/html": f"<b>{text}</b>"}, raw=True)
    time.sleep(0.05)
handle.update({"text/plain": text + "\\n20 tok/s"}, raw=True)
display(HTML("<p>only for pages</p>"))
"""


def drive(folder: Path, *sources: str) -> subprocess.CompletedProcess[str]:
    cells = [nbformat.v4.new_markdown_cell("# A title")] + [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "book.ipynb")
    command = [sys.executable, ROOT / "examples" / "demo.py", folder / "book.ipynb", "--out", folder / "build"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("good")
    return drive(folder, GROWS, "print('printed')\n6 * 7"), folder / "build"


def test_shows_source_output_and_times(good: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    run, _ = good
    assert run.returncode == 0, run.stderr
    assert "# A title" in run.stdout
    assert "In  │ print('printed')" in run.stdout
    # a display that grows is shown once, not once for each update
    assert run.stdout.count("The capital of France is Paris.") == 1
    assert "\n20 tok/s\n" in run.stdout
    assert "printed\n42\n" in run.stdout
    assert "IPython.core.display" not in run.stdout
    assert len(re.findall(r"└ \d+\.\d s", run.stdout)) == 2


def test_leaves_the_notebook_and_a_page(good: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, build = good
    outputs = nbformat.read(build / "book.ipynb", as_version=4).cells[2].outputs
    assert [output.get("text") or output.data["text/plain"] for output in outputs] == ["printed\n", "42"]
    assert "only for pages" in (build / "book.html").read_text()


@pytest.mark.browser
def test_the_page_asks_for_nothing(good: tuple[subprocess.CompletedProcess[str], Path], chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    page_url = (good[1] / "book.html").as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(page_url, wait_until="networkidle")
            assert page.get_by_text("only for pages", exact=True).is_visible()
        finally:
            browser.close()
    assert asked == [page_url]


def test_a_cell_that_fails_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    run = drive(tmp_path, "print('before')", "1 / 0", "print('never')")
    assert run.returncode == 1
    assert "before" in run.stdout
    assert "ZeroDivisionError" in run.stdout
    assert "A cell failed: ZeroDivisionError: division by zero" in run.stdout
    assert "print('never')" not in run.stdout
    assert (tmp_path / "build" / "book.html").exists()


@pytest.mark.network
def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """What `make demo` does: the committed notebook, a swarm of processes, one of them killed on the way."""
    command = [sys.executable, ROOT / "examples" / "demo.py", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "The capital of France is\n" in run.stdout
    assert " Paris." in run.stdout
    assert re.search(r"tok/s · first token .* · …\w+ \[0, 4\) → …\w+ \[4, 8\)", run.stdout)
    assert "killed process" in run.stdout
    assert "chain changed once on the way" in run.stdout
    executed = nbformat.read(tmp_path / "quickstart.ipynb", as_version=4)
    assert not any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", []))
    assert (tmp_path / "quickstart.html").exists()
