"""Two real server processes, spoken to in the protocol itself: what they compute, repeat, pass on and refuse."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_messages import any_message

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.frames import PREFIX, RawTensor
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.requests import Backward, BackwardResult, Forward, ForwardResult
from nbrunner.protocol.sessions import (
    AttachSession,
    CloseSession,
    Draining,
    OpenSession,
    Relink,
    Relinked,
    SessionOpened,
)
from nbrunner.protocol.status import GetInfo, Info, Ping, Pong
from nbrunner.protocol.steps import CacheOp, Captured, Hop, Step, StepFailed, StepResult
from nbrunner.protocol.tensors import pack, take
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

pytestmark = pytest.mark.network

T = TypeVar("T")
WIDTH = 128


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return EngineLoop.get().run(coroutine, 60)


@pytest.fixture(scope="module")
def swarm() -> Iterator[nbrunner.LocalSwarm]:
    with nbrunner.LocalSwarm("tiny", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: nbrunner.LocalSwarm) -> Iterator[Node]:
    node = run(Node.create(invite=Invite.parse(swarm.invite), client_mode=True))
    yield node
    run(node.close())


@pytest.fixture(scope="module")
def spans(tiny_path: Path) -> list[BlockSpan]:
    torch.set_num_threads(1)
    checkpoint = resolve_checkpoint("tiny")
    return [BlockSpan.load(checkpoint, 0, 3), BlockSpan.load(checkpoint, 3, 8)]


@pytest.fixture(scope="module")
def uid() -> str:
    return resolve_checkpoint("tiny").uid


def hidden(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, tokens, WIDTH), generator=generator).to(torch.bfloat16)


def through(spans: Sequence[BlockSpan], parts: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    """What plain spans make of consecutive parts: the last part's output."""
    caches = [span.new_cache() for span in spans]
    for part in parts:
        state = part
        for span, cache in zip(spans, caches, strict=True):
            state = span.forward(state, cache=cache, **options).hidden
    return state


@dataclass
class Client:
    """The client's side of one session over two servers."""

    node: Node
    peers: list[str]
    model: str
    ranges: list[tuple[int, int]]
    streams: list[Stream]
    ids: list[str]
    numbers: Iterator[int]
    attempts: Iterator[int]

    @classmethod
    async def open(cls, node: Node, swarm: nbrunner.LocalSwarm, model: str) -> Client:
        peers = [server.peer_id for server in swarm.servers[:2]]
        ranges = [server.blocks for server in swarm.servers[:2]]
        client = cls(node, peers, model, ranges, [], [], itertools.count(1), itertools.count(1))
        for index in range(2):
            await client.add(index, peers[0] if index else None)
        return client

    async def add(self, index: int, upstream: str | None) -> None:
        stream, session = await open_session(self.node, self.peers[index], self.model, self.ranges[index], upstream)
        self.streams[index : index + 1] = [stream]
        self.ids[index : index + 1] = [session]

    def route(self, *positions: int, rebuild: Sequence[bool] = (False, False)) -> list[Hop]:
        return [
            Hop(self.peers[index], self.ids[index], *self.ranges[index], positions[index], rebuild[index])
            for index in range(2)
        ]

    async def send(
        self,
        step: int,
        begin: int,
        tensor: torch.Tensor,
        *,
        route: list[Hop],
        end: int | None = None,
        reply_from: int | None = None,
        attempt: int | None = None,
        ops: Sequence[CacheOp] = (),
        capture: bool = False,
        more: Sequence[RawTensor] = (),
    ) -> int:
        attempt = next(self.attempts) if attempt is None else attempt
        message = Step(
            step,
            attempt,
            begin,
            begin + tensor.shape[1] if end is None else end,
            begin if reply_from is None else reply_from,
            route,
            list(ops),
            capture=capture,
        )
        await self.streams[0].send(message, [pack("hidden", tensor), *more])
        return attempt

    async def result(self, tokens: int, batch: int = 1) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        while sum(part.shape[1] for part in parts) < tokens:
            message, tensors = await receive(self.streams[1])
            assert isinstance(message, StepResult), message
            parts.append(take(tensors, "hidden", dtype=torch.bfloat16, shape=[batch, None, WIDTH]))
        return torch.cat(parts, 1)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


