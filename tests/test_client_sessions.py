"""Sessions over several calls: continued, rolled back, interrupted, they equal a fresh run on their tokens."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from client_models import GREEDY, Pair, left_padded, make_pair, prompt

from nbrunner.client.remote_cache import RemoteCache
from nbrunner.client.session_facade import Session
from nbrunner.errors import SessionError, UserInputError
from nbrunner.protocol.steps import CacheOp

ONE, MORE = prompt(1), prompt(1, 4, seed=2)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_5_text"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Plain caches, sliding windows, recurrent states: the last two cannot be cropped."""
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


def steps_of(session: Session) -> list[int]:
    """From now on, the tokens of each step."""
    steps: list[int] = []
    cache = session._cache
    open_session = cache._open_session

    def watch(inner: Any) -> Any:
        step = inner.step

        def note(hidden: torch.Tensor, **kwargs: Any) -> Any:
            steps.append(hidden.shape[1])
            return step(hidden, **kwargs)

        inner.step = note
        return inner

    if cache.session is not None:
        watch(cache.session)
    cache._open_session = lambda edits, adapter: watch(open_session(edits, adapter))
    return steps


def test_continues(pair: Pair) -> None:
    with pair.ours.inference_session() as session:
        steps = steps_of(session)
        assert (session.position, session.tokens.shape, session.chain) == (0, (0, 0), [])
        first = pair.ours.generate(ONE, session=session, **GREEDY)
        assert torch.equal(first, pair.plain.generate(ONE, **GREEDY))
        assert torch.equal(session.tokens, first)
        assert session.position == 21  # the last of the 22 tokens has not been through the model
        assert len(session.chain) == 2
        second = pair.ours.generate(MORE, session=session, **GREEDY)
        assert torch.equal(second[:, :4], MORE)
        expected = pair.plain.generate(torch.cat([first, MORE], dim=1), **GREEDY)
        assert torch.equal(session.tokens, expected)
        assert torch.equal(second, expected[:, 22:])
        assert steps[0] == 12
        assert steps[10] == 5  # the one token that was left, and the four new ones
        third = pair.ours.generate(session=session, **GREEDY)
        assert third.shape == (1, 10)
        assert torch.equal(session.tokens, pair.plain.generate(expected, **GREEDY))
        assert set(steps[1:10] + steps[11:]) == {1}
    assert pair.open_sessions == 0


@pytest.mark.parametrize("position", [1, 5, 12, 15, 21, 22])
def test_rolls_back(pair: Pair, position: int) -> None:
    with pair.ours.inference_session() as session:
        pair.ours.generate(ONE, session=session, **GREEDY)
        session.position = position
        assert session.tokens.shape == (1, position)
        assert session.position == min(position, 21)
        kept = session.tokens.clone()
        pair.ours.generate(None, session=session, **GREEDY)
        assert torch.equal(session.tokens, pair.plain.generate(kept, **GREEDY))
        session.position = position
        pair.ours.generate(MORE, session=session, **GREEDY)
        assert torch.equal(session.tokens, pair.plain.generate(torch.cat([kept, MORE], dim=1), **GREEDY))


def test_rolls_back_to_nothing(pair: Pair) -> None:
    with pair.ours.inference_session() as session:
        pair.ours.generate(prompt(2), session=session, **GREEDY)
        session.position = 0
        with pytest.raises(UserInputError, match="needs a prompt"):
            pair.ours.generate(session=session)
        pair.ours.generate(ONE, session=session, **GREEDY)  # another number of rows is fine now
        assert torch.equal(session.tokens, pair.plain.generate(ONE, **GREEDY))


@pytest.mark.parametrize("value", [-1, 23, 1000])
def test_position_outside(llama: Pair, value: int) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        with pytest.raises(SessionError, match="holds 22 tokens"):
            session.position = value
        with pytest.raises(UserInputError, match="number of tokens"):
            session.position = "5"
        assert session.position == 21


def test_batch_with_padding(llama: Pair) -> None:
    two, mask = prompt(2, seed=4), left_padded()
    with llama.ours.inference_session() as session:
        first = llama.ours.generate(two, attention_mask=mask, session=session, **GREEDY)
        assert torch.equal(first, llama.plain.generate(two, attention_mask=mask, **GREEDY))
        more = prompt(2, 3, seed=5)
        llama.ours.generate(more, session=session, **GREEDY)
        full = torch.cat([first, more], dim=1)
        full_mask = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], dim=1)
        assert torch.equal(session.tokens, llama.plain.generate(full, attention_mask=full_mask, **GREEDY))
        session.position = 9
        llama.ours.generate(session=session, **GREEDY)
        expected = llama.plain.generate(two[:, :9], attention_mask=mask[:, :9], **GREEDY)
        assert torch.equal(session.tokens, expected)


