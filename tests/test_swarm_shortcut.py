"""Streams between processes of one machine: who may take a shortcut, and what happens when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import wait_until

from nbrunner.errors import PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.frames import encode_frame
from nbrunner.protocol.greeting import FEATURES, VERSION, Hello, Shortcut
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.status import Ping, Pong
from nbrunner.swarm import shortcut
from nbrunner.swarm.control import ControlError, delimited, split_delimited
from nbrunner.swarm.daemon import FOLDER_PREFIX
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.shortcut import Doorkeeper
from nbrunner.swarm.streams import Stream

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

KEY = SwarmKey()
PEER, OTHER = "12D3KooWPeer", "12D3KooWOther"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / f"{FOLDER_PREFIX}1-abc"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def listening(folder: Path) -> Iterator[Doorkeeper]:
    import socket

    keeper = Doorkeeper(PEER, folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(keeper.path))
        yield keeper


# -- whom the door lets in -----------------------------------------------------------------------------------


def test_who_was_offered_the_door_is_recognised_at_it(folder: Path) -> None:
    keeper = Doorkeeper(PEER, folder)
    offer = keeper.offer(OTHER, shortcut.mark(PEER))
    assert offer is not None
    knock, _ = split_delimited(shortcut.knock(offer, OTHER)) or (b"", 0)
    assert keeper.recognise(knock) == OTHER
    for wrong in (knock[:-1], knock[:32] + b"12D3KooWSomebody", bytes(32) + OTHER.encode(), b"", b"\xff" * 90):
        with pytest.raises(ControlError):
            keeper.recognise(wrong)
    with pytest.raises(ControlError):
        Doorkeeper(PEER, folder).recognise(knock)  # one that has started anew knows nobody


def test_nobody_of_another_machine_is_offered_it(folder: Path) -> None:
    keeper = Doorkeeper(PEER, folder)
    for mark in (b"", bytes(16), shortcut.mark(OTHER)):
        assert keeper.offer(OTHER, mark) is None


def test_where_machines_cannot_be_told_apart_nobody_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "_machine", lambda: b"")
    assert shortcut.mark(PEER) == b""
    assert Doorkeeper(PEER, folder).offer(OTHER, b"") is None


def test_only_sockets_of_this_users_servers_are_gone_to(listening: Doorkeeper, folder: Path) -> None:
    token = bytes(32)
    assert shortcut.find(Shortcut(str(listening.path), token)) == listening.path
    plain = folder.parent / f"{FOLDER_PREFIX}2-abc"
    plain.mkdir(mode=0o700)
    (plain / "near.sock").write_text("no socket")
    linked = folder.parent / f"{FOLDER_PREFIX}3-abc"
    linked.symlink_to(folder)
    elsewhere = folder.parent / "other"
    elsewhere.symlink_to(folder)
    for path in (
        f"{FOLDER_PREFIX}1-abc/near.sock",
        "/run/docker.sock",
        str(folder / "p2pd.sock"),
        str(plain / "near.sock"),
        str(linked / "near.sock"),
        str(elsewhere / "near.sock"),
        str(folder / "gone" / "near.sock"),
        f"/{FOLDER_PREFIX}\0/near.sock",
        "",
    ):
        assert shortcut.find(Shortcut(path, token)) is None, path
    folder.chmod(0o750)
    assert shortcut.find(Shortcut(str(listening.path), token)) is None


# -- between nodes -------------------------------------------------------------------------------------------


async def echo(stream: Stream) -> None:
    while True:
        message, tensors = await stream.receive()
        await stream.send(Pong(message.nonce), list(tensors.values()))


@asynccontextmanager
async def two_nodes(**options: Any) -> AsyncIterator[tuple[Node, Node]]:
    host = await Node.create(swarm_key=KEY, **options)
    try:
        await host.serve(echo, Limits())
        client = await Node.create(invite=KEY.invite(host.addresses), client_mode=True)
        try:
            yield host, client
        finally:
            await client.close()
    finally:
        await host.close()


async def says_pong(stream: Stream) -> None:
    await stream.send(Ping(7))
    answer, _ = await stream.receive()
    assert answer == Pong(7)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    EngineLoop.get().run(test(), 60)


def goes_past(node: Node, peer: str) -> bool:
    return peer in node._shortcuts


def test_the_peer_at_the_other_end_is_who_libp2p_said() -> None:
    async def test() -> None:
        async with two_nodes() as (host, client):
            first = await client.open_stream(host.peer_id)
            second = await client.open_stream(host.peer_id)
            assert goes_past(client, host.peer_id)
            for stream in (first, second):
                await says_pong(stream)
                assert stream.welcome.limits == Limits()
            # the one through the daemons is closed
            await asyncio.to_thread(wait_until, lambda: host._streams_of[client.peer_id] == 2)
            first.close()
            second.close()

    run(test)


@pytest.mark.parametrize("why", ["announced", "switched off there", "switched off here", "another machine"])
def test_no_shortcut(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        options: dict[str, Any] = {}
        if why == "announced":
            options = {"announce": ["/ip4/127.0.0.1/tcp/34567"], "listen": ["/ip4/127.0.0.1/tcp/34567"]}
        if why == "switched off there":
            monkeypatch.setenv(shortcut.OFF, "0")
        async with two_nodes(**options) as (host, client):
            monkeypatch.delenv(shortcut.OFF, raising=False)
            if why == "switched off here":
                monkeypatch.setenv(shortcut.OFF, "0")
            if why == "another machine":
                monkeypatch.setattr(shortcut, "mark", lambda peer: bytes(16))
            stream = await client.open_stream(host.peer_id)
            await says_pong(stream)
            assert not goes_past(client, host.peer_id)
            stream.close()

    run(test)


def test_a_shortcut_that_is_gone_is_forgotten_and_the_daemons_are_taken() -> None:
    async def test() -> None:
        async with two_nodes() as (host, client):
            (await client.open_stream(host.peer_id)).close()
            assert goes_past(client, host.peer_id)
            keeper = host._doorkeeper
            assert keeper is not None
            keeper.path.unlink()
            stream = await client.open_stream(host.peer_id)
            await says_pong(stream)
            assert not goes_past(client, host.peer_id)
            stream.close()

    run(test)


def test_a_credential_is_asked_for_at_this_door_too() -> None:
    async def test() -> None:
        async with two_nodes() as (host, client):
            (await client.open_stream(host.peer_id)).close()
            client.credential = client.credential[:-1] + bytes([client.credential[-1] ^ 1])
            with pytest.raises(PeerRefusedError) as raised:
                await client.open_stream(host.peer_id)
            assert raised.value.code == "credential"

    run(test)


def test_who_was_not_offered_it_gets_no_answer() -> None:
    async def test() -> None:
        async with two_nodes() as (host, client):
            keeper = host._doorkeeper
            assert keeper is not None
            hello = Hello(VERSION, KEY.public, client.credential, "", list(FEATURES))
            words = b"".join(encode_frame(hello, ()))
            for knock in (delimited(bytes(32) + client.peer_id.encode()), delimited(b"x" * 4000), b"\xff" * 50):
                reader, writer = await asyncio.open_unix_connection(str(keeper.path))
                writer.write(knock + words)
                async with asyncio.timeout(15):
                    assert await reader.read() == b""
                writer.close()
            stream = await client.open_stream(host.peer_id)  # and nobody else was disturbed
            await says_pong(stream)
            stream.close()

    run(test)


def test_a_lying_offer_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the door does not know: whoever offered it is reached through the daemons."""

    async def test() -> None:
        async with two_nodes() as (host, client):
            keeper = host._doorkeeper
            assert keeper is not None
            monkeypatch.setattr(keeper, "offer", lambda peer, shown: Shortcut(str(keeper.path), bytes(32)))
            stream = await client.open_stream(host.peer_id)
            await says_pong(stream)
            assert not goes_past(client, host.peer_id)
            stream.close()

    run(test)


def test_a_stream_past_the_daemons_ends_with_the_process() -> None:
    async def test() -> None:
        async with two_nodes() as (host, client):
            stream = await client.open_stream(host.peer_id)
            await says_pong(stream)
            await host.close()
            with pytest.raises(PeerUnreachableError):
                await says_pong(stream)
            with pytest.raises(PeerUnreachableError):
                await client.open_stream(host.peer_id)

    run(test)


def test_offers_are_checked() -> None:
    for wrong in (["x" * 109, bytes(32)], ["/a", bytes(31)], ["/a"], [b"/a", bytes(32)]):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Shortcut)
