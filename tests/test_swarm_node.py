from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from nbrunner.errors import BadPeerDataError, InviteError, PeerRefusedError, PeerUnreachableError, SessionError
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.frames import PREFIX, RawTensor, TensorSpec, decode_frame, encode_frame
from nbrunner.protocol.greeting import STREAM, VERSION, Hello, Welcome
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.records import ServerRecord
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.status import GetInfo, Ping, Pong
from nbrunner.swarm import control, shortcut
from nbrunner.swarm.daemon import start_p2p
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

pytestmark = pytest.mark.network

KEY = SwarmKey()
LIMITS = Limits(frame_bytes=8 << 20)


def run(coroutine: Coroutine[Any, Any, Any], timeout: float = 60.0) -> Any:
    return EngineLoop.get().run(coroutine, timeout)


def tensor(size: int, fill: int = 7) -> RawTensor:
    return RawTensor(TensorSpec("hidden", "uint8", [size]), bytes([fill]) * size)


async def echo(stream: Stream) -> None:
    while True:
        message, tensors = await stream.receive()
        if isinstance(message, GetInfo):
            raise PeerRefusedError("this one tells nothing", code="limit", retry_after=3.0)
        if not isinstance(message, Ping):
            raise ZeroDivisionError("a mistake in a handler")
        await stream.send(Pong(message.nonce), list(tensors.values()))


@pytest.fixture(scope="module")
def host() -> Iterator[Node]:
    async def start() -> Node:
        node = await Node.create(swarm_key=KEY)
        await node.serve(echo, LIMITS)
        return node

    node = run(start())
    yield node
    run(node.close())


@pytest.fixture(scope="module", params=["daemons", "shortcut"])
def client(host: Node, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Whose streams go through both daemons, or past them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "daemons":
            patch.setenv(shortcut.OFF, "0")
        node = run(Node.create(invite=KEY.invite(host.addresses), client_mode=True))
        yield node
        run(node.close())


@asynccontextmanager
async def raw_streams(host: Node) -> Any:
    """A stranger with a daemon of its own, that opens streams and says what it likes on them."""
    daemon = await start_p2p(Identity.generate(), client_mode=True)
    try:
        await control.connect(daemon.socket, host.peer_id, [host.addresses[0].rpartition("/p2p/")[0]])

        async def open_one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            from hivemind.p2p import PeerID

            peer = PeerID.from_base58(host.peer_id)
            _, reader, writer = await daemon.p2p.call_binary_stream_handler(peer, STREAM)
            return reader, writer

        yield open_one, daemon
    finally:
        await daemon.close()


async def answer_to(open_one: Callable[[], Awaitable[Any]], data: bytes, patience: float = 15.0) -> Any:
    """What the node answers to these bytes as a message; None if it closes, or waits for more."""
    reader, writer = await open_one()
    try:
        writer.write(data)
        async with asyncio.timeout(patience):
            header, body = PREFIX.unpack(await reader.readexactly(PREFIX.size))
            received = await reader.readexactly(header + body)
        return decode_frame(received[:header], received[header:])[0]
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
        return None
    finally:
        writer.close()


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 262144, 262145, (1 << 20) + 13, 8 << 20])
def test_frames_of_all_sizes_there_and_back(host: Node, client: Node, size: int) -> None:
    async def there_and_back() -> None:
        stream = await client.open_stream(host.peer_id)
        assert stream.welcome.limits == LIMITS
        for nonce in range(3):
            await stream.send(Ping(nonce), [tensor(size, nonce)] if size else [])
        for nonce in range(3):
            message, tensors = await stream.receive()
            assert message == Pong(nonce)
            if size:
                assert bytes(tensors["hidden"].data) == bytes([nonce]) * size
        stream.close()

    run(there_and_back())