def test_padding_is_recognised_as_transformers_does(llama: Pair) -> None:
    two = prompt(2, seed=4)
    two[0, :5] = 0  # the padding token
    with llama.ours.inference_session() as session:
        found = llama.ours.generate(two, session=session, **GREEDY)
        assert session.attention_mask[0].tolist() == [0] * 5 + [1] * 17
    assert torch.equal(found, llama.plain.generate(two, **GREEDY))


def test_rows_that_ended_early_are_masked(llama: Pair) -> None:
    two = prompt(2, seed=4)
    free = llama.plain.generate(two, **GREEDY)
    end = int(free[0, 14])  # the first row ends after three tokens
    assert end not in free[1, 12:]
    options = {**GREEDY, "eos_token_id": end, "pad_token_id": 0}
    with llama.ours.inference_session() as session:
        found = llama.ours.generate(two, session=session, **options)
        assert torch.equal(found, llama.plain.generate(two, **options))
        assert session.attention_mask.sum(dim=1).tolist() == [15, 22]
        more = prompt(2, 3, seed=5)
        llama.ours.generate(more, session=session, **GREEDY)
    alone = torch.cat([free[:1, :15], more[:1]], dim=1)
    assert torch.equal(session.tokens[0, -13:], llama.plain.generate(alone, **GREEDY)[0, -13:])


def test_beams_and_samples_inside_a_session(pair: Pair) -> None:
    with pair.ours.inference_session() as session:
        pair.ours.generate(ONE, session=session, num_beams=3, **GREEDY)
        expected = pair.plain.generate(ONE, num_beams=3, **GREEDY)
        assert torch.equal(session.tokens, expected)
        pair.ours.generate(MORE, session=session, num_beams=2, **GREEDY)  # beams over caches that hold something
        expected = pair.plain.generate(torch.cat([expected, MORE], dim=1), num_beams=2, **GREEDY)
        assert torch.equal(session.tokens, expected)
        pair.ours.generate(session=session, **GREEDY)
        expected = pair.plain.generate(expected, **GREEDY)
        assert torch.equal(session.tokens, expected)
        torch.manual_seed(3)
        pair.ours.generate(session=session, do_sample=True, num_return_sequences=3, max_new_tokens=5)
        torch.manual_seed(3)
        expected = pair.plain.generate(expected, do_sample=True, num_return_sequences=3, max_new_tokens=5)
        assert torch.equal(session.tokens, expected)
        pair.ours.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, pair.plain.generate(expected, **GREEDY))


def test_drafted_decoding_inside_a_session(llama: Pair) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        llama.ours.generate(MORE, session=session, prompt_lookup_num_tokens=3, **GREEDY)
        expected = llama.plain.generate(torch.cat([llama.plain.generate(ONE, **GREEDY), MORE], dim=1), **GREEDY)
        assert torch.equal(session.tokens, expected)
        llama.ours.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, llama.plain.generate(expected, **GREEDY))


