"""When a server runs the steps that it has, and when it waits for more: the decision, and chains that use it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest

from nbrunner.server.gathering import (
    ACTIVE_SECONDS,
    FORGET_SECONDS,
    GATHERS_FOR_THOSE_EXPECTED,
    PATIENCE,
    Gathering,
)


def met(rounds: dict[str, float], *, turns: int = 5, pass_seconds: float | None = None) -> Gathering:
    """That knows sessions, each away for so long, and has computed the last of their steps at ``turns``."""
    found = Gathering()
    for turn in range(turns):
        for name, away in sorted(rounds.items(), key=lambda one: one[1]):
            found.came(name, turn + away)
        found.went(rounds, turn + 1.0, pass_seconds)
    return found


def test_one_session_waits_for_nobody() -> None:
    found = Gathering()
    for turn in range(4):
        found.came("a", turn)
        assert found.until({"a"}, turn, turn) == turn
        found.went({"a"}, turn + 0.5, 0.1)


def test_a_step_waits_for_sessions_that_are_back_soon() -> None:
    found = met({"quick": 0.1, "slow": 0.8})
    found.seconds = 0.05  # six times as much for those expected
    found.came("me", 5.0)
    assert found.until({"me"}, 5.0, 5.0) == pytest.approx(5.0 + PATIENCE * 0.1)  # the slow one is not waited for
    assert found.until({"me"}, 5.6, 5.6) == pytest.approx(5.0 + PATIENCE * 0.8)  # the quick one is late
    found.came("quick", 5.1)
    assert found.until({"me", "quick"}, 5.0, 5.1) == 5.1
    found.forget("slow")
    assert found.until({"me", "quick"}, 5.6, 5.6) == 5.6


def test_it_waits_shortly_for_active_sessions_of_which_it_knows_nothing() -> None:
    found = Gathering()
    found.came("new", 0.0)
    found.went({"new"}, 0.1)
    found.came("me", 0.1)
    assert found.until({"me"}, 0.1, 0.1) == pytest.approx(0.1 + found.seconds)
    assert found.active(0.1) == 2
    now = 0.2 + ACTIVE_SECONDS
    assert found.until({"me"}, now, now) == now  # it has not come for long
    assert found.active(now) == 0
    assert found.until({"me"}, 2 * FORGET_SECONDS, 2 * FORGET_SECONDS) == 2 * FORGET_SECONDS
    assert not found._rounds


def test_a_session_whose_steps_take_long_is_active_as_long_as_it_is_expected() -> None:
    found = met({"slow": 0.9})
    assert found.active(5.8) == 1
    assert found.active(5.0 + PATIENCE * 0.9) == 0


def test_a_pass_that_is_long_beside_the_way_round_takes_all_and_a_short_one_its_share() -> None:
    """Four sessions, two of them here, two back soon: if the way round is longer than a pass, two are enough."""
    names = {"a": 0.15, "b": 0.15, "c": 0.15, "d": 0.15}
    for pass_seconds, waits in ((1.0, True), (0.1, False)):
        found = met(names, pass_seconds=pass_seconds)
        found.seconds = 0.1
        for name in ("a", "b"):
            found.came(name, 5.15)
        assert (found.until({"a", "b"}, 5.15, 5.15) > 5.15) is waits


# -- chains that live by it --------------------------------------------------------------------------------------


def groups(servers: int, sessions: int, *, head: float, heads_at_once: int, row: float = 0.05) -> Counter[int]:
    """How many passes have so many rows, once sessions that began one after the other have gone round a while.

    A pass takes 1 s, and ``row`` more for each further row; a client's head takes ``head``, and so many of them are
    computed at the same time.
    """
    chain = [Gathering() for _ in range(servers)]
    for one in chain:
        one.seconds = 0.125
    waiting: list[dict[str, float]] = [{} for _ in chain]
    free_at = [0.0] * servers
    heads = [0.0] * heads_at_once
    rows: Counter[int] = Counter()
    chance = random.Random(0)
    order = itertools.count()
    events: list[tuple[float, int, int, str]] = [(0.3 * n, next(order), 0, f"s{n}") for n in range(sessions)]
    while (now := events[0][0]) < 200.0:
        _, _, place, session = heapq.heappop(events)
        if session:
            chain[place].came(session, now)
            waiting[place][session] = now
        if not waiting[place] or now < free_at[place]:
            continue
        begin = max(free_at[place], min(waiting[place].values()))
        until = chain[place].until(set(waiting[place]), begin, now)
        if until > now:
            heapq.heappush(events, (until, next(order), place, ""))
            continue
        names, waiting[place] = sorted(waiting[place]), {}
        seconds = (1.0 + row * (len(names) - 1)) * chance.uniform(0.97, 1.1)
        done = free_at[place] = now + seconds
        chain[place].went(names, done, seconds)
        if now > 100.0:
            rows[len(names)] += 1
        for name in names:
            if place + 1 < servers:
                heapq.heappush(events, (done, next(order), place + 1, name))
            else:
                heads.sort()
                heads[0] = max(heads[0], done) + head * chance.uniform(0.8, 1.3)
                heapq.heappush(events, (heads[0], next(order), 0, name))
        heapq.heappush(events, (done, next(order), place, ""))
    return rows


@pytest.mark.parametrize(
    ("servers", "sessions", "head", "heads_at_once", "size"),
    [(1, 8, 0.08, 1, 8), (1, 4, 0.3, 4, 4), (2, 4, 0.3, 2, 2), (2, 2, 0.3, 2, 1)],
)
def test_sessions_fall_into_step(servers: int, sessions: int, head: float, heads_at_once: int, size: int) -> None:
    """Eight sessions of one server in one pass; four over two servers in pairs, so that both servers work."""
    rows = groups(servers, sessions, head=head, heads_at_once=heads_at_once)
    mean = sum(many * count for many, count in rows.items()) / rows.total()
    assert mean == pytest.approx(size, rel=0.1), rows


def test_waiting_for_those_expected_is_bounded() -> None:
    found = met({"a": 10.0, "b": 0.3})
    found.seconds = 0.125
    found.came("me", 5.0)
    assert found.until({"me"}, 5.0, 5.0) <= 5.0 + PATIENCE * GATHERS_FOR_THOSE_EXPECTED * found.seconds
