"""Those who average, over real streams and daemons: honest ones, late ones, dead ones and liars."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from nbrunner.errors import PeerRefusedError, UserInputError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.together import BeginRound, GetTeachingState, JoinTeaching, Teaching, TensorShape
from nbrunner.swarm import control
from nbrunner.swarm.daemon import start_p2p
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream
from nbrunner.tuning.together_averaging import Averaging
from nbrunner.tuning.together_channel import Settings
from nbrunner.tuning.together_session import TeachingSession

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]

KEY = SwarmKey()
SETTINGS = Settings(every_steps=10, patience=2.0, exchange=8.0, farewell=10.0)
SIZE = 3000
TAUGHT = Teaching("facts", "lora", [TensorShape("a", [10, 100]), TensorShape("b", [2000])])


def run(coroutine: Coroutine[Any, Any, Any], timeout: float = 100.0) -> Any:
    return EngineLoop.get().run(coroutine, timeout)


@pytest.fixture(scope="module")
def host() -> Iterator[Node]:
    async def nothing(stream: Stream) -> None:
        await stream.receive()

    async def start() -> Node:
        node = await Node.create(swarm_key=KEY)
        await node.serve(nothing, Limits())
        return node

    node = run(start())
    yield node
    run(node.close())


@asynccontextmanager
async def teachers(host: Node, *values: float, name: str, settings: Settings = SETTINGS) -> Any:
    """One session for each value, its parameters all zero and then moved there by ten steps of training."""
    taught = Teaching(name, TAUGHT.method, TAUGHT.parameters)
    sessions: list[TeachingSession] = []
    try:
        for _ in values:
            invite = KEY.invite(host.addresses)
            sessions.append(await TeachingSession.create(invite, taught, torch.zeros(SIZE), settings))
        for session in sessions:
            session.note(steps=10, samples=40, fresh=40, paused=False)
        for session in sessions:
            await until(lambda session=session: len(session._views_of_others()) == len(values) - 1)
        yield sessions, [torch.full((SIZE,), value) for value in values]
    finally:
        await asyncio.gather(*(session.close() for session in sessions))


async def until(condition: Any, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - of state that has no event
            await asyncio.sleep(0.02)


async def average_all(sessions: list[TeachingSession], vectors: list[torch.Tensor]) -> list[Any]:
    return await asyncio.gather(
        *(one.average(vector, one.own.lineage) for one, vector in zip(sessions, vectors, strict=True))
    )


def participant(session: TeachingSession, of: TeachingSession) -> Any:
    return next(one for one in session.participants() if one.peer == of.peer_id)


# -- who belongs here ----------------------------------------------------------------------------------------


def test_everyone_gets_the_same_average(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 2.0, 3.0, name="same") as (sessions, vectors):
            sessions[2].note(steps=10, samples=80, fresh=80, paused=False)
            results = await average_all(sessions, vectors)
            for outcome, vector in results:
                assert outcome.kind == "averaged"
                assert outcome.round == 1
                assert len(outcome.peers) == 3
                # weighted by samples: (40 × 1 + 40 × 2 + 80 × 3) / 160
                torch.testing.assert_close(vector, torch.full((SIZE,), 2.25))
            seen = participant(sessions[0], sessions[2])
            assert (seen.steps, seen.samples, seen.rounds, seen.share) == (10, 80, 1, 0.5)
            assert seen.clipped == 0

    run(check())


def test_a_stranger_is_turned_away_at_every_door(host: Node) -> None:
    """Without an invite: by the streams, the directory, and the averaging, which has a door of its own."""
    from hivemind.proto import averaging_pb2

    async def check() -> None:
        async with teachers(host, 1.0, 2.0, name="doors") as (sessions, vectors):
            target = sessions[0]
            foreign = SwarmKey().invite(target._node.addresses)
            with pytest.raises(PeerRefusedError, match="belongs to another"):
                await TeachingSession.create(foreign, target._teaching, torch.zeros(SIZE), SETTINGS)
            daemon = await start_p2p(Identity.generate(), client_mode=True)
            try:
                address = target._node.addresses[0].rpartition("/p2p/")[0]
                await control.connect(daemon.socket, target.peer_id, [address])
                from hivemind.p2p import PeerID

                stub = Averaging.get_stub(
                    daemon.p2p, PeerID.from_base58(target.peer_id), namespace=target._averaging._prefix
                )

                async def parts() -> Any:
                    yield averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=b"g" * 16)

                answers = [one async for one in await stub.rpc_aggregate_part(parts())]
                assert [one.code for one in answers] == [averaging_pb2.PROTOCOL_VIOLATION]
            finally:
                await daemon.close()
            results = await average_all(sessions, vectors)
            assert [outcome.kind for outcome, _ in results] == ["averaged", "averaged"]

    run(check())


def test_a_member_of_the_swarm_who_did_not_join_gets_no_average_but_may_ask_what_is_taught(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, name="asked") as (sessions, _):
            target = sessions[0]
            node = await Node.create(invite=KEY.invite(host.addresses), client_mode=True)
            try:
                await node.connect(target.peer_id, [target._node.addresses[0].rpartition("/p2p/")[0]])
                stream = await node.open_stream(target.peer_id)
                await stream.send(GetTeachingState("asked", b"x" * 32))
                refused, _ = await stream.receive()
                assert refused.code == "teaching"
                stream = await node.open_stream(target.peer_id)
                await stream.send(JoinTeaching("other", b"x" * 32))
                refused, _ = await stream.receive()
                assert refused.code == "teaching"
                # one that joined must not begin rounds that are not its to begin, nor about others
                stream = await node.open_stream(target.peer_id)
                await stream.send(JoinTeaching("asked", target._teaching.digest))
                await stream.receive()
                waiting = asyncio.create_task(target.average(torch.ones(SIZE), target.own.lineage))
                await stream.send(BeginRound(b"g" * 16, 1, [target.peer_id], [1.0], [1]))
                await stream.send(GetTeachingState("asked", target._teaching.digest))
                outcome, _ = await waiting
                assert outcome.kind == "alone"
            finally:
                await node.close()

    run(check())


def test_another_configuration_is_told_what_differs(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, name="config"):
            other = Teaching("config", "prompt", [TensorShape("a", [10, 64]), TensorShape("c", [2])])
            with pytest.raises(UserInputError) as caught:
                await TeachingSession.create(KEY.invite(host.addresses), other, torch.zeros(other.values), SETTINGS)
            assert "their a is [10, 100], yours [10, 64]" in str(caught.value)
            assert "method 'lora', you 'prompt'" in str(caught.value)
        # and when those are gone, the name is free: their record alone keeps nobody out
        session = await TeachingSession.create(
            KEY.invite(host.addresses), other, torch.zeros(other.values), SETTINGS
        )
        await session.close()

    run(check())


# -- coming and going ----------------------------------------------------------------------------------------


def test_who_comes_late_starts_where_the_others_are(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, name="late") as (sessions, vectors):
            await average_all(sessions, vectors)
            taught = sessions[0]._teaching
            invite = KEY.invite(host.addresses)
            own = torch.full((SIZE,), 77.0)
            late = await TeachingSession.create(invite, taught, own, SETTINGS)
            try:
                torch.testing.assert_close(late.base, torch.full((SIZE,), 2.0))
                assert late.own.round == 1
                assert late.own.lineage == sessions[0].own.lineage
                everyone = [*sessions, late]
                for one in everyone:
                    one.note(steps=20, samples=80, fresh=40, paused=False)
                await until(lambda: all(len(one._views_of_others()) == 2 for one in everyone))
                results = await average_all(everyone, [torch.full((SIZE,), 2.0 + x) for x in (0.5, 1.0, 1.5)])
                for outcome, vector in results:
                    assert outcome.round == 2
                    torch.testing.assert_close(vector, torch.full((SIZE,), 3.0))
            finally:
                await late.close()
            await until(lambda: participant(sessions[0], late).state == "left")

    run(check())


def test_two_who_began_apart_go_on_from_one_of_them(host: Node) -> None:
    """Adapters with different beginnings cannot be averaged: the younger takes over the older's."""

    async def check() -> None:
        async with teachers(host, 1.0, 2.0, name="apart") as (sessions, _):
            older, younger = sessions
            younger.own.lineage, younger.base = b"\xff" * 16, torch.full((SIZE,), 9.0)
            await younger._mesh.say()
            await until(lambda: younger.own.lineage == older.own.lineage)
            outcome, vector = await younger.average(torch.full((SIZE,), 9.5), b"\xff" * 16)
            assert outcome.kind == "joined"
            torch.testing.assert_close(vector, older.base)

    run(check())


