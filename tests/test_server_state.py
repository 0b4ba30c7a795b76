"""The rules of a session on a server, without network and tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.client.journal import ChainHop, Journal
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.steps import CacheOp, Hop, Step
from nbrunner.server.session_state import PartPlan, PartRefusedError, SessionState, next_hop

PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(8)]
SESSION = "0" * 32

Row = tuple[int, ...]


def state(**changes: int) -> SessionState:
    defaults = {"start": 0, "end": 4, "max_tokens": 100, "max_batch": 8, "max_part": 64}
    return SessionState(**{**defaults, **changes})


def part(
    position: int,
    *,
    step: int = 1,
    attempt: int = 1,
    end: int | None = None,
    ops: Sequence[CacheOp] = (),
    held: int = 0,
    rebuild: bool = False,
    reply_from: int = 0,
    onward: int | None = None,
) -> Step:
    route = [Hop(PEERS[0], SESSION, 0, 4, held, rebuild)]
    if onward is not None:
        route.append(Hop(PEERS[1], SESSION, 4, 8, onward))
    return Step(step, attempt, position, 100 if end is None else end, reply_from, route, list(ops))


def take(session: SessionState, message: Step, tokens: int, batch: int = 1) -> PartPlan | None:
    plan = session.plan(message, tokens=tokens, batch=batch)
    if plan is not None:
        session.applied(plan)
        session.computed(plan)
        session.passed_on(plan)
    return plan


def test_parts_of_a_step_follow_one_another() -> None:
    session = state()
    first = take(session, part(0, end=10), 6)
    second = take(session, part(6, end=10), 4)
    assert first is not None
    assert second is not None
    assert (first.begin, first.end, first.send_from, first.send_to) == (0, 6, 0, 6)
    assert (second.begin, second.end, second.send_from, second.send_to) == (6, 10, 6, 10)
    assert session.length == 10


def test_a_repeated_part_is_only_passed_on() -> None:
    session = state()
    take(session, part(0, end=5), 5)
    again = take(session, part(0, end=5, attempt=2), 5)
    assert again is not None
    assert again.begin == again.end
    assert (again.send_from, again.send_to) == (0, 5)
    assert session.length == 5


def test_half_a_part_that_is_new_is_computed() -> None:
    session = state()
    take(session, part(0, end=8), 5)
    plan = take(session, part(0, end=8, attempt=2), 8)
    assert plan is not None
    assert (plan.begin, plan.end, plan.offset) == (5, 8, 5)
    assert (plan.send_from, plan.send_to) == (0, 8)


def test_a_new_neighbour_is_sent_everything() -> None:
    session = state()
    take(session, part(0, end=5, onward=0), 5)
    plan = take(session, part(5, step=2, held=5, end=6, onward=0), 1)
    assert plan is not None
    assert (plan.begin, plan.end, plan.send_from, plan.send_to) == (5, 6, 0, 6)


def test_a_neighbour_that_is_ahead_is_sent_only_what_it_lacks() -> None:
    session = state()
    first = take(session, part(0, end=6, rebuild=True, onward=5), 4)
    second = take(session, part(4, end=6, rebuild=True, onward=5), 2)
    assert first is not None
    assert second is not None
    assert first.send_from == first.send_to
    assert (second.send_from, second.send_to) == (5, 6)


def test_ops_are_applied_once() -> None:
    session = state()
    take(session, part(0, end=5), 5)
    crop = [CacheOp("crop", 3)]
    first = take(session, part(3, step=2, held=3, end=6, ops=crop), 1)
    second = take(session, part(4, step=2, held=3, end=6, ops=crop), 2)
    retry = take(session, part(3, step=2, attempt=2, held=3, end=6, ops=crop), 3)
    assert first is not None
    assert second is not None
    assert retry is not None
    assert (first.ops, second.ops, retry.ops) == ((CacheOp("crop", 3),), (), ())
    assert session.length == 6


def test_a_hop_that_is_rebuilt_does_not_apply_ops() -> None:
    plan = take(state(), part(0, step=7, rebuild=True, end=5, ops=[CacheOp("select", rows=[1, 1])]), 5, batch=2)
    assert plan is not None
    assert plan.ops == ()


def test_stale_parts_are_ignored() -> None:
    session = state()
    take(session, part(0, step=2, attempt=3, end=2), 2)
    assert session.plan(part(0, step=1, attempt=9), tokens=1, batch=1) is None
    assert session.plan(part(0, step=2, attempt=2), tokens=2, batch=1) is None


def test_after_a_refusal_the_rest_of_the_attempt_is_ignored_and_a_retry_is_not() -> None:
    session = state()
    bad = part(3, end=5)
    with pytest.raises(PartRefusedError):
        session.plan(bad, tokens=1, batch=1)
    session.fail(bad)
    assert session.plan(part(4, end=5), tokens=1, batch=1) is None
    assert take(session, part(0, attempt=2, end=5), 5) is not None


@pytest.mark.parametrize(
    ("message", "tokens", "batch", "code"),
    [
        (part(6, step=2, held=6), 1, 1, "position"),  # a gap
        (part(4, step=2, held=4), 1, 1, "position"),  # the client believes that less is held
        (part(5, step=2, held=5, end=6), 2, 1, "position"),  # beyond the step's end
        (part(5, step=2, held=5), 0, 1, "position"),
        (part(5, step=2, held=5, end=101), 1, 1, "limit"),
        (part(5, step=2, held=5), 65, 1, "limit"),
        (part(5, step=2, held=5), 1, 9, "limit"),
        (part(5, step=2, held=5), 1, 2, "data"),  # other rows than the session has
        (part(5, step=2, held=5, ops=[CacheOp("select", rows=[1])]), 1, 1, "data"),
        (part(5, step=2, held=5, ops=[CacheOp("select")]), 1, 1, "data"),
        (part(5, step=2, held=5, ops=[CacheOp("repeat", 0)]), 1, 1, "data"),
        (part(5, step=2, held=5, ops=[CacheOp("repeat", 9)]), 1, 9, "limit"),
        (part(5, step=2, held=5, end=6, onward=7), 1, 1, "position"),
        (part(5, step=2, held=5, end=6, reply_from=7), 1, 1, "position"),
        (msgspec.structs.replace(part(5, step=2, held=5), route=[Hop(PEERS[0], SESSION, 0, 3, 5)]), 1, 1, "blocks"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    message: Step, tokens: int, batch: int, code: str
) -> None:
    session = state()
    take(session, part(0, end=5), 5)
    before = msgspec.json.encode(session)
    with pytest.raises(PartRefusedError) as refusal:
        session.plan(message, tokens=tokens, batch=batch)
    assert refusal.value.code == code
    assert msgspec.json.encode(session) == before


# -- a chain of such sessions under the client's journal, with losses and repetitions ----------------------------


class LostError(Exception):
    """A part did not arrive; ``hop`` is gone."""

    def __init__(self, hop: FakeHop | None) -> None:
        self.hop = hop


@dataclass
class FakeHop:
    """A server's session over one block: what it 'computes' depends on value, position and everything before."""

    peer: str
    session: str
    block: int
    state: SessionState = field(init=False)
    inputs: list[Row] = field(default_factory=list)
    outputs: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = state(start=self.block, end=self.block + 1, max_tokens=10_000, max_part=10_000)

    def apply(self, ops: Sequence[CacheOp]) -> None:
        for op in ops:
            self.inputs, self.outputs = change(self.inputs, op), change(self.outputs, op)