def test_frames_of_concurrent_senders_do_not_mix(host: Node, client: Node) -> None:
    async def senders() -> None:
        stream = await client.open_stream(host.peer_id)
        sizes = [3, 70_000, 500_000, 12, 300_000] * 6
        await asyncio.gather(
            *(stream.send(Ping(nonce), [tensor(size, nonce)]) for nonce, size in enumerate(sizes)),
            receive_all(stream, sizes),
        )
        stream.close()

    async def receive_all(stream: Stream, sizes: list[int]) -> None:
        seen = set()
        for _ in sizes:
            message, tensors = await stream.receive()
            assert isinstance(message, Pong)
            assert bytes(tensors["hidden"].data) == bytes([message.nonce]) * sizes[message.nonce]
            seen.add(message.nonce)
        assert seen == set(range(len(sizes)))

    run(senders())


def test_memory_may_change_when_send_has_returned(host: Node, client: Node) -> None:
    async def change() -> None:
        stream = await client.open_stream(host.peer_id)
        data = bytearray(b"a" * (4 << 20))
        await stream.send(Ping(1), [RawTensor(TensorSpec("hidden", "uint8", [len(data)]), memoryview(data))])
        data[:] = b"b" * len(data)
        _, tensors = await stream.receive()
        assert set(bytes(tensors["hidden"].data)) == {ord("a")}
        stream.close()

    run(change())


def test_who_does_not_read_stops_who_sends(client: Node) -> None:
    async def fill() -> None:
        stop = asyncio.Event()

        async def never_reads(stream: Stream) -> None:
            await stop.wait()

        node = await Node.create(invite=KEY.invite(client_addresses, role="host"))
        await node.serve(never_reads, Limits())
        try:
            await control.connect(client._daemon.socket, node.peer_id, [node.addresses[0].rpartition("/p2p/")[0]])
            stream = await client.open_stream(node.peer_id)
            sent = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3.0):
                    while sent < 200:
                        await stream.send(Ping(sent), [tensor(1 << 20)])
                        sent += 1
            # our queue (16 MiB), the daemons' windows (16 MiB each) and the kernel's buffers, not more
            assert 1 <= sent <= 96
            stream.close()
        finally:
            stop.set()
            await node.close()

    client_addresses = client._bootstrap
    run(fill())


def test_handler_errors_are_told_and_end_only_that_stream(host: Node, client: Node) -> None:
    async def ask(message: Any) -> Any:
        stream = await client.open_stream(host.peer_id)
        try:
            await stream.send(message)
            return (await stream.receive())[0]
        finally:
            stream.close()

    assert run(ask(GetInfo())) == Refused("limit", "this one tells nothing", 3.0)
    mistake = run(ask(Pong(1)))
    assert mistake.code == "internal"
    assert "mistake in a handler" not in mistake.reason, "what went wrong inside is nobody else's business"
    assert run(ask(Ping(5))) == Pong(5)


def test_a_stream_ends_on_both_sides(host: Node, client: Node) -> None:
    async def ends() -> None:
        stream = await client.open_stream(host.peer_id)
        reading = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        stream.close()
        with pytest.raises(PeerUnreachableError, match="closed here"):
            await reading
        with pytest.raises(PeerUnreachableError):
            await stream.send(Ping(1))
        assert stream.closed

    run(ends())


def test_frames_over_the_announced_limit_are_refused(host: Node, client: Node) -> None:
    async def too_large() -> None:
        stream = await client.open_stream(host.peer_id)
        with pytest.raises((PeerUnreachableError, PeerRefusedError)):  # noqa: PT012
            await stream.send(Ping(1), [tensor(LIMITS.frame_bytes + 1)])
            message, _ = await stream.receive()
            assert isinstance(message, Refused)
            raise PeerRefusedError(message.reason, code=message.code)
        stream.close()
        with pytest.raises(ValueError, match="over the limit"):
            await (await client.open_stream(host.peer_id)).send(Ping(1), [tensor(65 << 20)])

    run(too_large())


def test_a_peer_that_does_not_exist(client: Node) -> None:
    began = time.monotonic()
    with pytest.raises(PeerUnreachableError) as raised:
        run(client.open_stream(Identity.generate().peer_id, timeout=4.0))
    assert time.monotonic() - began < 5.0
    assert raised.value.peer


