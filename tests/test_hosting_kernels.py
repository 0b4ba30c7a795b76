"""Three notebooks on one machine: one starts a swarm, one hosts in it from a cell, one uses it."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from helpers import Leftovers, wait_until
from kernel_client import Kernel, Ran

import nbrunner

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


def run(kernel: Kernel, code: str, timeout: float = 120.0) -> Ran:
    ran = kernel.run(code, timeout)
    assert ran.status == "ok", ran.traceback
    return ran


@pytest.fixture(scope="module")
def three():
    kernels = [Kernel() for _ in range(3)]
    try:
        for kernel in kernels:
            run(kernel, "%load_ext nbrunner")
        creator, host, user = kernels
        run(creator, "%swarm start --servers 0:4 -o swarm")
        run(creator, "%swarm invite --role host -o to_host")
        to_host, to_use = creator.value("to_host"), creator.value("str(swarm.invite)")
        run(host, f"%swarm join {to_host}")
        first = run(host, "%host tiny --blocks 4 --threads 1 --for 1h -o server")
        run(host, "server.wait_ready(60)")
        run(user, f"%swarm join {to_use}")
        yield creator, host, user, first
    finally:
        for kernel in kernels:
            kernel.close()


def card(ran: Ran) -> str:
    return next(text for text in ran.final if text.startswith("Hosting"))


def test_the_cell_returns_at_once_and_the_third_notebook_generates(three):
    _, host, user, first = three
    assert first.seconds < 5
    assert card(first).splitlines()[1].startswith("◐ starting")
    ran = run(user, "%%generate -m tiny -n 12\nThe capital of France is")
    assert "Paris" in ran.text
    wait_until(lambda: host.value("server.status.tokens_out") > 0, 10, what="it has counted what it did")
    status = host.value("(server.blocks, server.status.peers, server.status.memory_bytes > 0, server.errors)")
    assert status == ((4, 8), 1, True, [])


def test_running_the_cell_again_shows_the_same_server(three):
    _, host, _, _ = three
    pid = host.value("server.pid")
    ran = run(host, "%host tiny --blocks 4 --threads 1 --for 1h -o server")
    assert host.value("server.pid") == pid
    assert "blocks: [4, 8) of 8" in card(ran)
    assert "● online; leaves by itself in 59 min" in card(ran)


def test_an_interrupt_of_the_kernel_does_not_reach_it(three):
    _, host, _, _ = three
    message = host.start("import time; print('here', flush=True); time.sleep(30)")
    assert host.next_output(message, 20).plain.startswith("here")
    host.interrupt()
    assert host.finish(20).status == "error"
    assert host.value("server.alive and server._server.alive")


def test_paused_it_takes_no_new_sessions_and_resumed_it_does(three):
    creator, host, user, _ = three
    run(creator, "spare = swarm.add_server('4:8')")
    run(host, "server.pause()")
    assert host.value("server.state") == "paused"
    served = host.value("server.status.tokens_out")
    assert "draining" in run(user, "%swarm status").text
    assert "Rome" in run(user, "%%generate -m tiny -n 8\nThe capital of Italy is").text
    assert host.value("(server.refresh(), __import__('time').sleep(0.3), server.status.tokens_out)[2]") == served
    run(host, "server.resume()")
    run(creator, "spare.kill()")
    assert "● online" in run(user, "%swarm status").text
    assert "Madrid" in run(user, "%%generate -m tiny -n 8\nThe capital of Spain is").text
    wait_until(lambda: host.value("server.status.tokens_out") > served, 10, what="it serves again")


def test_a_button_pauses_it_and_drain_ends_it_and_leaves_text_only(three):
    _, host, _, _ = three
    message = host.start("%host tiny --blocks 4 --threads 1 --for 1h -o server")
    ran = host.finish(30, message)
    buttons = {
        one.content["data"]["state"]["description"]: one.content["comm_id"]
        for one in ran.outputs
        if one.kind == "comm_open" and one.content["data"]["state"].get("_model_name") == "ButtonModel"
    }
    assert set(buttons) == {"Pause", "Resume", "Drain", "Stop"}
    host.click(buttons["Pause"])
    wait_until(lambda: host.value("server.state") == "paused", 15, interval=0.2)
    host.click(buttons["Resume"])
    wait_until(lambda: host.value("server.state") == "online", 15, interval=0.2)
    host.click(buttons["Drain"])
    wait_until(lambda: host.value("server.state") == "ended", 30, interval=0.2)
    assert host.value("server.errors") == []


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_whatever_ends_the_kernel_ends_the_server(how):
    before = Leftovers.now()
    kernel = Kernel()
    try:
        run(kernel, "%load_ext nbrunner")
        run(kernel, "%host tiny --new-swarm --threads 1 -o server\nserver.wait_ready(60);")
        server = psutil.Process(kernel.value("server.pid"))
        assert server.is_running()
        if how == "restart":
            kernel.client.stop_channels()
            kernel.manager.restart_kernel(now=True)
        else:
            os.kill(kernel.value("__import__('os').getpid()"), signal.SIGKILL)
        wait_until(lambda: not [line for line in before.since() if "ipykernel" not in line], 10, what="all is gone")
    finally:
        kernel.close()


def test_on_colab_with_consent_it_serves_and_ends_after_the_stated_time(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    with pytest.raises(nbrunner.NBRunnerError, match="consent=True"):
        nbrunner.serve("tiny", "0:8", for_seconds=8)
    with pytest.raises(nbrunner.NBRunnerError, match="must say when it ends"):
        nbrunner.serve("tiny", "0:8", consent=True)
    with nbrunner.serve("tiny", "0:8", for_seconds=8, consent=True, threads=1) as server:
        assert server.state == "online"
        assert server.ends_at is not None
        wait_until(lambda: server.state == "ended", 60, what="it has left by itself")
        assert server.errors == []


def test_mistakes_are_one_line_and_start_nothing(three):
    creator, _, user, _ = three
    for line, words in (
        ("%host tiny --new-swarm --quantize 4bit", "no way to quantise"),
        ("%host tiny --blocks 4:2", "not a range"),
        ("%host tiny --for ever", "length of time"),
        ("%host /no/such/model", "no directory"),
        ("%host tiny --invite nonsense", "not an invite"),
        ("%host tiny", "not host blocks"),
    ):
        ran = (user if words == "not host blocks" else creator).run(line)
        assert ran.status == "error"
        assert words in ran.printed
        assert len(ran.printed.strip().splitlines()) == 1
    # Colab itself cannot be had in a test; what tells it apart is this variable of its machines
    ran = creator.run("import os; os.environ['COLAB_RELEASE_TAG'] = 'x'\n%host tiny")
    assert "consent" in ran.printed
    ran = creator.run("%host tiny --colab-consent")
    assert "--for" in ran.printed
    run(creator, "del os.environ['COLAB_RELEASE_TAG']")