async def receive(stream: Stream, seconds: float = 20) -> tuple[AnyMessage, Mapping[str, RawTensor]]:
    async with asyncio.timeout(seconds):
        return await stream.receive()


async def open_session(
    node: Node, peer: str, model: str, blocks: tuple[int, int], upstream: str | None = None
) -> tuple[Stream, str]:
    stream = await node.open_stream(peer)
    session = secrets.token_hex(16)
    await stream.send(OpenSession(session, model, *blocks, upstream))
    answer, _ = await receive(stream)
    if isinstance(answer, Refused):
        raise PeerRefusedError(answer.reason, peer=peer, code=answer.code, retry_after=answer.retry_after)
    assert answer == SessionOpened(session, True)
    return stream, session


async def info(node: Node, peer: str) -> Info:
    stream = await node.open_stream(peer)
    try:
        await stream.send(GetInfo())
        answer, _ = await receive(stream)
        assert isinstance(answer, Info)
        return answer
    finally:
        stream.close()


async def eventually(condition: Callable[[], Coroutine[Any, Any, bool]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


# -- what they compute -------------------------------------------------------------------------------------------


def test_a_chained_session_computes_what_the_blocks_compute(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    parts = [hidden(7, seed=1), hidden(1, seed=2), hidden(1, seed=3)]

    async def talk() -> list[torch.Tensor]:
        client = await Client.open(node, swarm, uid)
        outputs, at = [], 0
        for number, tensor in enumerate(parts, 1):
            await client.send(number, at, tensor, route=client.route(at, at))
            outputs.append(await client.result(tensor.shape[1]))
            at += tensor.shape[1]
        client.close()
        return outputs

    outputs = run(talk())
    for count, output in enumerate(outputs, 1):
        assert torch.equal(output, through(spans, parts[:count]))


def test_parts_masks_and_beams(swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]) -> None:
    prompt, token = hidden(6, batch=2, seed=4), hidden(1, batch=3, seed=5)
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[0, :2] = False
    later = torch.cat([mask[[1, 0, 0]], torch.ones((3, 1), dtype=torch.bool)], 1)

    async def talk() -> list[torch.Tensor]:
        client = await Client.open(node, swarm, uid)
        attempt = None
        for begin in (0, 4):
            tensor = prompt[:, begin : begin + 4]
            attempt = await client.send(
                1,
                begin,
                tensor,
                route=client.route(0, 0),
                end=6,
                reply_from=0,
                attempt=attempt,
                more=[pack("mask", mask)],
            )
        first = await client.result(6, batch=2)
        select = [CacheOp("select", rows=[1, 0, 0])]
        await client.send(2, 6, token, route=client.route(6, 6), ops=select, more=[pack("mask", later)])
        second = await client.result(1, batch=3)
        client.close()
        return [first, second]

    first, second = run(talk())
    caches = [span.new_cache() for span in spans]
    expected = []
    for begin, end in ((0, 4), (4, 6)):
        state = prompt[:, begin:end]
        for span, cache in zip(spans, caches, strict=True):
            state = span.forward(state, cache=cache, attention_mask=mask[:, :end]).hidden
        expected.append(state)
    assert torch.equal(first, torch.cat(expected, 1))
    state = token
    for span, cache in zip(spans, caches, strict=True):
        assert cache is not None
        cache.select([1, 0, 0])
        state = span.forward(state, cache=cache, attention_mask=later).hidden
    assert torch.equal(second, state)


def test_capture_sends_what_enters_each_block_and_again_on_a_retry(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    tensor = hidden(3, seed=6)

    async def talk() -> list[tuple[AnyMessage, torch.Tensor]]:
        client = await Client.open(node, swarm, uid)
        found = []
        for _ in range(2):
            await client.send(1, 0, tensor, route=client.route(0, 0), capture=True)
            for stream, blocks in zip(client.streams, client.ranges, strict=True):
                message, tensors = await receive(stream)
                shape = [blocks[1] - blocks[0], 1, 3, WIDTH]
                found.append((message, take(tensors, "states", dtype=torch.bfloat16, shape=shape)))
            await client.result(3)
        client.close()
        return found

    found = run(talk())
    first = spans[0].forward(tensor, cache=spans[0].new_cache(), collect=True)
    second = spans[1].forward(first.hidden, cache=spans[1].new_cache(), collect=True)
    for attempt in (0, 2):
        assert torch.equal(found[attempt][1], torch.stack(first.collected))
        assert torch.equal(found[attempt + 1][1], torch.stack(second.collected))
    assert [(m.start, m.end, m.position) for m, _ in found[:2] if isinstance(m, Captured)] == [(0, 3, 0), (3, 8, 0)]


def test_forward_and_backward_without_a_session(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    tensor, grad = hidden(5, batch=2, seed=7), hidden(5, batch=2, seed=8)

    async def talk() -> list[torch.Tensor]:
        stream = await node.open_stream(swarm.servers[1].peer_id)
        await stream.send(Forward(uid, 4, 7, capture=True), [pack("hidden", tensor)])
        message, tensors = await receive(stream)
        assert isinstance(message, ForwardResult)
        output = take(tensors, "hidden", dtype=torch.bfloat16, shape=[2, 5, WIDTH])
        states = take(tensors, "states", dtype=torch.bfloat16, shape=[3, 2, 5, WIDTH])
        await stream.send(Backward(uid, 4, 7), [pack("hidden", tensor), pack("grad", grad)])
        message, tensors = await receive(stream)
        assert isinstance(message, BackwardResult)
        stream.close()
        return [output, states, take(tensors, "grad", dtype=torch.bfloat16, shape=[2, 5, WIDTH])]

    output, states, gradient = run(talk())
    expected = spans[1].forward(tensor, start=4, end=7, collect=True)
    assert torch.equal(output, expected.hidden)
    assert torch.equal(states, torch.stack(expected.collected))
    assert torch.equal(gradient, spans[1].backward(tensor, grad, start=4, end=7).hidden)


# -- repetition and recovery -------------------------------------------------------------------------------------


def test_a_repeated_step_is_answered_again_and_computed_once(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(4, seed=9), hidden(1, seed=10)

    async def talk() -> tuple[list[torch.Tensor], int]:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(4)
        answers = []
        for _ in range(3):
            await client.send(2, 4, token, route=client.route(4, 4), ops=[CacheOp("crop", 4)])
            answers.append(await client.result(1))
        await client.streams[1].send(Ping(5))
        pong, _ = await receive(client.streams[1])
        client.close()
        assert isinstance(pong, Pong)
        return answers, pong.length

    answers, length = run(talk())
    assert length == 5
    for answer in answers:
        assert torch.equal(answer, through(spans, [prompt, token]))


def test_a_new_second_server_is_filled_by_the_first(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(9, seed=11), hidden(1, seed=12)

    async def talk() -> torch.Tensor:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(9)
        client.streams[1].close()  # the second server forgets the session; another takes its place
        await client.add(1, client.peers[0])
        await client.send(2, 9, token, route=client.route(9, 0, rebuild=(False, True)))
        output = await client.result(1)
        client.close()
        return output

    assert torch.equal(run(talk()), through(spans, [prompt, token]))


def test_a_new_first_server_is_filled_by_the_client_and_the_second_sees_only_new_tokens(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(9, seed=13), hidden(1, seed=14)

    async def talk() -> tuple[torch.Tensor, int]:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(9)
        client.streams[0].close()
        await client.add(0, None)
        everything = torch.cat([prompt, token], 1)
        await client.send(2, 0, everything, route=client.route(0, 9, rebuild=(True, False)), reply_from=9)
        output = await client.result(1)
        await client.streams[1].send(Ping(1))
        pong, _ = await receive(client.streams[1])
        client.close()
        assert isinstance(pong, Pong)
        return output, pong.length

    output, length = run(talk())
    assert length == 10
    # ten tokens at once and nine and one differ in the last bit of bfloat16
    torch.testing.assert_close(output, through(spans, [prompt, token]), atol=0.15, rtol=0.05)


def test_rolling_back(swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]) -> None:
    prompt, wrong, right = hidden(6, seed=15), hidden(1, seed=16), hidden(1, seed=17)

    async def talk() -> torch.Tensor:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(6)
        await client.send(2, 6, wrong, route=client.route(6, 6))
        await client.result(1)
        await client.send(3, 6, right, route=client.route(6, 6), ops=[CacheOp("crop", 6)])
        output = await client.result(1)
        client.close()
        return output

    assert torch.equal(run(talk()), through(spans, [prompt, right]))


# -- what they refuse --------------------------------------------------------------------------------------------


def failure(swarm: nbrunner.LocalSwarm, node: Node, uid: str, *bad: RawTensor, **changes: Any) -> StepFailed:
    """The answer to a first step with these tensors and fields; the session must work afterwards."""

    async def talk() -> StepFailed:
        client = await Client.open(node, swarm, uid)
        route = client.route(0, 0)
        step = Step(1, next(client.attempts), 0, 3, 0, route)
        await client.streams[0].send(msgspec.structs.replace(step, **changes), bad)
        message, _ = await receive(client.streams[0])
        await client.send(1, 0, hidden(3), route=route, attempt=99)
        await client.result(3)
        client.close()
        assert isinstance(message, StepFailed), message
        return message

    return run(talk())


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [pack("hidden", hidden(3).float())],
        [pack("hidden", hidden(3)[:, :, :64])],
        [pack("hidden", hidden(3)[0])],
        [pack("hidden", torch.full((1, 3, WIDTH), float("nan"), dtype=torch.bfloat16))],
        [pack("hidden", torch.full((1, 3, WIDTH), float("inf"), dtype=torch.bfloat16))],
        [pack("hidden", hidden(3)), pack("mask", torch.ones((1, 2), dtype=torch.bool))],
        [pack("hidden", hidden(3)), pack("mask", torch.ones((1, 3)))],
        [pack("hidden", hidden(3)), pack("positions", torch.tensor([[0, 1, -1]]))],
        [pack("hidden", hidden(3)), pack("positions", torch.tensor([[0, 1, 10**9]]))],
        [pack("hidden", hidden(3)), pack("positions", torch.tensor([[0, 1]]))],
        [pack("hidden", hidden(3)), pack("carry.x", hidden(3))],
    ],
    ids=["none", "dtype", "width", "rank", "nan", "inf", "mask", "mask-dtype", "negative", "far", "few", "carry"],
)
def test_bad_tensors_are_refused_and_the_session_goes_on(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, tensors: list[RawTensor]
) -> None:
    assert failure(swarm, node, uid, *tensors).code == "data"


def test_steps_that_do_not_fit_are_refused(swarm: nbrunner.LocalSwarm, node: Node, uid: str) -> None:
    good = pack("hidden", hidden(3))
    assert failure(swarm, node, uid, good, position=4, end=7).code == "position"
    assert failure(swarm, node, uid, good, end=10**9).code == "limit"
    elsewhere = [Hop(swarm.servers[1].peer_id, "a" * 32, 0, 3)]
    assert failure(swarm, node, uid, good, route=elsewhere).code == "session"


def test_another_model_and_other_blocks_are_refused_by_name(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str
) -> None:
    peer = swarm.servers[0].peer_id
    with pytest.raises(PeerRefusedError) as refusal:
        run(open_session(node, peer, "tiny@0000", (0, 3)))
    assert refusal.value.code == "model"
    assert uid in str(refusal.value)
    assert "tiny@0000" in str(refusal.value)
    with pytest.raises(PeerRefusedError) as refusal:
        run(open_session(node, peer, uid, (0, 4)))
    assert refusal.value.code == "blocks"


def test_only_the_named_upstream_may_push(swarm: nbrunner.LocalSwarm, node: Node, uid: str) -> None:
    async def talk() -> list[str]:
        other = await Node.create(invite=Invite.parse(swarm.make_invite(role="host")), client_mode=True)
        codes = []
        try:
            mine, session = await open_session(
                node, swarm.servers[1].peer_id, uid, (3, 8), swarm.servers[0].peer_id
            )
            for attacker in (node, other):
                stream = await attacker.open_stream(swarm.servers[1].peer_id)
                await stream.send(AttachSession(session))
                answer, _ = await receive(stream)
                assert isinstance(answer, Refused)
                codes.append(answer.code)
                stream.close()
            await mine.send(Relink(other.peer_id))
            assert (await receive(mine))[0] == Relinked()
            stream = await other.open_stream(swarm.servers[1].peer_id)
            await stream.send(AttachSession(session))
            codes.append(type((await receive(stream))[0]).__name__)
            await mine.send(Relink(None))
            assert (await receive(mine))[0] == Relinked()
            with pytest.raises(PeerUnreachableError):
                await receive(stream)
            mine.close()
        finally:
            await other.close()
        return codes

    assert run(talk()) == ["role", "session", "Attached"]


def test_a_next_hop_that_cannot_be_reached_is_named(swarm: nbrunner.LocalSwarm, node: Node, uid: str) -> None:
    nobody = "12D3KooWKep1ecBb9Gu5mSCRZJ6SeJvrsDNxbi5YEF3XNpKqcpFt"

    async def talk() -> AnyMessage:
        client = await Client.open(node, swarm, uid)
        route = [client.route(0, 0)[0], Hop(nobody, "b" * 32, 3, 8)]
        await client.send(1, 0, hidden(2), route=route)
        answer, _ = await receive(client.streams[0])
        client.close()
        return answer

    answer = run(talk())
    assert isinstance(answer, StepFailed)
    assert (answer.code, answer.peer) == ("link", nobody)


def test_requests_over_the_limits_are_refused(swarm: nbrunner.LocalSwarm, node: Node, uid: str) -> None:
    async def refused(message: AnyMessage, tensors: Sequence[RawTensor]) -> str:
        stream = await node.open_stream(swarm.servers[0].peer_id)
        try:
            await stream.send(message, tensors)
            answer, _ = await receive(stream)
            assert isinstance(answer, Refused), answer
            return answer.code
        finally:
            stream.close()

    big = torch.zeros((129, 1, WIDTH), dtype=torch.bfloat16)
    long = torch.zeros((1, 8193, WIDTH), dtype=torch.bfloat16)
    assert run(refused(Forward(uid, 0, 3), [pack("hidden", big)])) == "limit"
    assert run(refused(Forward(uid, 0, 3), [pack("hidden", long)])) == "limit"
    assert run(refused(Forward(uid, 0, 3), [pack("hidden", hidden(2).float())])) == "data"
    assert run(refused(Backward(uid, 0, 3), [pack("hidden", hidden(2))])) == "data"
    assert run(refused(Forward(uid, 0, 9), [pack("hidden", hidden(2))])) == "blocks"
    assert run(refused(CloseSession(), [])) == "schema"


def test_quotas_of_an_invite(swarm: nbrunner.LocalSwarm, uid: str) -> None:
    invite = Invite.parse(swarm.make_invite(max_sessions=2, tokens_per_second=1.0))

    async def talk() -> tuple[PeerRefusedError, Refused]:
        guest = await Node.create(invite=invite, client_mode=True)
        try:
            peer = swarm.servers[0].peer_id
            streams = [(await open_session(guest, peer, uid, (0, 3)))[0] for _ in range(2)]
            with pytest.raises(PeerRefusedError) as refusal:
                await open_session(guest, peer, uid, (0, 3))
            streams[0].close()

            async def free() -> bool:
                try:
                    (await open_session(guest, peer, uid, (0, 3)))[0].close()
                except PeerRefusedError:
                    return False
                return True

            await eventually(free)
            stream = await guest.open_stream(peer)
            answers = []
            for _ in range(2):
                await stream.send(Forward(uid, 0, 3), [pack("hidden", hidden(40))])
                answers.append((await receive(stream))[0])
            assert isinstance(answers[0], ForwardResult)
            assert isinstance(answers[1], Refused)
            return refusal.value, answers[1]
        finally:
            await guest.close()

    sessions, tokens = run(talk())
    assert sessions.code == "limit"
    assert tokens.code == "limit"
    assert tokens.retry_after is not None
    assert tokens.retry_after > 20


def test_caches_are_freed_when_the_stream_ends_in_the_middle_of_a_step(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str
) -> None:
    peer = swarm.servers[0].peer_id

    async def talk() -> None:
        async def unused() -> bool:
            record = (await info(node, peer)).record
            return record.sessions == 0 and record.cache_bytes_left == (await info(node, peer)).limits.cache_bytes

        await eventually(unused)
        client = await Client.open(node, swarm, uid)
        for part in range(4):
            await client.send(
                1, part * 512, hidden(512), route=client.route(0, 0), end=2048, attempt=1, reply_from=0
            )
        client.close()
        await eventually(unused)

    run(talk())


# -- strangers and garbage ---------------------------------------------------------------------------------------


def test_whoever_has_no_good_invite_is_refused(swarm: nbrunner.LocalSwarm, node: Node) -> None:
    peer = swarm.servers[0].peer_id
    credential = node.credential
    try:
        for shown, word in (
            (b"", "private"),
            (b"\x00" * 40, "credential"),
            (credential[:-1] + b"x", "another peer"),
        ):
            node.credential = shown
            with pytest.raises(PeerRefusedError, match=word) as refusal:
                run(node.open_stream(peer))
            assert refusal.value.code == "credential"
    finally:
        node.credential = credential


garbage = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda header: PREFIX.pack(len(header), 0) + header),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)).map(lambda sizes: PREFIX.pack(*sizes)),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=10,
    ).map(lambda value: _framed(msgspec.msgpack.encode(value))),
    st.sampled_from(["step", "opensession", "forward", "backward", "attachsession", "getinfo", "welcome"]).map(
        lambda kind: _framed(msgspec.msgpack.encode([{"type": kind, "step": -1, "session": "x", "route": []}, []]))
    ),
    st.sampled_from(["hidden", "mask", "grad"]).map(
        lambda name: _framed(
            msgspec.msgpack.encode([Forward("tiny", 0, 3), [[name, "bfloat16", [2**31, 2**31, 2**31]]]])
        )
    ),
)


