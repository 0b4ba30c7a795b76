"""The explorer in JupyterLab and Chromium: clicked, driven by keys, patched, compared, saved and seen again."""

from __future__ import annotations

import pytest
from helpers import ROOT, wait_until
from lab_driver import SCREENS, open_lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

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
    with open_lab(tmp_path_factory.mktemp("lab"), chromium) as lab:
        yield lab


@pytest.fixture
def book(lab):
    """The notebook, run."""
    write_notebook(lab.server.root / "look.ipynb", [SETUP.format(tests=str(ROOT / "tests")), COMPARE, BIG, ASK])
    lab.open("look.ipynb")
    try:
        lab.run_all()
        lab.wait_done(150)
        lab.page.wait_for_selector(f"{PAGE}[data-live=true]", timeout=15_000)
        yield lab
    finally:
        lab.shut_kernel_down()


def test_the_explorer_in_a_browser(book):
    lab = book
    page = lab.page
    root = page.locator(PAGE).first
    status = root.locator(".nbx-status")

    def cell(map_, row_from_top, column, rows=9, columns=6):
        box = root.locator(".nbx-grid").nth(map_).bounding_box()
        x = (column + 0.5) * box["width"] / columns
        root.locator(".nbx-grid").nth(map_).click(
            position={"x": x, "y": (row_from_top + 0.5) * box["height"] / rows}
        )

    cell(0, 1, 5)
    page.set_viewport_size({"width": 1200, "height": 1400})
    page.wait_for_timeout(300)
    lab.picture("explorer", root)
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 1200, "height": 1000})
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
    wait_until(lambda: lab.holds("explorer.state['statistic'] == 'kl'"), 10, what="Python knows the statistic")
    root.locator("select").select_option("probability")
    root.locator(".nbx-tools input").first.press_sequentially(" Paris")
    root.locator(".nbx-tools input").first.press("Enter")
    _wait(lab, lambda: "are measured" in status.inner_text(), root)

    cell(1, 1, 5)  # patch by mouse: the last token near the end
    root.locator(".nbx-runs > summary").click()
    root.get_by_role("button", name="Source", exact=True).click()
    cell(0, 1, 5)
    root.get_by_role("button", name="Target", exact=True).click()
    root.get_by_role("button", name="Run the patch").click()
    page.wait_for_selector(".nbx-results table", timeout=20_000)
    assert "Madrid" in root.locator(".nbx-results table").inner_text()
    root.get_by_role("button", name="Back to the prompts").click()
    assert root.locator(".nbx-results table").count() == 0
    assert "differ at position 4" in root.locator(".nbx-note").inner_text()

    cell(1, 6, 4)  # and by keys: Spain's token at state 2
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
    codes = [one.text_content() for one in root.locator("pre").all()]  # each click's twin runs, and does the same
    assert len(codes) == 3
    for code in codes:
        lab.execute(code)
    assert "Edit.set(2, explorer.traces[1].state(2, 4), 4)" in codes[1]
    lab.execute("assert after.token_text(after.top_ids[-1, -1, 0]) == ' Madrid'")
    lab.execute("assert (after.top_ids == explorer.patched.top_ids).all()")
    lab.execute("assert run.tokenizer.decode(out[0, len(run.ids):]) == explorer.state['steered']['steered']")

    lab.execute("explorer.select(3, 2)")  # Python chooses, the page follows
    _wait(lab, lambda: status.inner_text().startswith("layer 3, token 2"), root)

    root.locator(".nbx-grid").first.hover(position={"x": 20, "y": 20})
    assert "computed by" in root.locator(".nbx-tip").inner_text()

    lab.run_cell(3)
    wait_until(lambda: _asked(lab), 20, what="Python knows")
    outputs = lab.outputs()
    assert "'layer': 6, 'position': 4" in outputs[-1]
    assert "patched True" in outputs[-1]

    SCREENS.mkdir(parents=True, exist_ok=True)
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        _take_pictures(page, theme.lower())
    lab.theme("JupyterLab Light")
    big = page.locator(PAGE).nth(1)
    big.locator(".nbx-grid").click(position={"x": 30, "y": 30})
    print(
        f"explorer in a browser, 128 × 65 × top-5: drawn in {big.get_attribute('data-first')} ms, first picture "
        f"{big.get_attribute('data-started')} ms after its script began, "
        f"click to detail {big.get_attribute('data-detail')} ms"
    )
    lab.execute("explorer.to_html('again.html')")  # shown again it begins with what was chosen
    other = page.context.browser.new_page()
    other.goto((lab.server.root / "again.html").as_uri())
    other.wait_for_selector(PAGE)
    assert other.locator(".nbx-pin b").all_inner_texts().count("S") == 1
    assert "Pinned: layer 3, token 2" in other.locator(".nbx-details h4").first.inner_text()
    other.close()
    assert lab.errors == []
    assert lab.external == []

    def look(page):
        page.set_viewport_size({"width": 1300, "height": 1000})
        page.wait_for_selector(PAGE, timeout=30_000)
        page.wait_for_timeout(300)  # the maps are drawn again for the new width
        again = page.locator(PAGE).first
        grid = again.locator(".nbx-grid").first
        box = grid.bounding_box()
        grid.click(position={"x": 5.5 * box["width"] / 6, "y": 0.5 * box["height"] / 9})
        assert "Paris" in again.locator(".nbx-details .nbx-bars").inner_text()
        assert "needs the kernel" in again.locator(".nbx-offline").text_content()

    lab.seen_again("look.ipynb", look)


def _take_pictures(page, name):
    for width in (1300, 700):
        page.set_viewport_size({"width": width, "height": 2600})  # all of it, without scrolling
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
