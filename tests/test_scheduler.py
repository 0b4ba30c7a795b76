"""What runs next, as a pure decision: order, fairness between peers, and that nobody waits for ever."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbrunner.server.scheduler import PATIENCE, Chosen, Scheduler, Urgency, Waiting

DECODE, PREFILL, STATELESS = Urgency.DECODE, Urgency.PREFILL, Urgency.STATELESS


def step(number: int, peer: str = "a", tokens: int = 1, since: float = 0.0, joins: Hashable = "all") -> Waiting:
    return Waiting(number, DECODE, since, peer, tokens, joins=joins)


def prompt(number: int, peer: str = "a", tokens: int = 1000, rows: int = 1, joins: Hashable = "all") -> Waiting:
    return Waiting(number, PREFILL, 0.0, peer, tokens, rows, divisible=True, joins=joins)


def request(number: int, peer: str = "a", since: float = 0.0) -> Waiting:
    return Waiting(number, STATELESS, since, peer, 100)


def numbers(chosen: list[Chosen]) -> list[int]:
    return [one.work.number for one in chosen]


def test_nothing_waits_nothing_runs() -> None:
    assert Scheduler().choose([], 0.0) == []


def test_decode_steps_run_together_and_before_all_else() -> None:
    chosen = Scheduler().choose([request(0), step(1), prompt(2, joins=None), step(3, "b"), step(4, joins="x")], 0.0)
    assert numbers(chosen) == [1, 3]


def test_a_piece_of_a_prompt_runs_beside_decode_steps_and_a_longer_one_alone() -> None:
    scheduler = Scheduler(piece_tokens=200, beside_tokens=30)
    chosen = scheduler.choose([prompt(0, rows=4), step(1), prompt(2, tokens=100)], 0.0)
    assert [(one.work.number, one.tokens) for one in chosen] == [(1, 1), (0, 28)]
    chosen = scheduler.choose([prompt(0), prompt(2)], 0.0, active=2)
    assert [(one.work.number, one.tokens) for one in chosen] == [(0, 200)]
    chosen = scheduler.choose([prompt(0)], 0.0, active=2)
    assert [(one.work.number, one.tokens) for one in chosen] == [(0, 200)]
    chosen = scheduler.choose([prompt(0)], 0.0, active=1)
    assert [(one.work.number, one.tokens) for one in chosen] == [(0, 1000)]


def test_what_cannot_be_joined_runs_alone() -> None:
    scheduler = Scheduler()
    assert numbers(scheduler.choose([step(0, joins=None), step(1, joins=None)], 0.0)) == [0]
    assert numbers(scheduler.choose([request(1), request(2)], 0.0)) == [1]


def test_old_work_goes_first_but_not_every_time() -> None:
    late = PATIENCE[STATELESS] + 1
    waiting = [request(0), request(1), request(2), *(step(number, since=late) for number in range(3, 9))]
    scheduler, order = Scheduler(), []
    for _ in range(4):
        chosen = numbers(scheduler.choose(waiting, late))
        order.append(chosen)
        waiting = [one for one in waiting if one.number not in chosen]
        waiting.append(step(order[-1][-1] + 100, since=late))
    assert [len(chosen) == 1 and chosen[0] < 3 for chosen in order] == [True, False, True, False]


@pytest.mark.parametrize("joins", [None, "all"])
def test_a_peer_with_twenty_sessions_does_not_crowd_out_a_peer_with_one(joins: Hashable) -> None:
    """Every session asks again at once. Where passes are full, both peers get the same."""
    scheduler, counter = Scheduler(batch_tokens=4), itertools.count()
    crowd = [step(next(counter), "crowd", joins=joins) for _ in range(20)]
    waiting, served = [*crowd, step(next(counter), "one", joins=joins)], Counter[str]()
    for turn in range(200):
        for one in scheduler.choose(waiting, float(turn)):
            served[one.work.peer] += one.tokens
            waiting.remove(one.work)
            waiting.append(replace(one.work, number=next(counter), since=float(turn)))
    if joins is None:
        assert abs(served["one"] - served["crowd"]) <= 1
    else:
        assert served["one"] >= 199  # in every pass: it cannot use more


def test_tokens_count_not_turns() -> None:
    scheduler, counter = Scheduler(), itertools.count()
    waiting = [step(next(counter), "wide", 16, joins=None), step(next(counter), "narrow", 1, joins=None)]
    served = Counter[str]()
    for turn in range(340):
        (one,) = scheduler.choose(waiting, 0.001 * turn)
        served[one.work.peer] += one.tokens
        waiting.remove(one.work)
        waiting.append(replace(one.work, number=next(counter), since=0.001 * turn))
    assert served["wide"] == pytest.approx(served["narrow"], rel=0.1)


def test_a_pause_saves_nothing_up() -> None:
    scheduler, counter = Scheduler(), itertools.count()
    for turn in range(50):
        scheduler.choose([step(next(counter), "busy", joins=None)], float(turn))
    waiting = [step(next(counter), peer, since=50.0, joins=None) for peer in ("busy", "new") for _ in range(20)]
    order = []
    for _ in range(20):
        (one,) = scheduler.choose(waiting, 50.0)
        order.append(one.work.peer)
        waiting.remove(one.work)
    assert 9 <= order.count("new") <= 11


# -- whatever comes ----------------------------------------------------------------------------------------------

works = st.builds(
    lambda urgency, peer, tokens, rows, joins: Waiting(
        0, urgency, 0.0, peer, tokens * rows, rows, divisible=urgency is PREFILL, joins=joins
    ),
    st.sampled_from([DECODE, PREFILL, STATELESS]),
    st.sampled_from(["a", "b", "c"]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([None, "x", "y"]),
).map(lambda one: replace(one, joins=None) if one.urgency is STATELESS else one)


@dataclass
class Machine:
    """A server that runs what the scheduler says; every pass takes a while."""

    scheduler: Scheduler
    now: float = 0.0
    counter: itertools.count[int] = field(default_factory=itertools.count)
    waiting: dict[int, Waiting] = field(default_factory=dict)

    def add(self, work: Waiting) -> int:
        number = next(self.counter)
        self.waiting[number] = replace(work, number=number, since=self.now)
        return number

    def turn(self, active: int) -> list[Waiting]:
        """Run one pass; returns what is finished."""
        before = list(self.waiting.values())
        chosen = self.scheduler.choose(before, self.now, active=active)
        assert bool(chosen) == bool(before)
        assert len({one.work.joins for one in chosen}) <= 1
        assert len({one.work.number for one in chosen}) == len(chosen)
        if len(chosen) > 1:
            assert chosen[0].work.joins is not None
            assert sum(one.tokens for one in chosen) <= self.scheduler.batch_tokens + self.scheduler.beside_tokens
            assert sum(one.work.urgency is not DECODE for one in chosen) <= 1
        finished = []
        for one in chosen:
            held = self.waiting[one.work.number]
            assert held == one.work
            assert 0 < one.tokens <= held.tokens
            assert one.tokens % held.rows == 0
            assert held.divisible or one.tokens == held.tokens
            if one.tokens == held.tokens:
                finished.append(self.waiting.pop(one.work.number))
            else:
                self.waiting[one.work.number] = replace(held, tokens=held.tokens - one.tokens)
        self.now += 0.05
        return finished


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(works, max_size=6), max_size=30), st.integers(1, 64), st.integers(1, 64), st.integers(1, 4)
)
def test_every_piece_of_work_is_done(arrivals: list[list[Waiting]], piece: int, beside: int, active: int) -> None:
    machine = Machine(Scheduler(piece_tokens=piece, beside_tokens=min(beside, piece), batch_tokens=64))
    for coming in arrivals:
        for work in coming:
            machine.add(work)
        machine.turn(active)
    left = sum(one.tokens for one in machine.waiting.values())
    for _ in range(left):  # every pass makes progress
        if machine.waiting:
            machine.turn(active)
    assert not machine.waiting


@settings(max_examples=60, deadline=None)
@given(st.lists(works, min_size=1, max_size=12), works)
def test_nobody_starves_behind_others_who_never_stop(crowd: list[Waiting], one: Waiting) -> None:
    """Whoever is served asks again at once; one piece of work among them is done in a bounded time."""
    machine = Machine(Scheduler(piece_tokens=16, beside_tokens=8, batch_tokens=32))
    for work in crowd:
        machine.add(work)
    for _ in range(20):
        for done in machine.turn(4):
            machine.add(done)
    number = machine.add(one)
    # its patience, then at most every second pass is another's; it has to share those with all that are old too
    passes = int(PATIENCE[one.urgency] / 0.05) + 40 * (len(crowd) + 1) * (1 + one.tokens)
    for _ in range(passes):
        if number not in machine.waiting:
            return
        for done in machine.turn(4):
            if done.number != number:
                machine.add(done)
    assert number not in machine.waiting