def test_a_peer_that_dies_is_noticed_at_once(client: Node) -> None:
    async def dies() -> float:
        node = await Node.create(invite=KEY.invite(client._bootstrap, role="host"))
        await node.serve(echo, Limits())
        await control.connect(client._daemon.socket, node.peer_id, [node.addresses[0].rpartition("/p2p/")[0]])
        stream = await client.open_stream(node.peer_id)
        reading = asyncio.create_task(stream.receive())
        node._daemon.process.kill()
        began = time.monotonic()
        with pytest.raises(PeerUnreachableError):
            await reading
        seconds = time.monotonic() - began
        assert "Peer ID" in await node.wait_lost()
        assert node.closed
        with pytest.raises(PeerUnreachableError, match="daemon has ended"):
            await node.open_stream(client.peer_id)
        await node.close()
        return seconds

    assert run(dies()) < 2.0


# -- who is let in -------------------------------------------------------------------------------------------


def test_a_stranger_is_told_why(host: Node) -> None:
    foreign = SwarmKey().invite(host.addresses)
    with pytest.raises(PeerRefusedError, match="another swarm") as raised:
        run(Node.create(invite=foreign, client_mode=True))
    assert raised.value.code == "credential"


def test_an_invite_that_expires_after_it_was_read(host: Node) -> None:
    expired = KEY.invite(host.addresses, expires_in=-100)
    with pytest.raises(PeerRefusedError, match="expired") as raised:
        run(Node.create(invite=expired, client_mode=True))
    assert raised.value.code == "credential"
    with pytest.raises(InviteError, match="expired"):
        Invite.parse(str(expired))


def test_a_credential_of_another_peer(host: Node) -> None:
    async def borrowed() -> Any:
        stolen = KEY.invite([]).credential(Identity.generate().peer_id).encode()
        async with raw_streams(host) as (open_one, _):
            return await answer_to(open_one, b"".join(encode_frame(Hello(VERSION, KEY.public, stolen))))

    answer = run(borrowed())
    assert answer.code == "credential"
    assert "another peer" in answer.reason


@pytest.mark.parametrize(
    ("hello", "code", "words"),
    [
        (Hello(VERSION + 1, KEY.public, b"", "nbrunner 99"), "version", "nbrunner 99"),
        (Hello(VERSION, KEY.public, b""), "credential", "private"),
        (Hello(VERSION, KEY.public, b"nonsense"), "credential", "cannot be read"),
        (Hello(VERSION, b"x" * 32, b""), "credential", "another swarm"),
        (Ping(1), "schema", "Hello"),
    ],
)
def test_first_words_that_are_wrong(host: Node, hello: Any, code: str, words: str) -> None:
    async def say() -> Any:
        async with raw_streams(host) as (open_one, _):
            return await answer_to(open_one, b"".join(encode_frame(hello)))

    answer = run(say())
    assert isinstance(answer, Refused)
    assert answer.code == code
    assert words in answer.reason


def test_a_refusal_is_not_overtaken_by_the_end_of_the_stream(host: Node) -> None:
    """The node leaves it to the one refused to close: p2pd may drop what is on its way when we close first."""

    async def say() -> tuple[Any, bytes | None]:
        async with raw_streams(host) as (open_one, _):
            reader, writer = await open_one()
            writer.write(b"".join(encode_frame(Ping(1))))
            header, body = PREFIX.unpack(await reader.readexactly(PREFIX.size))
            received = await reader.readexactly(header + body)
            writer.write(b"x" * 100_000)  # what comes after is read and thrown away
            try:
                async with asyncio.timeout(0.5):
                    more = await reader.read(1)
            except TimeoutError:
                more = None
            writer.close()
            return decode_frame(received[:header], received[header:])[0], more

    answer, more = run(say())
    assert isinstance(answer, Refused)
    assert more is None  # still open


def test_the_first_request_may_come_with_the_hello(host: Node) -> None:
    async def both() -> tuple[Any, ...]:
        async with raw_streams(host) as (open_one, daemon):
            credential = KEY.invite([]).credential(daemon.p2p.peer_id.to_base58()).encode()
            reader, writer = await open_one()
            for message, tensors in ((Hello(VERSION, KEY.public, credential), ()), (Ping(4), (tensor(300_000),))):
                writer.writelines(encode_frame(message, tensors))
            answers = []
            for _ in range(2):
                header, body = PREFIX.unpack(await reader.readexactly(PREFIX.size))
                received = await reader.readexactly(header + body)
                answers.append(decode_frame(received[:header], received[header:]))
            writer.close()
            return answers[0][0], answers[1][0], len(answers[1][1]["hidden"].data)

    welcome, pong, size = run(both())
    assert isinstance(welcome, Welcome)
    assert (pong, size) == (Pong(4), 300_000)


