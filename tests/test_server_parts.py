"""What a session is made of, part by part: transcript, quotas, compute thread, checked inputs, options."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.errors import BadPeerDataError, PeerRefusedError, UserInputError
from nbrunner.protocol.credentials import Terms
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.steps import CacheOp
from nbrunner.protocol.tensors import pack
from nbrunner.server import compute, gathering
from nbrunner.server.compute import ComputeThread
from nbrunner.server.host import Host, Speed, gather_seconds
from nbrunner.server.inputs import Form, sizes, take_inputs, windows
from nbrunner.server.options import parse_blocks, parse_bytes
from nbrunner.server.quotas import LONGEST_WAIT, MOST_IDLE_BUCKETS, Quotas, TokenBucket
from nbrunner.server.scheduler import Urgency
from nbrunner.server.transcript import Transcript

FORM = Form(torch.float32, (4,), 100)


# -- transcript --------------------------------------------------------------------------------------------------

ops = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(0, 60)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=12,
)


@given(ops)
def test_a_transcript_is_what_plain_tensors_would_be(sequence: list[tuple[str, object]]) -> None:
    transcript, plain, rows = Transcript(), torch.empty(2, 0, 3), 2
    counter = 0
    for kind, value in sequence:
        if kind == "append":
            assert isinstance(value, int)
            counter += 1
            if not plain.shape[1]:
                plain = torch.empty(rows, 0, 3)
            new = torch.full((plain.shape[0], value, 3), float(counter))
            transcript.append({"hidden": new, "carry.1": new[..., 0].to(torch.int64)})
            plain = torch.cat([plain, new], 1)
            continue
        if kind == "select":
            assert isinstance(value, list)
            chosen = [row % plain.shape[0] for row in value]
            transcript.apply(CacheOp("select", rows=chosen))
            plain = plain[chosen]
        elif kind == "repeat":
            assert isinstance(value, int)
            if plain.shape[0] > 4:
                continue
            transcript.apply(CacheOp("repeat", value))
            plain = plain.repeat_interleave(value, 0)
        elif kind == "reset":
            transcript.apply(CacheOp("reset"))
            plain = plain[:, :0]
        else:
            assert isinstance(value, int)
            transcript.apply(CacheOp("crop", value))
            plain = plain[:, :value]
    assert transcript.length == plain.shape[1]
    if transcript.length:
        held = transcript.window(0, transcript.length)
        assert torch.equal(held["hidden"], plain)
        assert torch.equal(held["carry.1"], plain[..., 0].to(torch.int64))
        assert transcript.nbytes >= plain.numel() * 4


def test_a_slice_stays_what_it_was_while_tokens_are_appended() -> None:
    transcript = Transcript()
    transcript.append({"hidden": torch.ones(1, 5, 2)})
    held = transcript.window(0, 5)["hidden"]
    for _ in range(100):
        transcript.append({"hidden": torch.zeros(1, 1, 2)})
    assert torch.equal(held, torch.ones(1, 5, 2))


# -- quotas ------------------------------------------------------------------------------------------------------


def test_a_token_bucket_lets_a_prompt_through_and_then_the_rate() -> None:
    now = [0.0]
    bucket = TokenBucket(2.0, clock=lambda: now[0])
    assert bucket.wait_seconds() == 0
    bucket.spend(100)  # 20 were saved up
    assert bucket.wait_seconds() == pytest.approx(40)
    now[0] += 30
    assert bucket.wait_seconds() == pytest.approx(10)
    now[0] += 1000
    bucket.spend(20)
    assert bucket.wait_seconds() == 0
    bucket.spend(2)
    assert bucket.wait_seconds() == pytest.approx(1)


def test_peers_that_came_once_are_forgotten() -> None:
    now = [0.0]
    quotas = Quotas(Limits(tokens_per_second=10.0), clock=lambda: now[0])
    quotas.spend("in debt", Terms(), 1_000_000)
    for number in range(5 * MOST_IDLE_BUCKETS):
        quotas.spend(f"peer {number}", Terms(), 5)
        now[0] += 1.0
    assert len(quotas._buckets) <= MOST_IDLE_BUCKETS
    with pytest.raises(PeerRefusedError):
        quotas.wait_seconds("in debt", Terms())


def test_quotas_count_sessions_bytes_and_rates_by_peer() -> None:
    now = [0.0]
    quotas = Quotas(Limits(sessions=3, cache_bytes=1000), clock=lambda: now[0])
    strict = Terms(max_sessions=1, tokens_per_second=1.0)
    quotas.open_session("a", strict)
    with pytest.raises(PeerRefusedError, match="1 sessions") as refusal:
        quotas.open_session("a", strict)
    assert refusal.value.code == "limit"
    for _ in range(3):
        quotas.open_session("b", Terms(max_sessions=9))
    with pytest.raises(PeerRefusedError, match="may have 3"):  # an invite cannot allow more than the server
        quotas.open_session("b", Terms(max_sessions=9))
    assert quotas.sessions == 4
    quotas.set_bytes("s", 900)
    assert quotas.room_for("s", 1000)
    assert not quotas.room_for("t", 101)
    assert (quotas.bytes_of("s"), quotas.bytes_left) == (900, 100)
    quotas.set_bytes("s", 0)
    quotas.close_session("a")
    assert quotas.bytes_left == 1000
    quotas.open_session("a", strict)

    assert quotas.wait_seconds("a", Terms()) == 0  # no rate in the terms: none is kept
    quotas.spend("a", strict, 10 + int(LONGEST_WAIT) - 1)
    assert 0 < quotas.wait_seconds("a", strict) <= LONGEST_WAIT
    assert quotas.wait_seconds("b", strict) == 0
    quotas.spend("a", strict, 5)
    with pytest.raises(PeerRefusedError, match="tokens per second"):
        quotas.wait_seconds("a", strict)


# -- the compute thread ------------------------------------------------------------------------------------------


def test_urgent_work_goes_first_and_each_kind_in_order() -> None:
    thread, done = ComputeThread(), []
    gate = threading.Event()

    async def main() -> None:
        first = asyncio.create_task(thread.submit(gate.wait, Urgency.STATELESS))
        await asyncio.sleep(0)
        kinds = [Urgency.STATELESS, Urgency.PREFILL, Urgency.DECODE, Urgency.PREFILL, Urgency.DECODE]
        others = [
            asyncio.create_task(thread.submit(lambda job=(kind, number): done.append(job), kind))
            for number, kind in enumerate(kinds)
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)

    try:
        asyncio.run(main())
    finally:
        thread.close()
    assert done == sorted(done)
    assert len(done) == 5


def test_a_cancelled_job_does_not_run_and_errors_come_back() -> None:
    thread, ran = ComputeThread(), []
    gate = threading.Event()

    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        first = asyncio.create_task(thread.submit(gate.wait, Urgency.DECODE))
        await asyncio.sleep(0)
        second = asyncio.create_task(thread.submit(lambda: ran.append(1), Urgency.DECODE))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await first
        with pytest.raises(ValueError, match="no"):
            await thread.submit(fail, Urgency.DECODE)
        result = await thread.submit(lambda: 7, Urgency.DECODE)
        assert (result.value, result.compute >= 0, result.queue >= 0) == (7, True, True)

    try:
        asyncio.run(main())
    finally:
        thread.close()
    assert ran == []


@dataclass
class FakePart:
    """A part of a session; `run` is called for every piece of it."""

    run: Callable[[], None]
    tokens: int = 1
    rows: int = 1
    joins: str | None = "all"


def run_fakes(chosen: Sequence[tuple[FakePart, int]]) -> list[Exception | None]:
    problems: list[Exception | None] = []
    for part, tokens in chosen:
        try:
            part.run()
            problems.append(None)
        except ValueError as error:
            problems.append(error)
        part.tokens -= tokens
    return problems


def test_what_is_done_before_a_step_is_done_at_once_or_shortly_before_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = ComputeThread()
    thread.serve_parts(run_fakes)

    async def main() -> None:
        done: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()

        async def step(name: str, away: float, session: str = "one") -> None:
            await thread.submit_part(FakePart(lambda: None), Urgency.DECODE, peer="p", session=session, brief=True)
            monkeypatch.setattr(thread.gathering, "due", lambda _: time.perf_counter() + away)
            thread.before_next(session, lambda rested: done.put_nowait((name, rested)))

        await step("nobody knows when it comes", math.inf)
        assert done.get_nowait() == ("nobody knows when it comes", False)
        await step("it is back soon", compute.REST_SECONDS / 2)
        assert done.get_nowait() == ("it is back soon", False)
        await step("it is away for long", compute.READY_SECONDS + 0.05)
        assert done.empty()
        assert await asyncio.wait_for(done.get(), 10) == ("it is away for long", True)

        await step("it comes before it is due", compute.READY_SECONDS + 0.05)
        await step("it ends", compute.READY_SECONDS + 0.05)
        thread.session_ended("one")
        assert thread._preparing is None  # it would hold the session
        await step("another", compute.READY_SECONDS + 0.1, "two")
        assert await asyncio.wait_for(done.get(), 10) == ("another", True)

        await step("two are active, and run together", math.inf, "three")
        assert done.empty()

    try:
        asyncio.run(main())
    finally:
        thread.close()


def test_brief_parts_run_here_unless_something_runs_or_another_session_is_active() -> None:
    thread, where = ComputeThread(), []
    thread.serve_parts(run_fakes)
    begun, gate = threading.Event(), threading.Event()

    async def part(run: Callable[[], None], session: str = "one", *, brief: bool = True) -> None:
        await thread.submit_part(FakePart(run), Urgency.DECODE, peer="p", session=session, brief=brief)

    def note() -> None:
        where.append(threading.current_thread())

    def long() -> None:
        begun.set()
        gate.wait()

    async def main() -> None:
        await part(note)
        first = asyncio.create_task(thread.submit(long, Urgency.PREFILL))
        await asyncio.to_thread(begun.wait)
        second = asyncio.create_task(part(note))
        await asyncio.sleep(0)
        assert len(where) == 1  # the event loop does not wait for what runs
        gate.set()
        await asyncio.gather(first, second)
        with pytest.raises(ValueError, match="no"):
            await part(_fail)
        await part(note)
        await part(note, "two")  # may be joined with what session one sends next

    try:
        asyncio.run(main())
    finally:
        thread.close()
    here = threading.current_thread()
    assert [one is here for one in where] == [True, False, True, False]


def test_parts_of_several_sessions_run_together_and_fail_apart() -> None:
    thread, passes = ComputeThread(), []
    gate = threading.Event()

    def run(chosen: Sequence[tuple[FakePart, int]]) -> list[Exception | None]:
        passes.append([tokens for _, tokens in chosen])
        return run_fakes(chosen)

    def fine() -> None:
        pass

    thread.serve_parts(run)

    async def part(session: str, run: Callable[[], None], tokens: int = 1, joins: str | None = "all") -> None:
        urgency = Urgency.DECODE if tokens < 10 else Urgency.PREFILL
        await thread.submit_part(FakePart(run, tokens, 1, joins), urgency, peer="p", session=session)

    async def main() -> None:
        first = asyncio.create_task(thread.submit(gate.wait, Urgency.DECODE))
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(part("a", fine)),
            asyncio.create_task(part("b", _fail)),
            asyncio.create_task(part("c", fine, 4)),
            asyncio.create_task(part("d", fine, 1, "other")),
            asyncio.create_task(part("e", fine, 100)),
        ]
        await asyncio.sleep(0)
        gate.set()
        await first
        results = await asyncio.gather(*others, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["NoneType", "ValueError", *["NoneType"] * 3]

    try:
        asyncio.run(main())
    finally:
        thread.close()
    assert passes[0] == [1, 1, 4, 32]  # the prompt's first piece beside the decode steps
    assert sum(map(sum, passes)) == 1 + 1 + 4 + 1 + 100


def test_the_loop_stays_awake_for_a_lone_session_that_is_back_at_once() -> None:
    thread = ComputeThread()
    thread.serve_parts(run_fakes)

    async def awake_after(session: str, away: float) -> bool:
        for _ in range(3):
            await asyncio.sleep(away)
            await thread.submit_part(FakePart(lambda: None), Urgency.DECODE, peer="p", session=session, brief=True)
        found = thread._awake_until > time.perf_counter() - compute.AWAKE_SECONDS
        thread.session_ended(session)
        return found

    async def main() -> tuple[bool, bool]:
        return await awake_after("quick", 0.0), await awake_after("slow", 5 * compute.AWAKE_SECONDS)

    try:
        assert asyncio.run(main()) == (True, False)
    finally:
        thread.close()


def test_a_step_waits_for_those_of_other_sessions_and_for_nobody_if_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session by itself would wait here for minutes."""
    monkeypatch.setattr(gathering, "ACTIVE_SECONDS", 120.0)
    thread, passes = ComputeThread(), []
    thread.gathering.seconds = 120.0

    def run(chosen: Sequence[tuple[FakePart, int]]) -> list[Exception | None]:
        passes.append(len(chosen))
        time.sleep(0.05)  # beside it the sessions are hardly away, so that one pass for all is best
        return run_fakes(chosen)

    thread.serve_parts(run)

    async def step(session: str) -> None:
        await thread.submit_part(FakePart(lambda: None), Urgency.DECODE, peer="p", session=session)

    async def main() -> None:
        async with asyncio.timeout(30):
            for _ in range(3):
                await step("one")
            other = asyncio.create_task(step("two"))
            await asyncio.sleep(0.02)
            assert not other.done()
            await asyncio.gather(other, step("one"))
            other = asyncio.create_task(step("two"))
            await asyncio.sleep(0.02)
            assert not other.done()
            thread.session_ended("one")
            await other
            await step("two")

    try:
        asyncio.run(main())
    finally:
        thread.close()
    assert passes == [1, 1, 1, 2, 1, 1]