def change(rows: list[Row], op: CacheOp) -> list[Row]:
    """One cache op on tokens that are tuples over the batch."""
    if op.kind == "crop":
        return rows[: op.count]
    if op.kind == "reset":
        return []
    if op.kind == "select":
        return [tuple(token[row] for row in op.rows) for token in rows]
    return [tuple(value for value in token for _ in range(op.count)) for token in rows]


def run_block(block: int, before: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Causal: an output is a digest of all inputs of its row so far."""
    tokens = [*before, *new]
    return [
        tuple(
            hash((block, tuple(earlier[row] for earlier in tokens[: at + 1]))) % 10**9
            for row in range(len(tokens[at]))
        )
        for at in range(len(before), len(tokens))
    ]


class FakeChain:
    """Delivers parts to hops as the servers do, and loses some."""

    def __init__(self, randomness: random.Random, loss: float) -> None:
        self.random = randomness
        self.loss = loss
        self.hops: dict[str, FakeHop] = {}
        self.replies: dict[int, Row] = {}

    def deliver(self, message: Step, tokens: list[Row]) -> None:
        hop = self.hops.get(message.route[0].session)
        if hop is None or self.random.random() < self.loss:
            raise LostError(hop)
        for _ in range(1 + (self.random.random() < 0.2)):  # some parts arrive twice
            self._take(hop, message, tokens)

    def _take(self, hop: FakeHop, message: Step, tokens: list[Row]) -> None:
        plan = hop.state.plan(message, tokens=len(tokens), batch=len(tokens[0]))
        if plan is None:
            return
        hop.apply(plan.ops)
        new = tokens[plan.offset :] if plan.begin < plan.end else []
        hop.outputs += run_block(hop.block, hop.inputs, new)
        hop.inputs += new
        hop.state.applied(plan)
        hop.state.computed(plan)
        hop.state.passed_on(plan)
        assert hop.state.length == len(hop.outputs)
        if plan.send_from == plan.send_to:
            return
        held = hop.outputs[plan.send_from : plan.send_to]
        if next_hop(message) is None:
            self.replies.update(zip(range(plan.send_from, plan.send_to), held, strict=True))
            return
        for begin in range(0, len(held), 3):
            onward = msgspec.structs.replace(message, route=message.route[1:], position=plan.send_from + begin)
            self.deliver(onward, held[begin : begin + 3])


@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 4), loss=st.sampled_from([0.0, 0.05, 0.2]))
def test_whatever_is_lost_the_outputs_are_those_of_a_run_without_losses(
    seed: int, blocks: int, loss: float
) -> None:
    randomness = random.Random(seed)
    chain = FakeChain(randomness, loss)
    journal = Journal(0, blocks)
    history: list[Row] = []  # what entered block 0
    attempt = number = 0

    def fill_gaps() -> None:
        nonlocal number
        for begin, end in journal.gaps():
            for block in range(begin, end):
                number += 1
                hop = FakeHop(PEERS[number % len(PEERS)], f"{number:032x}", block)
                chain.hops[hop.session] = hop
                journal.place(ChainHop(hop.peer, hop.session, block, block + 1))

    for _ in range(randomness.randrange(1, 8)):
        ops = random_ops(randomness, history)
        pending = journal.begin(tokens := randomness.randrange(1, 6), ops)
        before = list(history)
        for op in ops:
            history = change(history, op)
        rows = len(history[0]) if history else randomness.randrange(1, 3)
        history += [tuple(randomness.randrange(1000) for _ in range(rows)) for _ in range(tokens)]
        given_up = loss and randomness.random() < 0.1
        done = False
        while not done:
            attempt += 1
            fill_gaps()
            chain.replies = {}
            try:
                carried = history
                for segment in journal.segments(broken_links(randomness, journal, loss)):
                    for begin in range(segment.source_from, pending.end, 4):
                        message = Step(
                            pending.number,
                            attempt,
                            begin,
                            pending.end,
                            segment.reply_from,
                            list(segment.hops),
                            list(pending.ops),
                        )
                        chain.deliver(message, carried[begin : min(begin + 4, pending.end)])
                    carried = [chain.replies.get(at, ()) for at in range(pending.end)]
                    chain.replies = {}
                done = True
            except LostError as lost:
                if lost.hop is not None and randomness.random() < 0.7:  # else only the part was lost
                    del chain.hops[lost.hop.session]
                    journal.drop(lost.hop.session)
                if given_up:
                    break
        if not done:
            for hop in journal.abort():
                chain.hops.pop(hop.session, None)
            history = before
            continue
        journal.commit()
        expected = history
        for block in range(blocks):
            expected = run_block(block, [], expected)
        assert carried[pending.begin :] == expected[pending.begin :]


def broken_links(randomness: random.Random, journal: Journal, loss: float) -> set[tuple[str, str]]:
    """Some neighbours cannot reach each other: the client carries between them."""
    pairs = zip(journal.hops, journal.hops[1:], strict=False)
    return {(a.peer, b.peer) for a, b in pairs if randomness.random() < loss}


def random_ops(randomness: random.Random, history: list[Row]) -> list[CacheOp]:
    if not history or randomness.random() < 0.5:
        return []
    rows = len(history[0])
    return [
        randomness.choice(
            [
                CacheOp("crop", randomness.randrange(1, len(history) + 2)),
                CacheOp("select", rows=[randomness.randrange(rows) for _ in range(randomness.randrange(1, 4))]),
                CacheOp("repeat", randomness.randrange(1, 3)) if rows < 4 else CacheOp("crop", 1),
                CacheOp("reset"),
            ]
        )
    ]
