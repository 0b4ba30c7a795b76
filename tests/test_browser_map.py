"""The live map in JupyterLab: it changes when a server is killed, freezes to an image, and fits narrow pages."""

from __future__ import annotations

import pytest
from lab_driver import SCREENS, Lab, open_lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

CELLS = [
    "%load_ext nbrunner",
    "%swarm start --servers 0:4 4:8 4:8 -o swarm",
    "%%generate -n 12 --waterfall -o out\nThe capital of France is",
    "%swarm map",
    "swarm.servers[0].kill()",
    "%swarm map stop",
]
GENERATE, MAP, KILL, STOP = range(2, 6)


@pytest.fixture
def book(tmp_path, chromium):
    with open_lab(tmp_path, chromium) as lab:
        write_notebook(lab.server.root / "map.ipynb", CELLS)
        lab.open("map.ipynb")
        yield lab
        lab.shut_kernel_down()


def screenshots(lab: Lab, name: str, cells: tuple[int, ...]) -> None:
    SCREENS.mkdir(parents=True, exist_ok=True)
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        for width in (1300, 700):
            lab.page.set_viewport_size({"width": width, "height": 1400})
            for index in cells:
                cell = lab.page.query_selector_all(".jp-CodeCell")[index]
                cell.scroll_into_view_if_needed()
                overflow = cell.evaluate(
                    "cell => { const svg = cell.querySelector('.jp-OutputArea-output :is(svg.nbp, img)');"
                    " return svg.getBoundingClientRect().right - cell.getBoundingClientRect().right }"
                )
                assert overflow <= 1, f"the picture sticks out by {overflow} px at {width}"
                picture = SCREENS / f"{name}-{index}-{theme.split()[1].lower()}-{width}.png"
                lab.page.wait_for_timeout(50)
                picture.write_bytes(lab.page.screenshot())
    lab.theme("JupyterLab Light")


def test_the_map_changes_when_a_server_is_killed(book):
    lab = book
    for index in range(MAP + 1):
        lab.run_cell(index)
    live = ".jp-CodeCell svg.nbp"
    lab.page.wait_for_selector(f"{live} path.nbp-route-line", timeout=120_000, state="attached")
    lab.wait_done(60)
    assert "Paris" in lab.outputs()[GENERATE]
    assert "costs most" in lab.outputs()[GENERATE]
    moment = "() => document.querySelector('.nbr-map svg.nbp text[text-anchor=end]').textContent"
    first = lab.page.evaluate(moment)
    lab.page.wait_for_function(f"first => ({moment})() !== first", arg=first, timeout=20_000)
    screenshots(lab, "map-live", (GENERATE, MAP))
    lab.page.set_viewport_size({"width": 1200, "height": 1400})
    lab.picture("map", lab.page.locator(".nbr-map-wide svg"))  # drawn anew each second
    lab.picture("generate", lab.page.query_selector_all(".jp-CodeCell")[GENERATE])

    lab.run_cell(KILL)
    lab.page.wait_for_function(
        "() => document.querySelector('.nbr-map svg.nbp')?.textContent.includes('✖ nobody [0, 4)')", timeout=30_000
    )
    lost = lab.page.inner_text(".nbr-map")
    assert "✖ unreachable" in lost
    assert "nbrunner serve tiny --blocks 0:4 --invite INVITE" in lost
    assert "No route can be made now." in lost
    assert lab.page.query_selector(".nbr-map path.nbp-route-line") is None
    screenshots(lab, "map-lost", (MAP,))

    lab.page.click("button:has-text('Stop')")
    lab.page.wait_for_selector("text=%swarm map shows it live again", timeout=20_000)
    lab.page.wait_for_selector(".jp-RenderedSVG img")
    assert lab.page.query_selector(".nbr-map") is None
    screenshots(lab, "map-frozen", (MAP,))

    assert lab.errors == []
    # a saved picture is an image, and a table in the notebook itself
    saved = lab.seen_again("map.ipynb", lambda page: page.wait_for_selector("text=%swarm map shows it live again"))
    assert lab.page.query_selector_all(".jp-RenderedSVG img")
    data = [one.data for one in saved.cells[MAP].outputs if "image/svg+xml" in one.get("data", {})]
    assert len(data) == 1
    assert set(data[0]) == {"image/svg+xml", "text/plain"}
    assert "nobody serves blocks [0, 4)" in data[0]["text/plain"]
