"""Caches of a span: the growing layer against transformers' own, and what a session may do to its caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.families import tiny_config
from transformers import DynamicCache

from nbrunner.blocks.cache import GrowingLayer, SpanCache
from nbrunner.errors import UserInputError

OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 50)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=6)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("reset"), st.none()),
)


def full_cache(slots=(0,), name="llama") -> SpanCache:
    return SpanCache(tiny_config(name), frozenset(slots), start=min(slots), end=max(slots) + 1)


def append(cache, tokens: int, rows: int, slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 6)
    cache.update(keys, values, slot)
    if isinstance(cache, SpanCache):
        cache.length += tokens
    return keys, values


@settings(max_examples=150)
@given(st.lists(OPERATIONS, max_size=14), st.integers(1, 3))
@torch.inference_mode()  # as every step runs
def test_a_growing_cache_holds_what_a_concatenated_one_does(operations, rows) -> None:
    plain, ours = DynamicCache(), full_cache()
    for kind, argument in operations:
        if kind == "update":
            keys, values = torch.randn(rows, 2, argument, 4), torch.randn(rows, 2, argument, 6)
            expected = plain.update(keys, values, 0)
            found = ours.update(keys, values, 0)
            ours.length += argument
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        elif kind == "crop":
            count = min(argument, ours.length)
            if count == ours.length:
                continue  # the plain layer then holds an empty tensor, ours an empty view
            plain.crop(-count)
            ours.crop(count)
        elif kind == "reset":
            plain = DynamicCache()
            ours.reset()
        elif ours.length:
            index = torch.tensor([row % rows for row in argument]) if kind == "select" else None
            if index is not None:
                plain.reorder_cache(index)
                ours.select(index)
                rows = len(index)
            elif rows * argument <= 12:
                plain.batch_repeat_interleave(argument)
                ours.repeat(argument)
                rows *= argument
        assert plain.get_seq_length() == ours.get_seq_length() == ours.length
        if ours.length:
            assert torch.equal(plain.layers[0].keys, ours.layers[0].keys)
            assert torch.equal(plain.layers[0].values, ours.layers[0].values)


def test_buffers_grow_by_pages_and_an_eighth_instead_of_in_every_step() -> None:
    cache = full_cache()
    assert isinstance(cache.layers[0], GrowingLayer)
    sizes = []
    for length in range(1, 1001):
        append(cache, 1, 1)
        held = [layer for layer in cache.layers if layer.keys is not None]
        sizes.append(cache.nbytes())
        if length >= 256:
            assert sizes[-1] <= 1.2 * sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    assert len(set(sizes)) < 30
    assert sorted(sizes) == sizes


def test_a_crop_moves_nothing() -> None:
    cache = full_cache()
    append(cache, 50, 1)
    before = cache.layers[0].keys.data_ptr()
    cache.crop(20)
    assert (cache.length, cache.layers[0].keys.data_ptr()) == (30, before)


def test_bytes_are_counted_with_the_reserve() -> None:
    cache = full_cache()
    assert cache.nbytes() == 0
    append(cache, 3, 2)
    assert cache.nbytes() == 2 * 2 * 16 * (4 + 6) * 4
    assert cache.batch_rows == 2


def test_slots_that_are_not_held_are_never_written() -> None:
    cache = full_cache(slots=(2, 3))
    append(cache, 5, 1, slot=2)
    assert cache.get_seq_length() == 5  # asked without a number, the first held slot answers
    assert cache.get_mask_sizes(1) == (6, 0)
    with pytest.raises(NotImplementedError):
        append(cache, 5, 1, slot=0)


def test_what_cannot_be_done_is_refused() -> None:
    cache = full_cache()
    append(cache, 4, 2)
    with pytest.raises(UserInputError, match="take back 5"):
        cache.crop(5)
    with pytest.raises(UserInputError, match="row 2"):
        cache.select([0, 2])
    with pytest.raises(UserInputError, match="row numbers"):
        cache.select([-1])
    with pytest.raises(UserInputError, match="repeated 0"):
        cache.repeat(0)
    assert cache.length == 4


def test_a_window_that_has_forgotten_cannot_be_rolled_back_unless_it_recorded() -> None:
    for recorded in (False, True):
        cache = full_cache(name="mistral")  # a window of 8
        if recorded:
            cache.record()
        for _ in range(10):
            append(cache, 1, 1)
        assert cache.croppable is recorded
        if recorded:
            cache.crop(3)
            assert cache.length == cache.get_seq_length() == 7
        else:
            with pytest.raises(UserInputError, match="Replay"):
                cache.crop(3)


def test_caches_made_in_inference_mode_can_be_changed_outside_it() -> None:
    cache = full_cache()
    with torch.inference_mode():
        append(cache, 4, 2)
    cache.select([1, 0])
    cache.crop(1)
    cache.reset()
    with torch.inference_mode():
        append(cache, 2, 2)
    assert cache.length == 2
