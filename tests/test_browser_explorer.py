"""The explorer in JupyterLab and Chromium: clicked, driven by keys, patched, compared, saved and seen again."""

from __future__ import annotations

import pytest
from helpers import ROOT, wait_until
from lab_driver import Lab, LabServer, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

SCREENS = ROOT / "build" / "screens"
SETUP = "%load_ext nbrunner\nimport sys\nsys.path.insert(0, {tests!r})"
COMPARE = "%%explore\nThe capital of France is\n---\nThe capital of Spain is\n"
BIG = """import numpy as np
from test_explorer import made_up
from nbrunner.widgets.explorer import Explorer
Explorer([made_up(65, 128)], ["128 tokens × 65 states"])"""
ASK = "print('selection', explorer.selection, 'patched', explorer.patched is not None)"
PAGE = ".nbx[data-started]"


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
    """The notebook, run, and what the page's console said that was wrong."""
    errors: list[str] = []
    lab.page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    lab.page.on("pageerror", lambda error: errors.append(str(error)))
    write_notebook(lab.server.root / "look.ipynb", [SETUP.format(tests=str(ROOT / "tests")), COMPARE, BIG, ASK])
    lab.open("look.ipynb")
    try:
        lab.run_all()
        lab.wait_done(150)
        lab.page.wait_for_selector(f"{PAGE}[data-live=true]", timeout=15_000)
        yield lab, errors
    finally:
        lab.shut_kernel_down()


def test_the_explorer_in_a_browser(book):
    lab, errors = book
    page = lab.page
    root = page.locator(PAGE).first
    status = root.locator(".nbx-status")

    def cell(map_, row_from_top, column, rows=9, columns=6):
        box = root.locator(".nbx-grid").nth(map_).bounding_box()
        x = (column + 0.5) * box["width"] / columns
        root.locator(".nbx-grid").nth(map_).click(
            position={"x": x, "y": (row_from_top + 0.5) * box["height"] / rows}
        )

    assert root.locator(".nbx-grid").count() == 3  # two prompts and their difference
    assert "differ at position 4" in root.locator(".nbx-note").inner_text()
    assert "blocks [0, " in root.locator(".nbx-servers span").first.get_attribute("title")

    cell(0, 0, 5)  # mouse
    assert "Pinned: layer 8, token 5" in status.inner_text()
    assert "Paris" in root.locator(".nbx-details .nbx-bars").inner_text()
    assert root.locator(".nbx-details .nbx-curve").count() == 2
    assert root.locator(".nbx-pin").count() >= 1

    page.keyboard.press("Escape")  # keyboard
    assert "Nothing is pinned" in status.inner_text()
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert status.inner_text().startswith("layer 6, token 4 ␣France")
    page.keyboard.press("Enter")
    assert status.inner_text().startswith("Pinned: layer 6, token 4")

    for name in ("entropy", "rank", "norm", "cos_last", "difference", "kl"):
        root.locator("select").select_option(name)
        assert root.locator(".nbx-grid").count() == 3
    root.locator("select").select_option("probability")
    root.locator(".nbx-tools input").first.press_sequentially(" Paris")
    root.locator(".nbx-tools input").first.press("Enter")
    _wait(lab, lambda: "are measured" in status.inner_text(), root)

    cell(1, 6, 4)  # patch: Spain's token at state 2, by keys
    page.keyboard.press("s")
    cell(0, 6, 4)
    page.keyboard.press("t")
    page.keyboard.press("r")
    page.wait_for_selector(".nbx-results table", timeout=20_000)
    assert "Madrid" in root.locator(".nbx-results table").inner_text()
    assert "cells have another best token" in status.inner_text()
    root.get_by_role("button", name="Continue the text").click()
    page.wait_for_selector(".nbx-steered", timeout=20_000)
    assert root.locator(".nbx-error").inner_text() == ""
    assert "Edit.set(2, value, 4)" in root.locator(".nbx-runs pre").first.text_content()

    root.locator(".nbx-grid").first.hover(position={"x": 20, "y": 20})
    assert "computed by" in root.locator(".nbx-tip").inner_text()

    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.activeCellIndex = 3")
    lab.command("notebook:run-cell")
    wait_until(lambda: _asked(lab), 20, what="Python knows")
    outputs = lab.outputs()
    assert "'layer': 6, 'position': 4" in outputs[-1]
    assert "patched True" in outputs[-1]

    SCREENS.mkdir(parents=True, exist_ok=True)
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        _take_pictures(page, theme.lower())
    big = page.locator(PAGE).nth(1)
    big.locator(".nbx-grid").click(position={"x": 30, "y": 30})
    print(
        f"explorer in a browser, 128 × 65 × top-5: drawn in {big.get_attribute('data-first')} ms, first picture "
        f"{big.get_attribute('data-started')} ms after its script began, "
        f"click to detail {big.get_attribute('data-detail')} ms"
    )
    assert errors == []
    assert lab.external == []

    saved = lab.save("look.ipynb")
    assert "vnd.jupyter.widget-view" not in str(saved.cells)
    page.set_viewport_size({"width": 1300, "height": 1000})
    lab.shut_kernel_down()
    lab.open("look.ipynb")  # a fresh kernel
    page.wait_for_selector(PAGE, timeout=30_000)
    root = page.locator(PAGE).first
    cell(0, 0, 5)
    assert "Paris" in root.locator(".nbx-details .nbx-bars").inner_text()
    assert "needs the kernel" in root.locator(".nbx-offline").text_content()
    assert "model not found" not in page.inner_text("body")

    other = page.context.browser.new_page()  # no kernel, no Lab: the notebook converted to a page
    requests: list[str] = []
    other.on("request", lambda request: requests.append(request.url))
    (lab.server.root / "look.html").write_text(_converted(saved), "utf-8")
    other.goto((lab.server.root / "look.html").as_uri())
    other.wait_for_selector(PAGE, timeout=30_000)
    assert "Paris" in other.locator(PAGE).first.locator(".nbx-details").inner_text()
    other.close()
    assert all(one.startswith(("file:", "data:", "blob:")) for one in requests)
    assert lab.external == []


def _take_pictures(page, name):
    for width in (1300, 700):
        page.set_viewport_size({"width": width, "height": 1300})
        page.wait_for_timeout(150)  # the maps are drawn again for the new width
        for number, one in enumerate(page.query_selector_all(PAGE)):
            one.scroll_into_view_if_needed()
            (SCREENS / f"explorer-{number}-{name}-{width}.png").write_bytes(one.screenshot())


def _wait(lab, condition, root):
    for _ in range(200):
        if condition():
            return
        lab.page.wait_for_timeout(50)
    words = {name: root.locator(f".nbx-{name}").inner_text() for name in ("status", "error")}
    pytest.fail(f"the page says {words}, live {root.get_attribute('data-live')}")


def _asked(lab):
    lab.page.wait_for_timeout(50)
    return "patched True" in lab.outputs()[-1]


def _converted(notebook):
    """What nbconvert makes of the outputs, without the style of its page (which it takes from elsewhere)."""
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic").from_notebook_node(notebook)[0]
