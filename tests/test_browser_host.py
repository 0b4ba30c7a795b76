"""The card of a hosted server in JupyterLab and Chromium: it follows, its buttons work, it stays at the end."""

from __future__ import annotations

import pytest
from lab_driver import SCREENS, Lab, open_lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

CELLS = ["%load_ext nbrunner", "%host tiny --blocks 2:6 --new-swarm --threads 1 --for 1h -o server"]


@pytest.fixture
def lab(tmp_path, chromium):
    with open_lab(tmp_path, chromium) as lab:
        yield lab


def press(lab: Lab, name: str, words: str) -> None:
    lab.page.wait_for_selector(f"button:has-text('{name}'):not([disabled])", timeout=30_000).click()
    lab.page.wait_for_selector(f".nbr-host-state:has-text('{words}')", timeout=30_000)


def test_the_card_follows_its_buttons_work_and_it_stays(lab):
    write_notebook(lab.server.root / "host.ipynb", CELLS)
    lab.open("host.ipynb")
    lab.run_all()
    lab.page.wait_for_selector(".nbr-host-state:has-text('● online')", timeout=60_000)
    lab.wait_done(20)
    assert "[2, 6) of 8" in lab.outputs()[1]
    assert lab.page.get_attribute(".nbr-ruler", "aria-label") == "blocks 2 to 5 of 8"

    lab.page.click(".nbr-log summary")
    lab.screens("host", height=900)
    lab.page.click(".nbr-log summary")
    lab.picture("host", lab.page.query_selector_all(".jp-CodeCell")[1])

    press(lab, "Pause", "paused")
    assert lab.page.query_selector("button:has-text('Pause')").is_disabled()
    press(lab, "Resume", "● online")
    press(lab, "Drain", "ended")
    lab.page.wait_for_selector("button:has-text('Stop')", state="detached", timeout=30_000)
    lab.page.screenshot(path=SCREENS / "host-ended.png")

    assert lab.errors == []

    def look(page):
        page.wait_for_selector(".nbr-host-state:has-text('■ ended')", timeout=30_000)
        assert page.get_attribute(".nbr-ruler", "aria-label") == "blocks 2 to 5 of 8"
        assert "log, " in page.inner_text(".nbr-log summary")

    saved = lab.seen_again("host.ipynb", look)
    assert "■ ended" in str(saved.cells[1].outputs)