def test_a_peer_that_falls_silent_costs_its_patience_once(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, 5.0, name="silent") as (sessions, vectors):
            living = sessions[:2]
            began = time.monotonic()
            results = await average_all(living, vectors[:2])
            first = time.monotonic() - began
            assert [len(outcome.peers) for outcome, _ in results] == [2, 2]
            assert SETTINGS.patience * 0.9 <= first <= SETTINGS.patience + SETTINGS.exchange
            began = time.monotonic()
            await average_all(living, [vector for _, vector in results])
            assert time.monotonic() - began < first

    run(check())


def test_a_peer_that_dies_in_the_middle_of_the_exchange_does_not_hold_up_the_others(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, 5.0, name="dies") as (sessions, vectors):
            dying = sessions[2]

            async def die(*args: Any, **options: Any) -> Any:
                dying._node._daemon.process.kill()
                await asyncio.sleep(60)

            dying._averaging.average = die  # type: ignore[method-assign]
            doomed = asyncio.create_task(dying.average(vectors[2], dying.own.lineage))
            began = time.monotonic()
            results = await average_all(sessions[:2], vectors[:2])
            assert time.monotonic() - began < SETTINGS.patience + 2 * SETTINGS.exchange
            doomed.cancel()
            await asyncio.gather(doomed, return_exceptions=True)
            for outcome, vector in results:
                assert outcome.kind == "averaged"
                assert outcome.complete == 1.0  # a share that the dead one had to average was averaged once more
                torch.testing.assert_close(vector, torch.full((SIZE,), 2.0))

    run(check())