def test_a_step_waits_for_others_as_long_as_suits_it() -> None:
    waits = [gather_seconds(Speed(seconds, 1.0, 0.0, 1.0)) for seconds in (0.0, 0.001, 0.04, 10.0)]
    assert waits == [gathering.GATHER_SECONDS, gathering.GATHER_SECONDS, 0.005, 0.02]


def test_a_step_does_not_wait_for_a_session_whose_prompt_waits_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is active, and known, but not away: its next piece comes after this step."""
    monkeypatch.setattr(gathering, "ACTIVE_SECONDS", 120.0)
    thread, pieces = ComputeThread(), []
    thread.gathering.seconds = 120.0
    thread.scheduler.piece_tokens = 8

    def run(chosen: Sequence[tuple[FakePart, int]]) -> list[Exception | None]:
        pieces.append([tokens for _, tokens in chosen])
        return run_fakes(chosen)

    thread.serve_parts(run)
    prompt, step = FakePart(lambda: None, tokens=64, joins=None), FakePart(lambda: None, joins="steps")

    async def main() -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(
                thread.submit_part(prompt, Urgency.PREFILL, peer="p", session="long"),
                thread.submit_part(step, Urgency.DECODE, peer="p", session="short"),
            )

    try:
        asyncio.run(main())
    finally:
        thread.close()
    assert [1] in pieces
    assert sum(map(sum, pieces)) == 65


@pytest.mark.parametrize(
    ("device", "step_seconds", "row_tokens", "brief"),
    [
        ("cpu", 0.03, 1, True),
        ("cpu", 0.03, 2, False),  # a few rows may take three times as long
        ("cpu", 0.01, 16, True),
        ("cpu", 0.06, 1, False),
        ("meta", 0.001, 1, False),
    ],
)
def test_what_the_event_loop_may_compute_itself(
    device: str, step_seconds: float, row_tokens: int, brief: bool
) -> None:
    host: Any = SimpleNamespace(span=SimpleNamespace(device=torch.device(device)), step_seconds=step_seconds)
    assert Host.is_brief(host, row_tokens) is brief


def _fail() -> None:
    raise ValueError("no")


def test_closing_cancels_what_waits() -> None:
    thread = ComputeThread()
    begun, gate = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        gate.wait()

    async def main() -> None:
        first = asyncio.create_task(thread.submit(long, Urgency.DECODE))
        await asyncio.to_thread(begun.wait)
        second = asyncio.create_task(thread.submit(lambda: 1, Urgency.DECODE))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, gate.set)
        await asyncio.to_thread(thread.close)
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(RuntimeError, match="closed"):
            await thread.submit(lambda: 1, Urgency.DECODE)

    asyncio.run(main())


# -- inputs ------------------------------------------------------------------------------------------------------


def frame(**tensors: torch.Tensor) -> Mapping[str, RawTensor]:
    return {name.replace("__", "."): pack(name.replace("__", "."), tensor) for name, tensor in tensors.items()}


def test_inputs_are_cut_to_the_tokens_that_are_wanted() -> None:
    hidden = torch.arange(40.0).view(2, 5, 4)
    positions = torch.arange(20).view(1, 20)
    taken = take_inputs(
        frame(
            hidden=hidden, mask=torch.ones(2, 30, dtype=torch.bool), positions=positions, carry__1=hidden[:, :, :1]
        ),
        FORM,
        position=10,
        begin=12,
        positions_from=3,
    )
    assert torch.equal(taken.hidden, hidden[:, 2:])
    assert taken.mask is not None
    assert taken.mask.shape == (2, 15)
    assert taken.positions is not None
    assert taken.positions.tolist() == [[9, 10, 11]]
    assert torch.equal(taken.carry[1], hidden[:, 2:, :1])


def test_a_frame_without_hidden_states_has_no_size() -> None:
    for tensors in ({}, frame(hidden=torch.ones(2, 3))):
        with pytest.raises(BadPeerDataError):
            sizes(tensors)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-3, 20))
def test_windows_cover_a_range_once(begin: int, length: int, size: int) -> None:
    pieces = windows(begin, begin + length, size)
    assert [at for a, b in pieces for at in range(a, b)] == list(range(begin, begin + length))
    assert all(0 < b - a <= max(1, size) for a, b in pieces)


# -- options -----------------------------------------------------------------------------------------------------


def test_blocks_and_bytes_as_people_write_them() -> None:
    assert parse_blocks(" 3 : 12 ") == (3, 12)
    assert [parse_bytes(text) for text in ("512", "4GB", "1.5 GiB", "2k", "100 mb")] == [
        512,
        4 * 10**9,
        3 * 2**29,
        2000,
        10**8,
    ]
    for text in ("3", "4:3", "3:3", "a:b", "-1:3", ""):
        with pytest.raises(UserInputError):
            parse_blocks(text)
    for text in ("", "many", "4XB", "-1"):
        with pytest.raises(UserInputError):
            parse_bytes(text)
