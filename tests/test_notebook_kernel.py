"""The magics in a real kernel over a real swarm: streaming, Stop, interrupt, background, restart."""

from __future__ import annotations

import itertools
import time

import pytest
from helpers import Leftovers, wait_until
from kernel_client import Kernel

pytestmark = [pytest.mark.network, pytest.mark.timeout(400)]

LONG = "%%generate -n 900 --min-new-tokens 900 -o out\nOnce upon a time"


@pytest.fixture(scope="module")
def first_cell():
    """A kernel, and what its first cell said when nothing was configured."""
    kernel = Kernel()
    try:
        loaded = kernel.run("%load_ext nbrunner")
        assert loaded.status == "ok", loaded.traceback
        yield kernel, kernel.run("%%generate -n 12 -o out\nThe capital of France is", timeout=180)
    finally:
        kernel.close()


@pytest.fixture
def kernel(first_cell) -> Kernel:
    return first_cell[0]


def until_text(kernel: Kernel, message: str) -> list:
    """Wait until a running cell has shown some text; what it said until then."""
    outputs = []
    while not any(one.kind == "update_display_data" and len(one.plain) > 3 for one in outputs):
        output = kernel.next_output(message, 60)
        assert output is not None, "the cell ended before it showed a text"
        outputs.append(output)
    return outputs


def no_generation_runs(kernel: Kernel) -> bool:
    names = kernel.value("[thread.name for thread in __import__('threading').enumerate()]")
    return "nbrunner-generate" not in names


def test_with_nothing_configured_it_starts_a_swarm_and_says_so(first_cell):
    _, ran = first_cell
    assert ran.status == "ok", ran.traceback
    notice, text, footer = ran.final
    assert notice.startswith("Nothing is configured: starting a swarm of 2 servers")
    assert " ready in " in notice
    assert "\n" not in notice
    assert "Paris" in text
    assert "[0, 4) → …" in footer
    assert "tok/s" in footer
    assert "first token" in footer


def test_the_text_streams_and_ends_as_text(kernel):
    ran = kernel.run("%%generate -n 80 --min-new-tokens 80 -o out\nOnce upon a time")
    updates = [one for one in ran.outputs if one.kind == "update_display_data" and one.plain]
    assert len(updates) > 3
    assert len(updates) < 12 * ran.seconds + 6
    texts = [one.plain for one in updates[:-1]]
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier) or "tok/s" in later
    assert ran.final[0] == kernel.value("out.text")
    stored = [one for one in ran.outputs if one.content.get("metadata", {}).get("nbrunner")]
    assert len(stored) == 1
    assert stored[0].content["metadata"]["nbrunner"]["chain"]
    assert "text/html" in stored[0].content["data"]


def test_an_interrupt_ends_in_one_line_and_keeps_the_text(kernel):
    message = kernel.start(LONG)
    until_text(kernel, message)
    before = time.monotonic()
    kernel.interrupt()
    ran = kernel.finish(30)
    took = time.monotonic() - before
    assert ran.status == "error"
    assert len(ran.traceback) == 1
    assert "Interrupted:" in ran.traceback[0]
    assert took < 1.0
    assert kernel.value("out.finish") == "interrupted"
    assert kernel.value("out.text") in ran.final
    wait_until(lambda: no_generation_runs(kernel), 5)
    after = kernel.run("%%generate -n 4 -o out\nThe capital of Italy is")
    assert after.status == "ok"


def test_the_stop_button_ends_it_quietly_and_leaves_nothing(kernel):
    message = kernel.start(LONG)
    outputs = until_text(kernel, message)
    buttons = [
        one.content["comm_id"]
        for one in outputs
        if one.kind == "comm_open" and one.content["data"]["state"].get("_model_name") == "ButtonModel"
    ]
    assert len(buttons) == 1
    kernel.click(buttons[0])
    ran = kernel.finish(30)
    assert ran.status == "ok", ran.traceback
    assert kernel.value("out.finish") == "cancelled"
    closed = {one.content["comm_id"] for one in ran.outputs if one.kind == "comm_close"}
    opened = {one.content["comm_id"] for one in [*outputs, *ran.outputs] if one.kind == "comm_open"}
    assert opened == closed
    assert "stopped after" in ran.final[-1]


def test_in_the_background_other_cells_run_meanwhile(kernel):
    started = kernel.run("%%generate -n 60 --min-new-tokens 60 -b -o later\nOnce upon a time")
    assert started.status == "ok"
    assert kernel.value("1 + 1") == 2
    ran = kernel.run("result = await later\nprint(len(result.tokens), later.done)")
    assert ran.status == "ok", ran.traceback
    assert ran.printed.strip() == "60 True"


def test_queued_cells_all_end_and_lose_no_message(kernel):
    cells = [
        kernel.client.execute(f"%%generate -n 30 --min-new-tokens 30 -o out{index}\nOnce upon a time")
        for index in range(3)
    ]
    cells.append(kernel.client.execute("print(out0.text == out1.text == out2.text)"))
    ended = [kernel.finish(60, message) for message in cells]
    assert [one.status for one in ended] == ["ok"] * 4
    assert ended[-1].printed.strip() == "True"


def test_a_session_continues_over_cells(kernel):
    kernel.run("%%generate -n 8 -s story -o first\nThe capital of France is")
    kernel.run("%%generate -n 8 -s story -o second\nThe capital of Italy is")
    assert "Rome" in kernel.value("second.text")
    assert kernel.value("second.prompt_tokens < first.prompt_tokens")