def _framed(header: bytes) -> bytes:
    return PREFIX.pack(len(header), 0) + header


@given(data=garbage, in_session=st.booleans())
@settings(max_examples=60, derandomize=True)
def test_garbage_ends_the_stream_and_nothing_else(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, data: bytes, in_session: bool
) -> None:
    peer = swarm.servers[0].peer_id

    async def talk() -> None:
        stream = (await open_session(node, peer, uid, (0, 3)))[0] if in_session else await node.open_stream(peer)
        stream._protocol.write([data, PREFIX.pack(2**31, 2**31)])
        with contextlib.suppress(PeerUnreachableError, TimeoutError):  # it may rightly wait for the rest of a frame
            for _ in range(5):
                answer, _ = await receive(stream, 0.2)
                assert not isinstance(answer, SessionOpened | ForwardResult)
        stream.close()
        async with asyncio.timeout(5):
            well = await node.open_stream(peer)
            await well.send(Ping(7))
            assert (await well.receive())[0] == Pong(7)
            well.close()

    run(talk())


numbers = st.integers(0, 6) | st.sampled_from([2**20, 2**40])
cache_ops = st.builds(
    CacheOp,
    st.sampled_from(["crop", "select", "repeat", "reset"]),
    numbers,
    st.lists(st.integers(0, 3), max_size=4),
)
wild_tensors = st.tuples(
    st.sampled_from(["hidden", "mask", "positions", "carry.1", "other"]),
    st.builds(
        lambda sizes, last: [*sizes, *last], st.lists(st.integers(0, 5), max_size=3), st.sampled_from([[], [WIDTH]])
    ),
    st.sampled_from([torch.bfloat16, torch.bool, torch.int64, torch.float32]),
)

