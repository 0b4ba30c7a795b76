"""One notebook in JupyterLab and Chromium: text streams, Stop works, tables show, nothing is fetched elsewhere."""

from __future__ import annotations

import pytest
from lab_driver import Lab, LabServer, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(400)]

CELLS = [
    "%load_ext nbrunner",
    "%swarm start --servers 0:4 4:8 4:8 -o swarm",
    "%%generate -n 900 --min-new-tokens 900 -o stopped\nOnce upon a time",
    "%%generate -n 12 -o out\nThe capital of France is",
    "out",
    "%swarm status",
    "%swarm chain",
    "%%chat\nWhat is the capital of Italy?",
    "%chat history",
    "swarm.servers[0].kill()",
    "%swarm doctor",
    "%swarm status",
    "%%generate -n x\nhello",
]
STREAMS, CAPITAL, OBJECT, STATUS, CHAIN, CHAT, HISTORY, _, DOCTOR, BROKEN, MISTAKE = range(2, 13)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    server = LabServer(tmp_path_factory.mktemp("lab"))
    try:
        lab = Lab(server, chromium)
        try:
            yield lab
        finally:
            lab.close()
    finally:
        server.close()


@pytest.fixture
def book(lab):
    """The notebook, open, with a kernel that ends with the test."""
    write_notebook(lab.server.root / "book.ipynb", CELLS)
    lab.open("book.ipynb")
    yield lab
    lab.shut_kernel_down()


def test_a_notebook_in_a_browser(book, tmp_path):
    lab = book
    lab.run_all()

    stop = lab.page.wait_for_selector("button:has-text('Stop')", timeout=120_000)
    lab.page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-Cell-outputArea')].some(e => e.innerText.includes('tok/s'))"
    )
    (tmp_path / "streaming.png").write_bytes(lab.page.screenshot())
    assert stop.get_attribute("title")
    stop.click()
    lab.page.wait_for_selector("text=stopped after", timeout=10_000)
    lab.wait_done(120)

    outputs = lab.outputs()
    assert "stopped after" in outputs[STREAMS]
    assert "Paris" in outputs[CAPITAL]
    assert "[0, 4) → …" in outputs[CAPITAL]
    assert lab.page.query_selector_all("button:has-text('Stop')") == []
    assert "tokens" in outputs[OBJECT]
    assert "● online" in outputs[STATUS]
    assert "The next request" in outputs[CHAIN]
    assert "Rome" in outputs[CHAT]
    assert "What is the capital of Italy?" in outputs[HISTORY]
    assert "✖ problem" in outputs[DOCTOR]
    assert "nobody serves blocks [0, 4)" in outputs[BROKEN]
    assert outputs[MISTAKE].strip().startswith("UsageError")
    assert len(outputs[MISTAKE].strip().splitlines()) == 1

    tables = lab.page.query_selector_all(".nbr table")
    assert all(table.query_selector("caption") and table.query_selector("th[scope=col]") for table in tables)
    assert len(tables) >= 3

    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        for name, width in (("wide", 1200), ("narrow", 640)):
            lab.page.set_viewport_size({"width": width, "height": 1400})
            for index, cell in enumerate(lab.page.query_selector_all(".jp-CodeCell")):
                if index in (CAPITAL, OBJECT, STATUS, CHAIN, HISTORY, DOCTOR, BROKEN):
                    cell.scroll_into_view_if_needed()
                    picture = tmp_path / f"{theme.split()[1].lower()}-{name}-{index}.png"
                    picture.write_bytes(cell.screenshot())
    print("screenshots:", tmp_path)

    saved = lab.save("book.ipynb")
    text = [output for output in saved.cells[CAPITAL].outputs if output.get("metadata", {}).get("nbrunner")]
    assert len(text) == 1
    assert "Paris" in text[0]["data"]["text/plain"]
    assert "vnd.jupyter.widget-view" not in str(saved.cells)
    assert lab.external == []