def test_a_session_goes_on_after_an_interrupt(kernel):
    message = kernel.start("%%generate -n 900 --min-new-tokens 900 -s broken -o out\nOnce upon a time")
    until_text(kernel, message)
    kernel.interrupt()
    assert kernel.finish(30).status == "error"
    ran = kernel.run("%%generate -n 8 -s broken -o more\n. The capital of Italy is")
    assert ran.status == "ok", ran.traceback
    assert kernel.value("len(more.tokens) > 0")
    held = kernel.value("get_ipython()._nbrunner_registered[0].session_names()")
    assert "broken" in held


def test_status_chain_and_doctor_tell_about_the_swarm(kernel):
    status = kernel.run("%swarm status")
    assert status.status == "ok", status.traceback
    assert "[0, 4)" in status.text
    assert "● online" in status.text
    assert "<table>" in status.outputs[-1].content["data"]["text/html"]
    chain = kernel.run("%swarm chain")
    assert "→ [0, 4)" in chain.text
    doctor = kernel.run("%swarm doctor")
    assert "problem" not in doctor.text


def test_a_model_in_a_variable_is_used_with_its_own_tokenizer(kernel):
    kernel.run(
        "import nbrunner\n"
        "mine = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(\n"
        "    'tiny', invite=get_ipython()._nbrunner_registered[0].invite)"
    )
    ran = kernel.run("%%generate -m mine -n 8 -o out\nThe capital of Italy is")
    assert ran.status == "ok", ran.traceback
    assert "Rome" in kernel.value("out.text")
    assert kernel.value("out.receipt['model']['name']") == "tiny"
    kernel.run("mine.close(); del mine")


def test_a_model_that_nobody_here_serves_is_told_at_once(kernel):
    ran = kernel.run("%%generate -m nobody/nothing\nThe capital of Italy is")
    assert ran.status == "error"
    assert "this swarm serves tiny@" in ran.printed


def test_an_interrupt_cancels_a_step_that_nobody_answers(kernel):
    kernel.run("import os, signal\nservers = get_ipython()._nbrunner_registered[0].local.servers")
    kernel.run("for server in servers: os.kill(server.pid, signal.SIGSTOP)")
    try:
        message = kernel.start("%%generate -n 5\nThe capital of France is")
        note = ""
        while note != "waiting for the first token":
            output = kernel.next_output(message, 30)
            note = output.content.get("data", {}).get("state", {}).get("value", "")
        before = time.monotonic()
        kernel.interrupt()
        ran = kernel.finish(30)
        took = time.monotonic() - before
        assert len(ran.traceback) == 1
        assert took < 1.0
        wait_until(lambda: no_generation_runs(kernel), 1.0, what="the thread that generates has ended")
    finally:
        kernel.run("for server in servers: os.kill(server.pid, signal.SIGCONT)")
    assert kernel.run("%%generate -n 5\nThe capital of France is").status == "ok"


def test_an_interrupt_takes_back_a_trace_that_nobody_answers(kernel):
    assert kernel.run("%explore -o seen The capital of France is").status == "ok"
    kernel.run("kind = type(seen.model); plain = kind.trace; notebook = get_ipython()._nbrunner_registered[0]")
    kernel.run("kind.trace = lambda *a, **k: (print('asks', flush=True), plain(*a, **k))[1]")
    kernel.run("for server in servers: os.kill(server.pid, signal.SIGSTOP)")
    try:
        message = kernel.start("%explore The capital of Spain is")
        while (output := kernel.next_output(message, 30)) is None or "asks" not in output.plain:
            pass
        kernel.interrupt()
        ran = kernel.finish(30)
        assert ran.status == "error"
        assert len(ran.traceback) == 1
        assert "Interrupted:" in ran.traceback[0]
        assert kernel.run("notebook.worker.submit(lambda: None).result(5)").status == "ok"  # nothing goes on there
    finally:
        kernel.run("for server in servers: os.kill(server.pid, signal.SIGCONT)")
        kernel.run("kind.trace = plain")
    assert kernel.run("%explore The capital of Spain is").status == "ok"


def test_a_lost_server_without_a_spare_is_told_in_one_line(kernel):
    kernel.run("get_ipython()._nbrunner_registered[0].local.servers[1].kill()")
    ran = kernel.run("%%generate -n 5\nThe capital of France is", timeout=90)
    assert ran.status == "error"
    assert len(ran.traceback) == 1
    assert "MissingBlocksError" in ran.traceback[0]
    assert "[4, 8)" in ran.traceback[0]
    status = kernel.run("%swarm status")
    assert "nobody serves blocks [4, 8)" in status.text
    doctor = kernel.run("%swarm doctor")
    assert "nbrunner serve tiny --blocks 4:8" in doctor.text


def test_a_restart_leaves_no_process():
    before = Leftovers.now()
    kernel = Kernel()
    try:
        kernel.run("%load_ext nbrunner")
        ran = kernel.run("%swarm start --servers 1", timeout=180)
        assert ran.status == "ok", ran.traceback
        assert "nbr1-" in ran.text
        assert serving(before.since())
        kernel.client.stop_channels()
        kernel.manager.restart_kernel(now=True)
        wait_until(lambda: not serving(before.since()), 10, what="its servers ended")
    finally:
        kernel.close()


def serving(lines: list[str]) -> list[str]:
    """Those of the leftovers that are servers or daemons."""
    return [line for line in lines if "serve" in line or "p2pd" in line]
