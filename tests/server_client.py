"""Two real server processes with the bundled model, and a client that speaks the protocol to them by hand."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.sessions import OpenSession, SessionOpened
from nbrunner.protocol.status import GetInfo, Info
from nbrunner.protocol.steps import CacheOp, Hop, Step, StepResult
from nbrunner.protocol.tensors import pack, take
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

T = TypeVar("T")

WIDTH = 128
"""Of the bundled model."""


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


@dataclass
class Client:
    """The client's side of one session over two servers."""

    node: Node
    peers: list[str]
    model: str
    ranges: list[tuple[int, int]]
    streams: list[Stream]
    ids: list[str]
    attempts: Iterator[int]

    @classmethod
    async def open(cls, node: Node, swarm: nbrunner.LocalSwarm, model: str) -> Client:
        peers = [server.peer_id for server in swarm.servers[:2]]
        ranges = [server.blocks for server in swarm.servers[:2]]
        client = cls(node, peers, model, ranges, [], [], itertools.count(1))
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
