"""What a server allows one peer: said to everybody who connects, held to, and no hindrance to other peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_until
from inprocess_swarm import InProcessSwarm
from server_client import hidden, info, open_session, receive, run

from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.requests import Forward, ForwardResult
from nbrunner.protocol.steps import Hop, Step, StepFailed, StepResult
from nbrunner.protocol.tensors import pack
from nbrunner.server.runner import BlockServer
from nbrunner.swarm.node import Node

pytestmark = pytest.mark.network

SHARE = 600_000
"""Bytes of a session of some 130 tokens over all blocks of the bundled model, and not of two."""

LIMITS = Limits(
    cache_bytes=8 << 20,
    session_tokens=2048,
    peer_cache_bytes=SHARE,
    sessions=3,
    waiting=1,
    wait_seconds=0.4,
)


@pytest.fixture(scope="module")
def swarm(tiny_path: Path) -> Iterator[InProcessSwarm]:
    swarm = InProcessSwarm(tiny_path)
    swarm.add(0, 8, limits=LIMITS, dtype="bfloat16")
    yield swarm
    swarm.close()


@pytest.fixture
def peers(swarm: InProcessSwarm) -> Iterator[list[Node]]:
    nodes = [run(Node.create(invite=swarm.invite, client_mode=True)) for _ in range(2)]
    yield nodes
    for node in nodes:
        run(node.close())


async def fill(stream: Any, session: str, server: BlockServer, tokens: int = 130, attempt: int = 1) -> Any:
    """The answer to a step of so many tokens in a session that holds none; no two sessions say the same."""
    hop = Hop(server.node.peer_id, session, 0, 8)
    await stream.send(
        Step(1, attempt, 0, tokens, tokens - 1, [hop]), [pack("hidden", hidden(tokens, seed=int(session[:6], 16)))]
    )
    return (await receive(stream))[0]


def test_memory_and_sessions_of_a_peer(swarm: InProcessSwarm, peers: list[Node]) -> None:
    (server,), (greedy, modest) = swarm.servers, peers
    peer, uid = server.node.peer_id, server.host.model

    async def talk() -> None:
        said = (await info(greedy, peer)).limits
        assert said == server.host.limits
        for name in ("sessions", "cache_bytes", "peer_cache_bytes", "waiting", "wait_seconds", "tokens_per_second"):
            assert getattr(said, name) == getattr(LIMITS, name)
        opened = [await open_session(greedy, peer, uid, (0, 8)) for _ in range(3)]
        with pytest.raises(PeerRefusedError, match="may have 3"):
            await open_session(greedy, peer, uid, (0, 8))
        assert isinstance(await fill(*opened[0], server), StepResult)
        refused = await fill(*opened[1], server)
        assert isinstance(refused, StepFailed)
        assert refused.code == "full"
        assert f"of the {SHARE} bytes that you may have here" in refused.reason
        assert isinstance(await fill(*opened[2], server, 2), StepResult)  # there is a little left
        other = await open_session(modest, peer, uid, (0, 8))
        assert isinstance(await fill(*other, server), StepResult)
        opened[0][0].close()
        answers = [refused]

        async with asyncio.timeout(10):
            while not isinstance(answers[-1], StepResult):
                answers.append(await fill(*opened[1], server, attempt=1 + len(answers)))
        for stream, _ in [*opened[1:], other]:
            stream.close()

    run(talk())
    wait_until(lambda: server.host.quotas.bytes_used == 0, what="all memory is free again")
    assert server.host.quotas.bytes_of_peer(greedy.peer_id) == 0


def test_tokens_per_second_of_a_peer(swarm: InProcessSwarm, peers: list[Node]) -> None:
    limits = Limits(cache_bytes=8 << 20, session_tokens=2048, tokens_per_second=1.0)
    server, (greedy, modest) = swarm.add(0, 8, limits=limits, dtype="bfloat16"), peers

    async def ask(node: Node) -> list[Any]:
        stream = await node.open_stream(server.node.peer_id)
        answers = []
        for _ in range(2):
            await stream.send(Forward(server.host.model, 0, 8), [pack("hidden", hidden(40))])
            answers.append((await receive(stream))[0])
        stream.close()
        return answers

    async def talk() -> None:
        assert (await info(greedy, server.node.peer_id)).limits.tokens_per_second == 1.0
        for node in (greedy, modest):  # each has its own
            first, second = await ask(node)
            assert isinstance(first, ForwardResult)
            assert isinstance(second, Refused)
            assert second.code == "limit"
            assert "your 1 tokens per second" in second.reason
            assert second.retry_after is not None

    run(talk())
    swarm.remove(server)