def test_who_has_finished_meets_the_others_at_the_end(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, name="end") as (sessions, vectors):
            first, second = sessions
            waiting = asyncio.create_task(first.finish(vectors[0], first.own.lineage, 20.0))
            outcome, vector = await second.average(vectors[1], second.own.lineage)
            assert outcome.kind == "averaged"
            second.note(steps=20, samples=80, fresh=40, paused=False)
            results = await asyncio.gather(
                waiting, second.finish(vector + 1.0, second.own.lineage, 20.0), return_exceptions=False
            )
            assert all(outcome.last for outcome, _ in results)
            torch.testing.assert_close(results[0][1], results[1][1])

    run(check())


def test_who_has_finished_does_not_wait_for_ever_for_one_that_hangs(host: Node) -> None:
    async def check() -> None:
        settings = Settings(every_steps=10, patience=1.0, exchange=8.0, farewell=1.5)
        async with teachers(host, 1.0, 3.0, 5.0, name="hangs", settings=settings) as (sessions, vectors):
            results = await asyncio.gather(
                *(
                    one.finish(vector, one.own.lineage, 1.5)
                    for one, vector in zip(sessions[:2], vectors, strict=False)
                )
            )
            for outcome, vector in results:
                assert not outcome.last
                torch.testing.assert_close(vector, torch.full((SIZE,), 2.0))

    run(check())


# -- liars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_what_is_not_a_number_is_refused_by_name_and_the_others_go_on(host: Node, poison: float) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, 5.0, name=f"poison{poison}") as (sessions, vectors):
            honest, liar = sessions[:2], sessions[2]
            vectors[2][::7] = poison
            results = await average_all(sessions, vectors)
            for _, vector in results[:2]:
                assert vector.min() >= 1.0  # no NaN either
                assert vector.max() <= 3.0
            said = [participant(one, liar).refused for one in honest]
            assert any("NaN, infinity or absurd" in words for words in said)
            # whoever knows begins no other round with it
            results = await average_all(honest, [vector for _, vector in results[:2]])
            assert all(1.0 <= vector.min() <= vector.max() <= 3.0 for _, vector in results)

    run(check())


def test_parts_of_a_wrong_size_are_refused(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, name="sizes") as (sessions, vectors):
            honest, liar = sessions
            averaged = liar._averaging.average

            async def longer(vector: torch.Tensor, *args: Any, **options: Any) -> Any:
                return await averaged(torch.full((SIZE + 500,), 5.0), *args, **options)

            liar._averaging.average = longer  # type: ignore[method-assign]
            (outcome, vector), _ = await average_all(sessions, vectors)
            # whichever of the two averaged the one share there is: nothing of the liar is in it
            torch.testing.assert_close(vector, torch.full((SIZE,), 1.0))
            assert outcome.peers == [honest.peer_id]
            assert "shape" in participant(honest, liar).refused or outcome.kind == "alone"

    run(check())


def test_who_is_absurdly_far_away_counts_as_far_as_is_believable(host: Node) -> None:
    """A liar at a million moves us by a few of our own ways, not by half a million."""

    async def check() -> None:
        async with teachers(host, 1.0, 1e6, name="far") as (sessions, vectors):
            honest, liar = sessions
            (outcome, vector), _ = await average_all(sessions, vectors)
            assert outcome.kind == "averaged"
            # our own way was 1.0: 10 × that at most as an averager of its part, twice that as what is handed back
            assert vector.max() <= 1.0 + 2 * SETTINGS.clip
            assert vector.min() >= 1.0
            assert participant(honest, liar).clipped > 0

    run(check())


def test_a_coordinator_that_says_nothing_is_replaced(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, 5.0, name="mute") as (sessions, vectors):
            mute = min(sessions, key=lambda one: one.peer_id)

            async def nothing(*args: Any, **options: Any) -> None:
                return None

            mute._coordinate = nothing  # type: ignore[method-assign]
            speaking = [one for one in sessions if one is not mute]
            began = time.monotonic()
            results = await average_all(speaking, vectors[:2])
            assert time.monotonic() - began < SETTINGS.patience + 4.0
            assert {outcome.kind for outcome, _ in results} == {"alone"}
            for _ in range(5):  # on a busy machine a round may pass before both have heard of the new coordinator
                results = await average_all(speaking, vectors[:2])
                if {outcome.kind for outcome, _ in results} == {"averaged"}:
                    return
            pytest.fail(f"nobody took its place: {results}")

    run(check())


def test_a_dead_daemon_of_another_is_noticed(host: Node) -> None:
    async def check() -> None:
        async with teachers(host, 1.0, 3.0, name="daemon") as (sessions, _):
            sessions[1]._node._daemon.process.kill()
            await until(lambda: participant(sessions[0], sessions[1]).state == "lost")
            outcome, _ = await sessions[0].average(torch.ones(SIZE), sessions[0].own.lineage)
            assert outcome.kind == "alone"

    run(check())
