"""The card of a hosted server in JupyterLab and Chromium: it follows, its buttons work, it stays at the end."""

from __future__ import annotations

import pytest
from helpers import ROOT
from lab_driver import Lab, LabServer, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

SCREENS = ROOT / "build" / "screens"
CELLS = ["%load_ext nbrunner", "%host tiny --blocks 2:6 --new-swarm --threads 1 --for 1h -o server"]


@pytest.fixture
def lab(tmp_path, chromium):
    server = LabServer(tmp_path)
    try:
        lab = Lab(server, chromium)
        try:
            yield lab
        finally:
            lab.close()
    finally:
        server.close()


def press(lab: Lab, name: str, words: str) -> None:
    lab.page.wait_for_selector(f"button:has-text('{name}'):not([disabled])", timeout=15_000).click()
    lab.page.wait_for_selector(f".nbr-host-state:has-text('{words}')", timeout=30_000)


def test_the_card_follows_its_buttons_work_and_it_stays(lab):
    write_notebook(lab.server.root / "host.ipynb", CELLS)
    lab.open("host.ipynb")
    errors: list[str] = []
    lab.page.on("pageerror", lambda error: errors.append(str(error)))
    lab.run_all()
    lab.page.wait_for_selector(".nbr-host-state:has-text('● online')", timeout=60_000)
    lab.wait_done(20)
    assert "[2, 6) of 8" in lab.outputs()[1]
    assert lab.page.get_attribute(".nbr-ruler", "aria-label") == "blocks 2 to 5 of 8"

    lab.page.click(".nbr-log summary")
    SCREENS.mkdir(parents=True, exist_ok=True)
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        for width in (1300, 700):
            lab.page.set_viewport_size({"width": width, "height": 900})
            lab.page.screenshot(path=SCREENS / f"host-{theme.split()[1].lower()}-{width}.png")

    press(lab, "Pause", "paused")
    assert lab.page.query_selector("button:has-text('Pause')").is_disabled()
    press(lab, "Resume", "● online")
    press(lab, "Drain", "ended")
    lab.page.wait_for_selector("button:has-text('Stop')", state="detached", timeout=15_000)
    lab.page.screenshot(path=SCREENS / "host-ended.png")

    saved = lab.save("host.ipynb")
    assert "widget-view" not in str(saved.cells)
    assert "■ ended" in str(saved.cells[1].outputs)
    lab.shut_kernel_down()
    assert lab.external == []
    assert errors == []
