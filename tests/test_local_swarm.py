"""`LocalSwarm`: child processes that come up together, and never outlive their parent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import nbrunner
from nbrunner.errors import ServerStartError, UserInputError
from nbrunner.protocol.credentials import Invite

pytestmark = pytest.mark.network

PARENT = """
import json, os, sys, time
import nbrunner
swarm = nbrunner.LocalSwarm("tiny", 2)
heavy = [name for name in ("torch", "transformers", "hivemind", "asyncio") if name in sys.modules]
print(json.dumps({"pids": [server.pid for server in swarm.servers], "heavy": heavy}), flush=True)
for line in sys.stdin:
    pass
"""


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_nothing_outlives_a_killed_parent_and_an_interrupt_does_not_reach_the_servers() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, lambda *_: None)" + PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None
        facts = json.loads(parent.stdout.readline())
        assert facts["heavy"] == []
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 4, family  # two servers, and the p2p daemon of each
        os.killpg(parent.pid, signal.SIGINT)  # as a kernel's Stop button does
        assert not until(lambda: not all(one.is_running() for one in family), 0.5)
        os.kill(facts["pids"][0], signal.SIGSTOP)  # it cannot even see that its parent is gone
        parent.kill()
        parent.wait()
        assert until(lambda: gone(family)), family
    finally:
        parent.kill()
        parent.wait()
        for pipe in (parent.stdin, parent.stdout):
            assert pipe is not None
            pipe.close()


def test_it_is_what_it_says_and_grows_and_ends() -> None:
    with nbrunner.LocalSwarm("tiny", 2) as swarm:
        assert [server.blocks for server in swarm.servers] == [(0, 4), (4, 8)]
        assert Path(swarm.model, "config.json").exists()
        invite = Invite.parse(swarm.invite)
        assert invite.terms.role == "use"
        assert len(invite.addresses) == 2
        assert swarm._key.identity.seed.hex() not in " ".join(
            word for server in swarm.servers for word in psutil.Process(server.pid).cmdline()
        )
        swarm.servers[0].kill()
        assert not swarm.servers[0].alive
        added = swarm.add_server("0:4")
        assert added.blocks == (0, 4)
        assert added.peer_id
        assert len(Invite.parse(swarm.invite).addresses) == 2
        swarm.servers[1].stop()
        assert swarm.servers[1]._process.returncode == 0
        family = psutil.Process().children(recursive=True)
    assert swarm.closed
    assert until(lambda: gone(family))
    assert not Path(swarm._folder.name).exists()
    swarm.close()
    with pytest.raises(UserInputError, match="closed"):
        swarm.add_server("0:4")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_servers_that_share_a_machine_leave_each_other_room() -> None:
    """Threads that sleep at barriers, one torch thread each, uvloop, and one copy of the weights for all."""
    with nbrunner.LocalSwarm("tiny", ["0:4", "0:4"]) as swarm:
        for server in swarm.servers:
            process = psutil.Process(server.pid)
            said = process.environ()
            assert (said["OMP_WAIT_POLICY"], said["OMP_NUM_THREADS"]) == ("PASSIVE", "1")
            mapped = {one.path for one in process.memory_maps()}
            assert any("/uvloop/loop" in path for path in mapped)
            # mapped from the file and not read into memory: the pages are the page cache's, whoever looks at them
            assert str(Path(swarm.model, "model.safetensors")) in mapped


@pytest.mark.parametrize(
    ("model", "servers", "words"),
    [
        ("/no/such/model", 2, "no directory"),
        ("tiny", 0, "cannot share"),
        ("tiny", 9, "cannot share"),
        ("tiny", [], "at least one"),
        ("tiny", ["0:4", "4:9"], "4:9"),
        ("tiny", ["4"], "not a range"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(model: str, servers: int | list[str], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        nbrunner.LocalSwarm(model, servers)
    assert psutil.Process().children(recursive=True) == []


def test_a_server_that_does_not_come_up_is_reported_with_its_log(tmp_path: Path, tiny_path: Path) -> None:
    model = tmp_path / "broken"
    shutil.copytree(tiny_path, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ServerStartError, match="safetensors") as error:
        nbrunner.LocalSwarm(str(model), 2)
    assert "safetensors" in error.value.log
    assert until(lambda: psutil.Process().children(recursive=True) == [])


def test_in_this_process_it_generates_grows_and_leaves_nothing() -> None:
    import torch

    with nbrunner.LocalSwarm("tiny", 2, in_process=True) as swarm:
        assert [server.blocks for server in swarm.servers] == [(0, 4), (4, 8)]
        assert {server.pid for server in swarm.servers} == {os.getpid()}
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        try:
            assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape == (1, 7)
            added = swarm.add_server("4:8")
            swarm.servers[1].stop()
            assert not swarm.servers[1].alive
            assert added.alive
            assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape == (1, 7)
        finally:
            model.close()
    assert until(lambda: psutil.Process().children(recursive=True) == [])


def test_a_script_that_closes_nothing_leaves_nothing() -> None:
    """Most scripts and notebooks just end."""
    code = (
        "import nbrunner\n"
        'swarm = nbrunner.LocalSwarm("tiny", 2)\n'
        "model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)\n"
    )
    # not tmp_path: its name would be too long for sockets, which would then be put somewhere else
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "TMPDIR": folder})
        assert until(lambda: not list(Path(folder).glob("nbrunner-*"))), list(Path(folder).glob("nbrunner-*"))