class _Interrupt:
    """A streamer that is interrupted after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("turn", [1, 2])
def test_an_interrupted_generate_leaves_it_consistent(pair: Pair, after: int, turn: int) -> None:
    with pair.ours.inference_session() as session:
        if turn == 2:
            pair.ours.generate(ONE, session=session, **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            pair.ours.generate(MORE, session=session, streamer=_Interrupt(after), **GREEDY)
        kept = session.tokens.clone()
        base = 22 if turn == 2 else 0
        assert kept.shape[1] == (base + 4 + after - 1 if after else base)
        assert session.position == (kept.shape[1] if after else max(base - 1, 0))
        if not kept.numel():
            kept = ONE
            pair.ours.generate(ONE, session=session, **GREEDY)
        else:
            pair.ours.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, pair.plain.generate(kept, **GREEDY))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_failed_step_leaves_it_consistent(llama: Pair, beams: int) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        kept = session.tokens.clone()
        inner, calls = session._cache.session, 0
        step = inner.step

        def failing(hidden: torch.Tensor, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return step(hidden, **kwargs)

        inner.step = failing
        with pytest.raises(KeyboardInterrupt):
            llama.ours.generate(MORE, session=session, num_beams=beams, **GREEDY)
        if beams == 1:
            assert session.tokens.shape[1] == 22 + 4 + 2
            kept = session.tokens.clone()
        assert torch.equal(session.tokens, kept)
        llama.ours.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, llama.plain.generate(kept, **GREEDY))


def test_streamer_sees_only_what_is_new(llama: Pair) -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([-1])

    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        notes = Notes()
        second = llama.ours.generate(MORE, session=session, streamer=notes, **GREEDY)
    assert notes.seen[0] == MORE[0].tolist()
    assert [token for part in notes.seen[:-1] for token in part] == second[0].tolist()
    assert notes.seen[-1] == [-1]


def test_a_dictionary_holds_what_is_new(llama: Pair) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        output = llama.ours.generate(
            input_ids=MORE, session=session, return_dict_in_generate=True, output_scores=True, **GREEDY
        )
        assert output.sequences.shape == (1, 14)
        assert len(output.scores) == 10
        assert not session.closed


def test_max_length(llama: Pair) -> None:
    with llama.ours.inference_session(max_length=30) as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        steps = steps_of(session)
        with pytest.raises(UserInputError, match="max_length of 30"):
            llama.ours.generate(MORE, session=session, max_new_tokens=5)
        assert steps == []
        assert session.tokens.shape == (1, 22)
        llama.ours.generate(MORE, session=session, max_new_tokens=4)
        assert session.tokens.shape == (1, 30)
    with pytest.raises(UserInputError, match="at least 1"):
        llama.ours.inference_session(max_length=0)


def test_used_after_close(llama: Pair) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
    assert session.closed
    assert session.tokens.shape == (1, 22)
    with pytest.raises(SessionError, match="closed"):
        llama.ours.generate(MORE, session=session)
    with pytest.raises(SessionError, match="closed"):
        session.position = 3
    assert "closed" in repr(session)
    assert llama.open_sessions == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.tensor([[200]])}, "vocabulary"),
        ({"inputs": prompt(2)}, "1 rows"),
        ({"inputs": MORE, "attention_mask": torch.ones(1, 7)}, "attention_mask"),
        ({"inputs": MORE, "use_cache": False}, "use_cache"),
        ({"inputs": MORE, "input_ids": MORE}, "once"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds"),
        ({"inputs": MORE.repeat(1, 1000)}, "at most"),
    ],
)
def test_bad_input_changes_nothing(llama: Pair, arguments: dict[str, Any], message: str) -> None:
    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, **GREEDY)
        steps = steps_of(session)
        with pytest.raises(UserInputError, match=message):
            llama.ours.generate(**arguments, session=session, max_new_tokens=2)
        assert steps == []
        assert session.tokens.shape == (1, 22)


def test_one_generation_at_a_time(llama: Pair) -> None:
    class Again:
        def put(self, value: torch.Tensor) -> None:
            with pytest.raises(SessionError, match="generating already"):
                llama.ours.generate(MORE, session=session, **GREEDY)

        def end(self) -> None:
            pass

    with llama.ours.inference_session() as session:
        llama.ours.generate(ONE, session=session, streamer=Again(), **GREEDY)


def test_collected_caches_close_their_sessions(llama: Pair) -> None:
    with torch.no_grad():
        output = llama.ours(ONE)
    assert llama.open_sessions == 1
    del output
    gc.collect()
    assert llama.open_sessions == 0


def test_operations_of_the_cache(llama: Pair) -> None:
    cache: RemoteCache = llama.ours.new_cache()
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([0]))
    assert (cache._ops, len(cache), cache.get_seq_length(), cache.batch_size) == ([], 4, 0, -1)
    with torch.no_grad():
        llama.ours(prompt(2), past_key_values=cache)
    assert cache.ids is not None
    assert torch.equal(cache.ids, prompt(2))
    cache.crop(0)
    cache.reorder_cache(torch.tensor([0, 1]))  # nothing changes: nothing is sent
    assert cache._ops == []
    cache.crop(-3)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    assert cache._ops == [CacheOp("crop", 8), CacheOp("select", rows=[1, 1]), CacheOp("repeat", 2)]
    assert torch.equal(cache.ids, prompt(2)[[1, 1, 1, 1], :8])
    with pytest.raises(UserInputError, match="below zero"):
        cache.crop(3)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(SessionError, match="cannot be"):
            copied(cache)
    with pytest.raises(UserInputError, match="4 rows"):
        llama.ours(prompt(2), past_key_values=cache, use_cache=True)
    with torch.no_grad():
        found = llama.ours(prompt(4, 2, seed=9), past_key_values=cache).logits
        expected = llama.plain(torch.cat([prompt(2)[[1] * 4, :8], prompt(4, 2, seed=9)], dim=1)).logits[:, -2:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    cache.reset()
    assert cache._ops == [CacheOp("reset")]
    with torch.no_grad():
        torch.testing.assert_close(
            llama.ours(ONE, past_key_values=cache).logits, llama.plain(ONE).logits, rtol=0, atol=1e-5
        )
    cache.close()
    assert repr(cache) == "<RemoteCache closed in 4 blocks>"
    with pytest.raises(SessionError, match="closed"):
        llama.ours(MORE, past_key_values=cache)
