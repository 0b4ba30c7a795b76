"""The journal against a model of the servers: whatever is lost, the outputs are those of a run without losses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbrunner.client.journal import ChainHop, Journal, length_after
from nbrunner.errors import SessionError
from nbrunner.protocol.steps import CacheOp

BLOCKS = 6
Rows = list[list[int]]


class LostError(Exception):
    def __init__(self, session: str) -> None:
        self.session = session


def apply(ops: list[CacheOp] | tuple[CacheOp, ...], rows: Rows) -> Rows:
    for op in ops:
        if op.kind == "crop":
            rows = [row[: op.count] for row in rows]
        elif op.kind == "reset":
            rows = [[] for _ in rows]
        elif op.kind == "select":
            rows = [list(rows[index]) for index in op.rows]
        else:
            rows = [list(row) for row in rows for _ in range(op.count)]
    return rows


def run_block(block: int, row: list[int]) -> list[int]:
    """A causal layer: each output depends on the block and on all inputs up to it, in order."""
    out, state = [], block
    for value in row:
        state = hash((state, value))
        out.append(state)
    return out


def run_blocks(start: int, end: int, row: list[int]) -> list[int]:
    for block in range(start, end):
        row = run_block(block, row)
    return row


@dataclass
class Server:
    """The rules of docs/protocol.md for one session, over integers."""

    start: int
    end: int
    croppable: bool
    inputs: Rows = field(default_factory=list)
    step: int = 0

    @property
    def transcript(self) -> Rows:
        return [run_blocks(self.start, self.end, row) for row in self.inputs]

    @property
    def length(self) -> int:
        return len(self.inputs[0]) if self.inputs else 0

    def take(self, number: int, ops, rebuild: bool, position: int, part: Rows) -> None:
        if number < self.step:
            return
        if number > self.step:
            if not rebuild:
                for op in ops:
                    assert self.croppable or op.kind != "crop", "a recurrent span was asked to crop"
                self.inputs = apply(ops, self.inputs)
            self.step = number
        assert position <= self.length, "gap: the hop was sent tokens beyond what it holds"
        if not self.inputs or (self.length == 0 and len(self.inputs) != len(part)):
            self.inputs = [[] for _ in part]
        fresh = self.length - position
        for row, new in zip(self.inputs, part, strict=True):
            row.extend(new[fresh:] if fresh < len(new) else [])


class Simulation:
    def __init__(self, data: st.DataObject, croppable: bool) -> None:
        self.data = data
        self.croppable = croppable
        self.journal = Journal(0, BLOCKS, croppable=croppable)
        self.servers: dict[str, Server] = {}
        self.history: Rows = []
        self.names = itertools.count()
        self.losses = 12

    def fill(self) -> None:
        for start, end in self.journal.gaps():
            cuts = (
                self.data.draw(st.sets(st.integers(start + 1, end - 1), max_size=2)) if end - start > 1 else set()
            )
            for a, b in itertools.pairwise([start, *sorted(cuts), end]):
                name = f"s{next(self.names)}"
                self.servers[name] = Server(a, b, self.croppable)
                peer = self.data.draw(st.sampled_from(["p", "q", "r"]))
                self.journal.place(ChainHop(peer, name, a, b))

    def maybe_lose(self) -> None:
        if self.losses and self.data.draw(st.integers(0, 5)) == 0:
            self.losses -= 1
            raise LostError(self.data.draw(st.sampled_from(sorted(self.servers))))

    def travel(self) -> Rows:
        """One try of the pending step; may be cut short anywhere by the loss of any server."""
        step = self.journal.pending
        source = self.history
        source_from = 0
        broken = {("p", "q")} if self.data.draw(st.booleans()) else set()
        for segment in self.journal.segments(broken):
            begin = segment.source_from
            middle = self.data.draw(st.integers(begin, step.end))
            replies: Rows = []
            sent = {hop.session: hop.position for hop in segment.hops}
            replied = segment.reply_from
            for part_begin, part_end in [(begin, middle), (middle, step.end)]:
                if part_begin == part_end:
                    continue
                part = [row[part_begin - source_from : part_end - source_from] for row in source]
                position = part_begin
                for index, hop in enumerate(segment.hops):
                    self.maybe_lose()
                    server = self.servers[hop.session]
                    server.take(step.number, step.ops, hop.rebuild, position, part)
                    self.maybe_lose()
                    out = server.transcript
                    if index + 1 < len(segment.hops):
                        following = segment.hops[index + 1].session
                        position, sent[following] = sent[following], max(part_end, sent[following])
                        part = [row[position:part_end] for row in out]
                        if position >= part_end:
                            break
                    elif part_end > replied:
                        new = [row[replied:part_end] for row in out]
                        replies = [a + b for a, b in zip(replies, new, strict=True)] if replies else new
                        replied = part_end
            source, source_from = replies, segment.reply_from
        return source

    def lose(self, session: str) -> None:
        del self.servers[session]
        self.journal.drop(session)

    def step(self, tokens: Rows, ops: list[CacheOp], may_give_up: bool) -> None:
        before = [list(row) for row in self.history]
        pending = self.journal.begin(len(tokens[0]), ops)
        self.history = apply(ops, self.history)
        self.history = (
            [row + new for row, new in zip(self.history, tokens, strict=True)] if self.history else tokens
        )
        while True:
            self.fill()
            try:
                result = self.travel()
            except LostError as lost:
                if may_give_up and self.data.draw(st.booleans()):
                    for hop in self.journal.abort():
                        self.servers.pop(hop.session, None)
                    self.lose(lost.session) if lost.session in self.servers else None
                    self.history = before
                    return
                self.lose(lost.session)
                continue
            break
        self.journal.commit()
        expected = [run_blocks(0, BLOCKS, row)[pending.begin :] for row in self.history]
        assert result == expected
        for hop in self.journal.hops:
            assert self.servers[hop.session].length == self.journal.length
        if may_give_up and self.data.draw(st.integers(0, 3)) == 0:
            self.journal.undo()
            self.history = before


def draw_ops(data: st.DataObject, length: int, rows: int, first: bool) -> list[CacheOp]:
    if first:
        return []
    kinds = data.draw(st.lists(st.sampled_from(["crop", "select", "repeat", "reset"]), max_size=2))
    ops = []
    for kind in kinds:
        if kind == "crop":
            ops.append(CacheOp("crop", data.draw(st.integers(0, length))))
        elif kind == "select":
            picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            ops.append(CacheOp("select", rows=picked))
            rows = len(picked)
        elif kind == "repeat" and rows <= 2:
            ops.append(CacheOp("repeat", 2))
            rows *= 2
        elif kind == "reset":
            ops.append(CacheOp("reset"))
    return ops


@settings(max_examples=400, deadline=None)
@given(data=st.data(), croppable=st.booleans())
def test_outputs_do_not_depend_on_losses(data: st.DataObject, croppable: bool) -> None:
    simulation = Simulation(data, croppable)
    value = itertools.count(1)
    for index in range(data.draw(st.integers(2, 6))):
        rows = len(simulation.history) or data.draw(st.integers(1, 2))
        ops = draw_ops(data, simulation.journal.length, rows, first=not simulation.history)
        rows = len(apply(ops, simulation.history)) if simulation.history else rows
        tokens = [[next(value) for _ in range(data.draw(st.integers(1, 3)))] for _ in range(1)]
        tokens = [[next(value) for _ in tokens[0]] for _ in range(rows)]
        simulation.step(tokens, ops, may_give_up=index > 0)


def test_one_step_at_a_time() -> None:
    journal = Journal(0, 2)
    journal.begin(1)
    with pytest.raises(SessionError, match="one step at a time"):
        journal.begin(1)


def test_a_hop_must_fill_a_gap() -> None:
    journal = Journal(0, 4)
    journal.place(ChainHop("p", "a", 0, 2))
    with pytest.raises(SessionError, match=r"\[1, 3\)"):
        journal.place(ChainHop("p", "b", 1, 3))
    assert journal.gaps() == [(2, 4)]


def test_survivors_are_sent_only_what_is_new() -> None:
    journal = Journal(0, 4)
    for name, start in (("a", 0), ("b", 2)):
        journal.place(ChainHop(f"peer-{name}", name, start, start + 2))
    journal.begin(5)
    journal.commit()
    journal.begin(1)
    journal.drop("a")
    journal.place(ChainHop("peer-c", "c", 0, 2))
    (segment,) = journal.segments()
    assert [(hop.session, hop.position, hop.rebuild) for hop in segment.hops] == [("c", 0, True), ("b", 5, False)]
    assert (segment.source_from, segment.reply_from) == (0, 5)


def test_an_interrupted_step_is_cropped_away_before_the_next() -> None:
    journal = Journal(0, 2)
    journal.place(ChainHop("p", "a", 0, 2))
    journal.begin(3)
    journal.commit()
    journal.begin(1)
    assert journal.abort() == []
    assert journal.begin(1).ops == (CacheOp("crop", 3),)


@pytest.mark.parametrize(
    ("ops", "length"),
    [([], 5), ([CacheOp("crop", 3)], 3), ([CacheOp("crop", 9)], 5), ([CacheOp("reset")], 0)],
)
def test_length_after(ops: list[CacheOp], length: int) -> None:
    assert length_after(5, ops) == length
