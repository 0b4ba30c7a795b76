from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from nbrunner.errors import PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.records import ServerRecord
from nbrunner.protocol.status import Ping, Pong
from nbrunner.swarm import directory as directory_module
from nbrunner.swarm.directory import Directory
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream
from nbrunner.swarm.view import SwarmView

pytestmark = pytest.mark.network

T = TypeVar("T")
KEY = SwarmKey()


def run(coroutine: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
    return EngineLoop.get().run(coroutine, timeout)


class Server:
    """A server as far as the directory can tell: it announces itself and answers pings, unless told not to."""

    def __init__(self) -> None:
        self.node: Node = None  # type: ignore[assignment]
        self.silent = False
        self.refuses = False

    async def start(self, invite: Any = None) -> None:
        self.node = await Node.create(invite=invite, swarm_key=None if invite else KEY)
        await self.node.serve(self.handle, Limits())

    async def handle(self, stream: Stream) -> None:
        while True:
            if self.refuses:
                raise PeerRefusedError("not now", code="full")
            message, _ = await stream.receive()
            assert isinstance(message, Ping)
            if not self.silent:
                await stream.send(Pong(message.nonce))

    async def publish(self, **fields: Any) -> None:
        record = ServerRecord("m@1", 8, 0, 8, **{"state": "online", **fields})
        assert await self.node.publish(record)

    @property
    def peer(self) -> str:
        return self.node.peer_id


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    first, second = Server(), Server()

    async def start() -> None:
        await first.start()
        await second.start(KEY.invite(first.node.addresses, role="host"))

    async def stop() -> None:
        await asyncio.gather(first.node.close(), second.node.close())

    run(start())
    yield [first, second]
    run(stop())


@pytest.fixture
def directory(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[Directory]:
    monkeypatch.setattr(directory_module, "_BAN_SECONDS", 0.3)
    monkeypatch.setattr(directory_module, "_PING_PERIOD", 0.2)
    for server in servers:
        server.silent = server.refuses = False

    async def start() -> Directory:
        for server in servers:
            await server.publish()
        node = await Node.create(invite=KEY.invite(servers[0].node.addresses), client_mode=True)
        directory = Directory(node, refresh=0.5)
        await directory.start()
        return directory

    async def stop() -> None:
        await directory.close()
        await directory._node.close()

    directory = run(start())
    yield directory
    run(stop())


def until(directory: Directory, condition: Callable[[SwarmView], Any], timeout: float = 15.0) -> Any:
    return run(directory.wait_for(lambda view: condition(view) or None, timeout))


def test_all_servers_and_their_round_trips(directory: Directory, servers: list[Server]) -> None:
    def complete(view: SwarmView) -> SwarmView | None:
        known = [view.servers.get(one.peer) for one in servers]
        return view if all(entry is not None and entry.round_trip for entry in known) else None

    view = until(directory, complete)
    assert set(view.servers) == {one.peer for one in servers}
    assert not view.failed
    assert view.nodes_heard == 2
    for entry in view.servers.values():
        assert 0 < entry.round_trip < 1.0
        assert entry.failed_until == 0
        assert time.time() < entry.expires < time.time() + 61
    assert abs(view.updated - time.time()) < 5


def test_a_failed_peer_leaves_at_once_and_returns_when_well(directory: Directory, servers: list[Server]) -> None:
    first, second = servers

    async def fail() -> SwarmView:
        directory.mark_failed(first.peer, "it went silent")
        return directory.view

    view = run(fail())
    assert set(view.servers) == {second.peer}
    assert view.failed[first.peer].failure == "it went silent"
    assert view.failed[first.peer].failed_until > time.time()
    # Neither the old record nor an answer brings it back ...
    run(directory.refresh())
    run(directory.measure(first.peer))
    with pytest.raises(TimeoutError):
        until(directory, lambda view: first.peer in view.servers, 1.0)
    # ... a new record alone does not ...
    first.silent = True
    run(first.publish())
    with pytest.raises(TimeoutError):
        until(directory, lambda view: first.peer in view.servers, 1.5)
    # ... both do.
    first.silent = False
    run(first.publish())
    until(directory, lambda view: first.peer in view.servers)


def test_failing_again_keeps_it_away_longer(
    directory: Directory, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = servers[0]
    bans = []
    for _ in range(3):

        async def fail() -> float:
            directory.mark_failed(first.peer, "no")
            directory.mark_failed(first.peer, "no")  # several sessions lose it at once: one failure
            return directory.view.failed[first.peer].failed_until - time.time()

        bans.append(run(fail()))
        run(first.publish())
        until(directory, lambda view: first.peer in view.servers)
    assert bans == pytest.approx([0.3, 0.6, 1.2], abs=0.1)


def test_a_server_that_was_started_again_returns_without_waiting(
    directory: Directory, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "_BAN_SECONDS", 1000.0)
    first = servers[0]

    async def fail() -> None:
        directory.mark_failed(first.peer, "it ended")

    run(fail())
    run(first.publish(started=123.0))
    until(directory, lambda view: first.peer in view.servers, 5.0)


def test_a_silent_server_is_found_by_pings(
    directory: Directory, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = servers
    first.silent = True
    view = until(directory, lambda view: view if first.peer in view.failed else None)
    assert "did not answer a ping" in view.failed[first.peer].failure
    assert second.peer in view.servers, "nobody else suffers"


def test_when_nobody_answers_it_is_our_own_connection(directory: Directory, servers: list[Server]) -> None:
    async def cut_off() -> SwarmView:
        async def nothing() -> Any:
            return {}, 0

        async def unreachable(peer: str, *, timeout: float = 5.0) -> Stream:
            raise PeerUnreachableError("no route", peer=peer)

        node = directory._node
        node.fetch_held, node.open_stream = nothing, unreachable  # type: ignore[method-assign]
        # what was on its way when the connection went is answered first
        await directory.refresh()
        await asyncio.gather(*directory._pings.values(), return_exceptions=True)
        for peer in list(directory._failures):
            del directory._failures[peer]
        directory._trips.close()
        directory._heard_at = float("-inf")
        for _ in range(4):
            await directory.refresh()
            await asyncio.gather(*directory._pings.values())
        return directory.view

    view = run(cut_off())
    assert set(view.servers) == {one.peer for one in servers}
    assert not view.failed
    assert view.nodes_heard == 0


def test_a_refusal_is_told_as_one(directory: Directory, servers: list[Server]) -> None:
    servers[0].refuses = True
    directory._trips.close()
    with pytest.raises(PeerRefusedError, match="not now") as raised:
        run(directory.measure(servers[0].peer))
    assert raised.value.code == "full"


def test_links(directory: Directory, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = servers
    monkeypatch.setattr(directory_module, "_LINK_SECONDS", 0.5)

    async def fail() -> SwarmView:
        directory.mark_link_failed(first.peer, second.peer)
        return directory.view

    assert run(fail()).bad_links == {(first.peer, second.peer)}
    assert set(directory.view.servers) == {first.peer, second.peer}
    until(directory, lambda view: not view.bad_links)


def test_offline_is_gone(directory: Directory, servers: list[Server]) -> None:
    run(servers[1].publish(state="offline"))
    until(directory, lambda view: set(view.servers) == {servers[0].peer})
    run(servers[1].publish(state="draining"))
    until(directory, lambda view: servers[1].peer in view.servers)


def test_waiting_wakes_on_the_next_refresh_and_hurries_it(directory: Directory, servers: list[Server]) -> None:
    directory._period = 1000.0

    async def wait() -> float:
        waiter = asyncio.create_task(
            directory.wait_for(
                lambda view: any(one.record.name == "new" for one in view.servers.values()) or None, 10
            )
        )
        await asyncio.sleep(0)
        assert not waiter.done()
        await servers[0].publish(name="new")
        began = time.monotonic()
        await waiter
        return time.monotonic() - began

    assert run(wait()) < 2.0


def test_wait_for_gives_up(directory: Directory) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        run(directory.wait_for(lambda _: None, 0.3))
    assert 0.25 < time.monotonic() - began < 2.0


def test_refreshes_at_the_same_time_are_one(directory: Directory) -> None:
    fetches = 0

    async def count() -> None:
        nonlocal fetches
        node = directory._node
        fetch = node.fetch_held

        async def counted() -> Any:
            nonlocal fetches
            fetches += 1
            return await fetch()

        node.fetch_held = counted  # type: ignore[method-assign]
        one = asyncio.create_task(directory.refresh())
        others = [asyncio.create_task(directory.refresh()) for _ in range(20)]
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.gather(*others)
        node.fetch_held = fetch  # type: ignore[method-assign]

    run(count())
    assert fetches == 1


def test_measuring_reuses_a_stream(directory: Directory, servers: list[Server]) -> None:
    peer = servers[1].peer

    async def measure() -> tuple[list[float], int]:
        opened = 0
        node = directory._node
        open_stream = node.open_stream

        async def counted(*args: Any, **kwargs: Any) -> Stream:
            nonlocal opened
            opened += 1
            return await open_stream(*args, **kwargs)

        directory._runner.cancel()  # type: ignore[union-attr]
        await asyncio.gather(*directory._pings.values())
        directory._trips.close()
        node.open_stream = counted  # type: ignore[method-assign]
        seconds = await asyncio.gather(*(directory.measure(peer) for _ in range(5)))
        node.open_stream = open_stream  # type: ignore[method-assign]
        return seconds, opened

    seconds, opened = run(measure())
    assert opened == 1
    assert all(0 < one < 1 for one in seconds)


def test_own_targets(servers: list[Server]) -> None:
    """A server measures only those that could follow it in a chain."""
    first, second = servers

    async def measure() -> SwarmView:
        for server in servers:
            server.silent = server.refuses = False
            await server.publish()
        directory = Directory(first.node, targets=lambda view: [one for one in view.servers if one == second.peer])
        await directory.start()
        try:
            return await directory.wait_for(
                lambda view: view if view.servers[second.peer].round_trip is not None else None, 10
            )
        finally:
            await directory.close()

    view = run(measure())
    assert view.servers[first.peer].round_trip is None


def test_newcomers_are_reached_on_machines_with_several_addresses() -> None:
    """libp2p's own routing does not find a third of them; the addresses in their records do."""

    async def newcomers() -> tuple[list[float], int]:
        listen = ["/ip4/0.0.0.0/tcp/0"]
        first = Server()
        first.node = await Node.create(swarm_key=KEY, listen=listen)
        await first.node.serve(first.handle, Limits())
        invite = KEY.invite(first.node.addresses, role="host")
        others: list[Server] = []
        client = await Node.create(invite=invite, client_mode=True)
        directory = Directory(client, refresh=0.5)
        try:
            await directory.start()
            for _ in range(4):
                server = Server()
                server.node = await Node.create(invite=invite, listen=listen)
                others.append(server)
                await server.node.serve(server.handle, Limits())
                places = [address.rpartition("/p2p/")[0] for address in server.node.addresses[:8]]
                await server.publish(addresses=places)
            await directory.refresh()
            seconds = [await directory.measure(server.peer) for server in others]
            await directory.refresh()
            return seconds, directory.view.nodes_heard
        finally:
            await directory.close()
            await asyncio.gather(*(node.close() for node in (client, first.node, *(one.node for one in others))))

    seconds, heard = run(newcomers())
    assert len(seconds) == 4
    assert heard == 5