def test_silent_streams_of_one_peer_are_few(host: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbrunner.swarm.node._MAX_UNGREETED", 5)

    async def pile_up() -> tuple[int, Any]:
        async with raw_streams(host) as (open_one, _):
            held = [await open_one() for _ in range(5)]
            async with asyncio.timeout(10):
                while host._ungreeted.total() < 5:  # noqa: ASYNC110 - a count has no event
                    await asyncio.sleep(0.01)
            answer = await answer_to(open_one, b"")
            for _, writer in held:
                writer.close()
            return len(held), answer

    assert run(pile_up())[1].code == "limit"
    wait_until(lambda: not host._ungreeted, 5, what="they are forgotten")


def test_nothing_large_is_read_before_the_hello(host: Node) -> None:
    async def say() -> Any:
        async with raw_streams(host) as (open_one, _):
            return await answer_to(open_one, b"\0\0\0\x05\x03\0\0\0" + b"x" * 1000)

    assert run(say()).code == "schema"


def test_garbage_never_breaks_a_node(host: Node, client: Node) -> None:
    async def start() -> Any:
        context = raw_streams(host)
        return context, await context.__aenter__()

    context, (open_one, daemon) = run(start())
    credential = KEY.invite([]).credential(daemon.p2p.peer_id.to_base58()).encode()
    good = b"".join(encode_frame(Hello(VERSION, KEY.public, credential)))

    @settings(max_examples=60)
    @given(st.booleans(), st.binary(max_size=300), st.integers(0, 2**32 - 1), st.integers(0, 300))
    def garbage(greet: bool, data: bytes, length: int, cut: int) -> None:
        framed = len(data).to_bytes(4, "big") + (length % 100 if length % 2 else 0).to_bytes(4, "big") + data
        mangled = bytearray(framed if length % 3 else data)
        answer = run(answer_to(open_one, (good if greet else good[:cut]) + bytes(mangled), patience=0.1))
        assert answer is None or isinstance(answer, Refused | Welcome)

    try:
        garbage()
    finally:
        run(context.__aexit__(None, None, None))

    async def still_well() -> Any:
        stream = await client.open_stream(host.peer_id)
        await stream.send(Ping(9))
        answer, _ = await stream.receive()
        stream.close()
        return answer

    assert run(still_well()) == Pong(9)
    assert not host._streams_of or sum(host._streams_of.values()) < 10


def test_bytes_that_are_no_frame_from_a_server(host: Node) -> None:
    """The client's side: a server that answers garbage is named, and costs one stream."""

    async def liar() -> None:
        async def lie(stream: Stream) -> None:
            stream._protocol.write([b"\xff" * 64])
            await asyncio.sleep(30)

        node = await Node.create(invite=KEY.invite(host.addresses, role="host"))
        await node.serve(lie, Limits())
        user = await Node.create(invite=KEY.invite(node.addresses), client_mode=True)
        try:
            stream = await user.open_stream(node.peer_id)
            with pytest.raises(BadPeerDataError) as raised:
                await stream.receive()
            assert raised.value.peer == node.peer_id
            with pytest.raises(BadPeerDataError):
                await stream.receive()
            stream.close()
        finally:
            await user.close()
            await node.close()

    run(liar())


# -- serving -------------------------------------------------------------------------------------------------


def test_only_hosts_announce_themselves(client: Node) -> None:
    record = ServerRecord("m@1", 4, 0, 4, "online")
    with pytest.raises(InviteError, match="not host"):
        run(client.publish(record))
    assert client.addresses == []


def test_serving_twice(host: Node) -> None:
    with pytest.raises(SessionError):
        run(host.serve(echo, Limits()))
