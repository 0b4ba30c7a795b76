"""Strangers, garbage, and messages of every kind with any values: answered or refused, and servers go on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from server_client import WIDTH, hidden, node, open_session, receive, run, swarm, uid
from wire_messages import any_message

import nbrunner
from nbrunner.errors import PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.frames import PREFIX
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.requests import Forward, ForwardResult
from nbrunner.protocol.sessions import AttachSession, OpenSession, SessionOpened
from nbrunner.protocol.status import Ping, Pong
from nbrunner.protocol.steps import CacheOp, Captured, Hop, Step, StepFailed, StepResult
from nbrunner.protocol.tensors import pack
from nbrunner.swarm.node import Node

__all__ = ["node", "swarm", "uid"]

pytestmark = pytest.mark.network


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
