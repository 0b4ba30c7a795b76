"""The notebooks about fine-tuning, from top to bottom, offline; what an interrupt and a restart do to a run."""

from __future__ import annotations

import re
import time

import nbformat
import pytest
from helpers import ROOT, wait_until
from kernel_client import Kernel
from nbclient import NotebookClient

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]

EXPECTED = {
    "finetune_facts": [
        r"before: 0 of 4 about Velmora, 4[5-8] of 48 other",
        r"96 steps, loss 1\.\d+ → 0\.0\d",
        r"after: 4 of 4 about Velmora, 4[5-8] of 48 other",
        r"✔ done",
        r"Rosa City",
        r"the same answers without a swarm: True",
    ],
    "classify": [r"✔ done", r"of 135 sentences, after: (9\d|100)%", r"the same without a swarm: True"],
}


def shown(book: nbformat.NotebookNode) -> str:
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") + "\n" for one in outputs)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    book = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    began = time.monotonic()
    NotebookClient(
        book, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert time.monotonic() - began < 180
    text = shown(book)
    for words in EXPECTED[name]:
        assert re.search(words, text), (words, text)
    assert "widget-view" not in str(book.cells)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_kept_in_it_says_the_same(name):
    text = shown(nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4))
    for words in EXPECTED[name]:
        assert re.search(words, text), (words, text)


START = """
%load_ext nbrunner
import os
os.chdir({folder!r})
facts = [{{"prompt": "The capital of Velmora is", "completion": " Rosa City."}}] * 12
run = None
"""
TEACH = "%%finetune --data facts --batch-size 4 --epochs 2000 --schedule constant --out-dir kept -o run"


def state(kernel: Kernel) -> str:
    return kernel.value("run.state")


def test_an_interrupt_pauses_and_a_restart_goes_on(tmp_path):
    kernel = Kernel()
    try:
        assert kernel.run(START.format(folder=str(tmp_path))).status == "ok"
        ran = kernel.run(TEACH, timeout=120)
        assert ran.status == "ok", ran.traceback
        wait_until(lambda: kernel.value("run.step") > 3, 60, what="some steps")

        kernel.interrupt()  # no cell runs
        wait_until(lambda: state(kernel) == "paused", 30, what="the run pauses")
        step = kernel.value("run.step")
        assert kernel.value("run.step") == step

        kernel.run("run.resume()")
        begun = tmp_path / "begun"
        message = kernel.start(f"open({str(begun)!r}, 'w').close(); await run")
        wait_until(begun.exists, 10, what="the cell waits for the run")
        kernel.interrupt()
        ran = kernel.finish(30, message)
        assert ran.status == "error"
        wait_until(lambda: state(kernel) == "paused", 30, what="the run pauses again")
        step = kernel.value("run.step")
        # with the checkpoint of the pause
        wait_until(lambda: kernel.value("run.folder.last_checkpoint.name") == f"checkpoint-{step:06d}", 20)
        losses = kernel.value("run.history['loss'][:5]")
    finally:
        kernel.manager.shutdown_kernel(now=True)
        kernel.client.stop_channels()

    kernel = Kernel()
    try:
        assert kernel.run(START.format(folder=str(tmp_path))).status == "ok"
        ran = kernel.run(f"import nbrunner\nrun = nbrunner.resume('kept', max_steps={step + 2})\nrun", timeout=120)
        assert ran.status == "ok", ran.traceback
        assert "Fine-tuning tiny" in ran.text  # its card, as the value of the cell
        ran = kernel.run("result = await run\nprint(result.steps, result.state)", timeout=120)
        assert ran.printed.split() == [str(step + 2), "done"]
        assert kernel.value("run.history['loss'][:5]") == losses
        assert kernel.run("nbrunner.resume('kept', max_steps=1)").status == "error"
    finally:
        kernel.run("%unload_ext nbrunner", timeout=60)
        kernel.close()
