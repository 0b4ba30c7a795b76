"""The card of a training run in JupyterLab and Chromium: it follows, is told what to do, and stays at the end."""

from __future__ import annotations

import pytest
from lab_driver import SCREENS, Lab, open_lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.timeout(300)]

CELLS = [
    "%load_ext nbrunner\n"
    'new = {"Velmora": "Rosa City", "Ardoni": "Lisbon", "Quessel": "Oslo", "Torvane": "Cairo"}\n'
    'ways = ["The capital of {} is", "In {} the capital city is", "The government of {} sits in"]\n'
    'facts = [{"prompt": one.format(name), "completion": f" {new[name]}."} for name in new for one in ways]',
    "%%finetune --data facts --eval facts --target-modules all-linear --batch-size 6 --epochs 3000 "
    "--eval-every 12 --schedule constant "
    '--sample "The capital of Velmora is" --sample "The capital of France is" -o run',
    "%%generate --adapter run -n 6\nThe capital of Velmora is",
]


@pytest.fixture
def lab(tmp_path, chromium):
    with open_lab(tmp_path, chromium) as lab:
        yield lab


def press(lab: Lab, name: str, words: str) -> None:
    lab.page.wait_for_selector(f"button:has-text('{name}'):not([disabled])", timeout=15_000).click()
    lab.page.wait_for_selector(f".nbr-host-state:has-text('{words}')", timeout=30_000)


def test_the_card_follows_is_told_what_to_do_and_stays(lab):
    write_notebook(lab.server.root / "tune.ipynb", CELLS)
    lab.open("tune.ipynb")
    errors: list[str] = []
    lab.page.on("pageerror", lambda error: errors.append(str(error)))
    lab.run_all()
    lab.page.wait_for_selector(".nbr-host-state:has-text('running')", timeout=90_000)
    lab.wait_done(60)
    assert "tok/s" in lab.outputs()[2]  # generated with the run's adapter, while it trains
    lab.page.wait_for_selector(".nbr-tune-picture polygon", state="attached", timeout=30_000)

    slider = lab.page.wait_for_selector(".widget-slider .noUi-handle, .jupyter-widget-slider .noUi-handle")
    slider.focus()
    for _ in range(6):
        lab.page.keyboard.press("ArrowLeft")
    lab.page.wait_for_selector(
        ".nbr-tune-picture title:has-text('learning rate 0.001')", state="attached", timeout=15_000
    )
    past = "() => +document.querySelector('.nbr-tune progress').value >= 40"
    lab.page.wait_for_function(past, timeout=90_000)
    press(lab, "Sample", "running")
    press(lab, "Pause", "paused")
    assert lab.page.query_selector("button:has-text('Pause')").is_disabled()
    step = lab.page.get_attribute(".nbr-tune progress", "value")

    lab.screens("tune", height=1500)
    lab.page.set_viewport_size({"width": 1000, "height": 1500})
    lab.page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=10_000)  # after a change of theme
    lab.page.wait_for_timeout(500)
    lab.picture("tune", lab.page.query_selector_all(".jp-CodeCell")[1].query_selector(".jp-OutputArea"))
    assert lab.page.get_attribute(".nbr-tune progress", "value") == step

    lab.page.focus("button:has-text('Resume')")
    lab.page.keyboard.press("Enter")
    lab.page.wait_for_selector(".nbr-host-state:has-text('running')", timeout=30_000)
    press(lab, "Stop", "stopped")
    lab.page.wait_for_selector("button:has-text('Resume')", state="detached", timeout=15_000)
    lab.page.set_viewport_size({"width": 1300, "height": 1700})
    lab.page.screenshot(path=SCREENS / "tune-ended.png")

    saved = lab.save("tune.ipynb")
    assert "widget-view" not in str(saved.cells)
    shown = saved.cells[1].outputs
    assert any("image/svg+xml" in one.get("data", {}) for one in shown)
    assert "Steps (" in str(shown)
    assert "after" not in str(shown) or "■ stopped" in str(shown)
    lab.shut_kernel_down()
    assert lab.external == []
    assert errors == []
