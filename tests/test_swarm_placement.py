from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.errors import UserInputError
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.placement import choose_span


def record(start: int, end: int, speed: float = 1.0, state: str = "online") -> ServerRecord:
    return ServerRecord("m@1", 12, start, end, state, prefill_tokens_per_second=speed)  # type: ignore[arg-type]


@st.composite
def records(draw: st.DrawFn) -> list[ServerRecord]:
    made = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, 11))
        made.append(record(start, draw(st.integers(start + 1, 12)), draw(st.sampled_from([0.0, 1.0, 5.0]))))
    return made


@given(records(), st.integers(1, 12), st.integers(1, 20))
def test_the_range_fits_and_takes_the_worst_block(held: list[ServerRecord], blocks: int, count: int) -> None:
    start, end = choose_span(held, blocks, count)
    assert 0 <= start < end <= blocks
    assert end - start == min(count, blocks)
    holders = [sum(one.start <= block < one.end for one in held) for block in range(blocks)]
    assert min(holders[start:end]) == min(holders)
    # no other range has more blocks that nobody serves
    size = end - start
    assert holders[start:end].count(0) == max(
        holders[first : first + size].count(0) for first in range(blocks - size + 1)
    )


@given(records(), st.integers(1, 12))
def test_servers_that_choose_one_after_the_other_cover_everything(held: list[ServerRecord], count: int) -> None:
    for _ in range(12):
        if all(any(one.start <= block < one.end for one in held) for block in range(12)):
            return
        before = sum(any(one.start <= block < one.end for one in held) for block in range(12))
        held = [*held, record(*choose_span(held, 12, count))]
        assert sum(any(one.start <= block < one.end for one in held) for block in range(12)) > before
    assert all(any(one.start <= block < one.end for one in held) for block in range(12))


def test_examples() -> None:
    assert choose_span([], 8, 3) == (0, 3)
    assert choose_span([record(0, 3)], 8, 3) == (3, 6)
    assert choose_span([record(0, 3), record(3, 8)], 8, 3) == (0, 3)
    assert choose_span([record(0, 4, 1.0), record(4, 8, 0.5)], 8, 4) == (4, 8), "the slower half needs help"
    assert choose_span([record(0, 4, state="draining"), record(4, 8)], 8, 4) == (0, 4), "who leaves does not count"
    assert choose_span([record(0, 12)], 8, 100) == (0, 8)


@pytest.mark.parametrize(("blocks", "count"), [(0, 1), (4, 0), (4, -1)])
def test_nothing_to_choose(blocks: int, count: int) -> None:
    with pytest.raises(UserInputError):
        choose_span([], blocks, count)