edit_tensors = st.tuples(
    st.sampled_from(["edit.0", "edit.1", "final", "grad"]),
    st.sampled_from([[], [WIDTH], [1, 2, WIDTH]]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)


@given(
    steps=st.lists(
        st.tuples(
            st.fixed_dictionaries(
                {
                    "step": numbers,
                    "attempt": numbers,
                    "position": numbers,
                    "end": numbers,
                    "reply_from": numbers,
                    "positions_from": numbers,
                    "capture": st.booleans(),
                    "ops": st.lists(cache_ops, max_size=2),
                }
            ),
            numbers,
            st.booleans(),
            st.integers(0, 4),
            st.lists(wild_tensors, max_size=2),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, derandomize=True)
def test_steps_of_any_numbers_are_answered_or_refused(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, steps: list[Any]
) -> None:
    server = swarm.servers[0]

    async def talk() -> None:
        stream, session = await open_session(node, server.peer_id, uid, (0, 3))
        try:
            for fields, held, rebuild, tokens, wild in steps:
                route = [Hop(server.peer_id, session, 0, 3, held, rebuild)]
                tensors = {"hidden": pack("hidden", hidden(tokens, batch=1 + tokens % 2))}
                tensors |= {name: pack(name, torch.zeros(shape, dtype=dtype)) for name, shape, dtype in wild}
                await stream.send(Step(route=route, **fields), list(tensors.values()))
            await stream.send(Ping(1))
            while True:
                answer, _ = await receive(stream)
                assert isinstance(answer, StepFailed | StepResult | Captured | Pong), answer
                if isinstance(answer, StepFailed):
                    assert answer.code in ("position", "data", "limit", "full"), answer
                if isinstance(answer, Pong):
                    break
        finally:
            stream.close()

    run(talk())
    assert "Traceback" not in server.log


@given(data=st.data(), in_session=st.booleans())
@settings(max_examples=120, derandomize=True, deadline=None)
def test_messages_of_every_kind_are_answered_or_refused(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, data: st.DataObject, in_session: bool
) -> None:
    server, other = swarm.servers
    session = secrets.token_hex(16)
    near = {
        "model": st.sampled_from([uid, uid, uid, "other@1"]),
        "start": st.integers(0, 3),
        "end": st.integers(0, 4),
        "layer": st.integers(0, 4),
        "vector": st.none() | st.integers(0, 1),
        "session": st.sampled_from([session, "0" * 32]),
        "peer": st.sampled_from([server.peer_id, other.peer_id]),
        "upstream": st.none() | st.sampled_from([other.peer_id, node.peer_id]),
    }
    message = data.draw(any_message(fields=near))
    tensors = {"hidden": pack("hidden", hidden(data.draw(st.integers(1, 3))))}
    wild = data.draw(st.lists(wild_tensors | edit_tensors, max_size=3))
    tensors |= {name: pack(name, torch.ones(shape).to(dtype)) for name, shape, dtype in wild}
    sent = list(tensors.values()) if data.draw(st.booleans()) else []

    async def talk() -> None:
        stream = await node.open_stream(server.peer_id)
        try:
            if in_session:
                await stream.send(OpenSession(session, uid, 0, 3))
                assert isinstance((await receive(stream))[0], SessionOpened)
            await stream.send(message, sent)
            if not isinstance(message, OpenSession | AttachSession):
                await stream.send(Ping(1))
            for _ in range(6):
                answer, _ = await receive(stream, 0.5)
                assert getattr(answer, "code", "") != "internal", answer
                if isinstance(answer, Pong | Refused):
                    break
        except (PeerUnreachableError, TimeoutError):
            pass  # it ended the stream, or there is nothing to say
        finally:
            stream.close()
        async with asyncio.timeout(5):
            well = await node.open_stream(server.peer_id)
            await well.send(Ping(7))
            assert (await well.receive())[0] == Pong(7)
            well.close()

    run(talk())
    assert "Traceback" not in server.log


# -- leaving -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[nbrunner.LocalSwarm]:
    """Servers with room for some 200 tokens."""
    with nbrunner.LocalSwarm("tiny", ["0:3", "3:8"], cache_bytes=200_000) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def small_node(small: nbrunner.LocalSwarm) -> Iterator[Node]:
    node = run(Node.create(invite=Invite.parse(small.invite), client_mode=True))
    yield node
    run(node.close())


def test_a_full_server_says_so_and_has_room_again_when_a_session_ends(
    small: nbrunner.LocalSwarm, small_node: Node, uid: str
) -> None:
    server = small.servers[0]

    async def talk() -> list[AnyMessage]:
        answers = []
        first, one = await open_session(small_node, server.peer_id, uid, (0, 3))
        second, two = await open_session(small_node, server.peer_id, uid, (0, 3))
        for stream, session in ((first, one), (second, two)):
            step = Step(1, 1, 0, 130, 129, [Hop(server.peer_id, session, 0, 3)])
            await stream.send(step, [pack("hidden", hidden(130, seed=len(answers)))])
            answers.append((await receive(stream))[0])
        first.close()

        async def fits() -> bool:
            step = Step(1, 2 + len(answers), 0, 130, 129, [Hop(server.peer_id, two, 0, 3)])
            await second.send(step, [pack("hidden", hidden(130, seed=1))])
            answers.append((await receive(second))[0])
            return isinstance(answers[-1], StepResult)

        await eventually(fits)
        second.close()
        return answers

    answers = run(talk())
    assert isinstance(answers[0], StepResult)
    assert isinstance(answers[1], StepFailed)
    assert answers[1].code == "full"


def test_a_server_that_leaves_serves_its_sessions_and_takes_no_new_ones(
    small: nbrunner.LocalSwarm, small_node: Node, uid: str
) -> None:
    async def talk(swarm: nbrunner.LocalSwarm, node: Node) -> None:
        server = swarm.servers[0]
        stream, session = await open_session(node, server.peer_id, uid, (0, 3))
        asyncio.get_running_loop().call_later(0.1, server._process.terminate)
        message, _ = await receive(stream)
        assert isinstance(message, Draining)
        with pytest.raises(PeerRefusedError) as refusal:
            await open_session(node, server.peer_id, uid, (0, 3))
        assert refusal.value.code == "draining"
        step = Step(1, 1, 0, 2, 0, [Hop(server.peer_id, session, 0, 3)])
        await stream.send(step, [pack("hidden", hidden(2))])
        assert isinstance((await receive(stream))[0], StepResult)
        states = {peer: record.state for peer, record in (await node.fetch_records()).items()}
        assert states[server.peer_id] == "draining"
        stream.close()
        async with asyncio.timeout(10):
            assert await asyncio.to_thread(server._process.wait) == 0
        records = await node.fetch_records()
        assert server.peer_id not in records or records[server.peer_id].state == "offline"

    run(talk(small, small_node))
