"""Waiting for memory: places, estimates, idle sessions that make room, and an end to the waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.limits import Limits
from nbrunner.server import waiting_room
from nbrunner.server.quotas import Quotas
from nbrunner.server.waiting_room import IDLE_SECONDS, WaitingRoom


@dataclass(eq=False)
class Session:
    """One that can be dropped."""

    name: str
    quotas: Quotas
    idle_seconds: float = 0.0
    peer: str = ""

    def drop(self) -> None:
        self.idle_seconds = 0.0
        self.quotas.set_bytes(self.name, 0)


@dataclass
class Room:
    """A server of 100 bytes."""

    limits: Limits = field(default_factory=lambda: Limits(cache_bytes=100, waiting=2, wait_seconds=5.0))
    sessions: list[Session] = field(default_factory=list)
    told: list[tuple[str, int, float | None]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.limits)
        self.room = WaitingRoom(self.quotas, self.limits, lambda: self.sessions)

    def hold(self, name: str, size: int, idle: float = 0.0, peer: str = "") -> None:
        self.quotas.set_bytes(name, size, peer=peer)
        self.sessions.append(Session(name, self.quotas, idle, peer))

    def free(self, name: str) -> None:
        self.quotas.set_bytes(name, 0)
        self.room.freed()

    async def ask(
        self, name: str, size: int, *, peer: str = "p", growing: bool = False, waits: bool = True
    ) -> None:
        async def tell(place: int, seconds: float | None) -> None:
            self.told.append((name, place, seconds))

        await self.room.reserve(peer, name, size, tell if waits else None, growing=growing)
        self.done.append(name)


@pytest.fixture(autouse=True)
def _tells_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_room, "TELL_SECONDS", 0.02)


def start(*coroutines: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(one) for one in coroutines]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_room_is_given_at_once_where_there_is_some() -> None:
    async def main() -> None:
        room = Room()
        await room.ask("a", 60)
        assert (room.quotas.bytes_left, room.told) == (40, [])

    asyncio.run(main())


def test_who_does_not_wait_is_refused_and_what_never_fits_too() -> None:
    async def main() -> None:
        room = Room()
        room.hold("a", 60)
        for size, waits in ((50, False), (101, True)):
            with pytest.raises(PeerRefusedError) as refusal:
                await room.ask("b", size, waits=waits)
            assert refusal.value.code == "full"
            assert refusal.value.retry_after
        assert room.quotas.bytes_left == 40

    asyncio.run(main())


def test_places_move_up_and_those_under_way_go_before_newcomers() -> None:
    async def main() -> None:
        room = Room()
        room.hold("a", 60)
        room.hold("b", 35)
        tasks = start(room.ask("first", 60), room.ask("second", 30, peer="q"))
        await turns()
        tasks += start(room.ask("a", 80, growing=True, peer="r"), room.ask("small", 5, peer="s"))
        await turns()
        assert [(name, place) for name, place, _ in room.told] == [
            ("first", 1),
            ("second", 2),
            ("a", 1),
            ("small", 4),
        ]
        room.free("b")
        await asyncio.wait_for(tasks[2], 5)
        assert room.done == ["a"]  # the small one would fit, but others were here before
        room.free("a")
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert room.done == ["a", "first", "second", "small"]
        assert room.room.waiting == 0

    asyncio.run(main())


def test_idle_sessions_make_room_the_longest_idle_first() -> None:
    async def main() -> None:
        room = Room()
        room.hold("busy", 40)
        room.hold("idle", 30, IDLE_SECONDS + 5)
        room.hold("long idle", 30, IDLE_SECONDS + 50)
        await room.ask("new", 25)
        assert room.quotas.bytes_of("long idle") == 0
        assert room.quotas.bytes_of("idle") == 30
        await room.ask("newer", 30)
        assert room.quotas.bytes_of("idle") == 0
        assert room.quotas.bytes_of("busy") == 40

    asyncio.run(main())


def test_a_session_that_becomes_idle_is_noticed_by_who_waits() -> None:
    async def main() -> None:
        room = Room()
        room.hold("a", 90)
        (task,) = start(room.ask("b", 50))
        await turns()
        room.sessions[0].idle_seconds = IDLE_SECONDS
        await asyncio.wait_for(task, 5)
        assert room.done == ["b"]

    asyncio.run(main())


def test_waiting_ends_and_the_queue_is_bounded() -> None:
    async def main() -> None:
        room = Room(Limits(cache_bytes=100, waiting=2, wait_seconds=0.1))
        room.hold("a", 90)
        tasks = start(room.ask("b", 50), room.ask("c", 50), room.ask("d", 50))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(result, "code", None) for result in results] == ["full"] * 3
        assert "you wait for memory 2 times" in str(results[2])
        assert "came free in" in str(results[0])
        assert (room.room.waiting, room.quotas.bytes_left) == (0, 10)

    asyncio.run(main())


def test_who_leaves_the_queue_does_not_hold_up_the_next() -> None:
    async def main() -> None:
        room = Room()
        room.hold("a", 60)
        tasks = start(room.ask("b", 90), room.ask("c", 20))
        await turns()
        assert room.done == []
        tasks[0].cancel()
        await asyncio.wait_for(tasks[1], 5)
        assert room.done == ["c"]
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_the_estimate_follows_how_often_memory_comes_free() -> None:
    now = [0.0]

    async def main() -> None:
        limits = Limits(cache_bytes=100, waiting=4, wait_seconds=60.0)
        quotas, told = Quotas(limits), []
        room = WaitingRoom(quotas, limits, list, clock=lambda: now[0])
        quotas.set_bytes("a", 100)

        async def tell(place: int, seconds: float | None) -> None:
            told.append((place, seconds))

        first = asyncio.create_task(room.reserve("p", "b", 10, tell))
        await turns()
        assert told == [(1, None)]
        for now[0] in (0.0, 4.0, 8.0):
            room.freed()
        now[0] = 12.0
        second = asyncio.create_task(room.reserve("p", "c", 10, tell))
        await turns()
        assert told[-1] == (2, pytest.approx(8.0))
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

    asyncio.run(main())


# -- what one peer may have ----------------------------------------------------------------------------------------


def shared_room() -> Room:
    return Room(Limits(cache_bytes=100, peer_cache_bytes=50, waiting=2, wait_seconds=5.0))


def test_a_peer_that_has_its_share_is_refused_and_others_are_not() -> None:
    async def main() -> None:
        room = shared_room()
        with pytest.raises(PeerRefusedError, match="60 bytes is over the 50"):
            await room.ask("a", 60, peer="greedy")
        await room.ask("a", 40, peer="greedy")
        with pytest.raises(PeerRefusedError, match="you have 40 of the 50"):
            await room.ask("b", 20, peer="greedy", waits=False)
        await room.ask("a", 50, peer="greedy", growing=True)  # in all
        await room.ask("c", 50, peer="modest")
        assert room.done == ["a", "a", "c"]
        assert room.quotas.bytes_of_peer("greedy") == room.quotas.bytes_of_peer("modest") == 50
        room.free("a")
        assert room.quotas.bytes_of_peer("greedy") == 0

    asyncio.run(main())


def test_who_waits_for_its_own_sessions_holds_up_nobody() -> None:
    async def main() -> None:
        room = shared_room()
        await room.ask("a", 50, peer="greedy")
        (first,) = start(room.ask("b", 20, peer="greedy"))
        await turns()
        assert room.told[0][:2] == ("b", 1)
        await room.ask("c", 50, peer="modest")  # there is room for it, and the one before it could not take it
        assert not first.done()
        room.free("c")
        await turns()
        assert not first.done()
        room.free("a")
        await first
        assert room.quotas.bytes_of_peer("greedy") == 20

    asyncio.run(main())


def test_its_own_idle_sessions_make_room_for_a_peer_and_those_of_others_stay() -> None:
    async def main() -> None:
        room = shared_room()
        room.hold("old", 40, idle=IDLE_SECONDS + 5, peer="greedy")
        room.hold("other", 40, idle=IDLE_SECONDS + 9, peer="modest")
        await room.ask("new", 30, peer="greedy")
        assert room.quotas.bytes_of("old") == 0
        assert room.quotas.bytes_of("other") == 40

    asyncio.run(main())
