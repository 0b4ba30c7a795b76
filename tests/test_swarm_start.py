"""How a node starts and ends: its daemon and files, ports, addresses, and joining a swarm."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import wait_until

from nbrunner.errors import BootstrapError, InviteError, ServerStartError, SessionError, UserInputError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import Limits
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

pytestmark = pytest.mark.network

KEY = SwarmKey()


def run(coroutine: Coroutine[Any, Any, Any], timeout: float = 60.0) -> Any:
    return EngineLoop.get().run(coroutine, timeout)


async def listen(stream: Stream) -> None:
    await stream.receive()


@pytest.fixture(scope="module")
def host() -> Iterator[Node]:
    async def start() -> Node:
        node = await Node.create(swarm_key=KEY)
        await node.serve(listen, Limits())
        return node

    node = run(start())
    yield node
    run(node.close())


def test_identity_and_files(host: Node) -> None:
    folder = host._daemon.folder
    assert host.peer_id == host.identity.peer_id
    assert all(address.endswith("/p2p/" + host.peer_id) for address in host.addresses)
    assert not (folder / "identity").exists()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_daemon_is_out_of_reach_of_ctrl_c(host: Node) -> None:
    pid = host._daemon.process.pid
    assert os.getpgid(pid) != os.getpgid(0)
    assert os.getsid(pid) != os.getsid(0)


def test_closing_leaves_nothing(host: Node) -> None:
    async def open_and_close() -> tuple[Path, int]:
        node = await Node.create(invite=KEY.invite(host.addresses), client_mode=True)
        stream = await node.open_stream(host.peer_id)
        facts = node._daemon.folder, node._daemon.process.pid
        await asyncio.gather(node.close(), node.close())
        assert stream.closed
        with pytest.raises(SessionError):
            await node.open_stream(host.peer_id)
        return facts

    folder, pid = run(open_and_close())
    assert not folder.exists()
    assert not psutil.pid_exists(pid)


PARENT = """
import sys, time
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
node = EngineLoop.get().run(Node.create(swarm_key=SwarmKey()))
print(node._daemon.process.pid, node._daemon.folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_a_daemon_dies_with_its_parent_however_it_dies(sig: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert psutil.pid_exists(int(pid))
    parent.send_signal(sig)
    parent.wait(20)
    parent.stdout.close()
    wait_until(lambda: not psutil.pid_exists(int(pid)), 5, what="p2pd ends")
    # The next node to start removes what a killed process could not.
    run(_start_and_close())
    assert not Path(folder).exists()


async def _start_and_close() -> None:
    await (await Node.create(swarm_key=KEY)).close()


def test_cancelling_a_start_leaves_nothing() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(TimeoutError):
        run(_start_and_close(), timeout=0.05)
    wait_until(
        lambda: {child.pid for child in psutil.Process().children(recursive=True)} <= before, 10, what="p2pd ends"
    )


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartError, match=f"port {port} is used by another program"):
            run(Node.create(swarm_key=KEY, listen=[f"/ip4/127.0.0.1/tcp/{port}"]))


def test_the_port_of_another_node_is_in_use(host: Node) -> None:
    address = host.addresses[0].rpartition("/p2p/")[0]
    with pytest.raises(ServerStartError, match="is used by another program"):
        run(Node.create(swarm_key=KEY, listen=[address]))


def test_a_chosen_port_is_taken_and_can_be_taken_again() -> None:
    async def on(port: int) -> list[str]:
        node = await Node.create(swarm_key=KEY, listen=[f"/ip4/127.0.0.1/tcp/{port}"])
        await node.close()
        return node.addresses

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        assert any(f"/tcp/{port}/" in address for address in run(on(port)))


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:80", "/ip4/127.0.0.1/tcp/1; rm", "/ip4/300.1.1.1/tcp/0", "/nonsense/1"]
)
def test_addresses_that_make_no_sense(address: str) -> None:
    with pytest.raises((UserInputError, ServerStartError)):
        run(Node.create(swarm_key=KEY, listen=[address]))


def test_announced_addresses_are_the_ones_told() -> None:
    async def announce() -> list[str]:
        node = await Node.create(swarm_key=KEY, announce=["/ip4/203.0.113.5/tcp/31330"])
        await node.close()
        return [node.addresses[0].removesuffix(node.peer_id), *node.addresses[1:]]

    assert run(announce()) == ["/ip4/203.0.113.5/tcp/31330/p2p/"]


def test_nothing_to_join() -> None:
    with pytest.raises(UserInputError, match="no swarm to join"):
        run(Node.create())
    with pytest.raises(InviteError, match="no address"):
        run(Node.create(invite=KEY.invite([])))
    with pytest.raises(InviteError, match="makes no sense"):
        run(Node.create(invite=KEY.invite(["/ip4/1.2.3.4/tcp/1"])))


def test_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}"
    with pytest.raises(BootstrapError, match="no peer of this swarm answered") as raised:
        run(Node.create(invite=KEY.invite([address]), client_mode=True))
    assert raised.value.addresses == [address]


def test_one_of_the_addresses_is_enough(host: Node) -> None:
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"

    async def join() -> int:
        node = await Node.create(invite=KEY.invite([dead, *host.addresses]), client_mode=True)
        try:
            return (await node.fetch_held())[1]
        finally:
            await node.close()

    assert run(join()) >= 1
