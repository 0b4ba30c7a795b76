"""What real server processes refuse, by the name of the reason, and that they go on: tensors, steps, peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
from server_client import WIDTH, Client, eventually, hidden, node, open_session, receive, run, swarm, uid

import nbrunner
from nbrunner.errors import PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.requests import Backward, Forward, ForwardResult
from nbrunner.protocol.sessions import AttachSession, CloseSession, Draining, Relink, Relinked
from nbrunner.protocol.steps import Hop, Step, StepFailed, StepResult
from nbrunner.protocol.tensors import pack
from nbrunner.swarm.node import Node

__all__ = ["node", "swarm", "uid"]

pytestmark = pytest.mark.network


# -- steps, sessions and requests --------------------------------------------------------------------------------


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


# -- no room, and leaving ----------------------------------------------------------------------------------------


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
