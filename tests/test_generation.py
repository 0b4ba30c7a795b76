"""Generation as a handle: tokens as they come, log-probabilities, seeds, stopping. Against plain transformers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import nbrunner.tiny
from nbrunner.client.detokenize import StreamingDecoder
from nbrunner.client.generation import start_generation
from nbrunner.errors import UserInputError

TINY = Path(nbrunner.tiny.__file__).parent
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def plain(model, tokenizer, prompt=PROMPT, **options):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, **options)
    return output[0, inputs.input_ids.shape[1] :].tolist()


def test_greedy_is_what_transformers_gives(model, tokenizer):
    result = start_generation(model, tokenizer, PROMPT, max_new_tokens=12).result(60)
    assert result.ids == plain(model, tokenizer, max_new_tokens=12, do_sample=False)
    assert result.text == tokenizer.decode(result.ids, skip_special_tokens=True)
    assert "".join(token.text for token in result.tokens) == result.text


def test_sampling_with_a_seed_is_what_transformers_gives_and_leaves_the_global_generator_alone(model, tokenizer):
    torch.manual_seed(7)
    expected = plain(model, tokenizer, max_new_tokens=20, do_sample=True, temperature=1.7, top_k=40, top_p=0.9)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    options = {"max_new_tokens": 20, "temperature": 1.7, "top_k": 40, "top_p": 0.9}
    result = start_generation(model, tokenizer, PROMPT, seed=7, **options).result(60)
    assert result.ids == expected
    assert torch.equal(torch.get_rng_state(), before)
    other = start_generation(model, tokenizer, PROMPT, **options).result(60)
    again = start_generation(model, tokenizer, PROMPT, seed=other.receipt["sampling"]["seed"], **options).result(60)
    assert again.ids == other.ids


def test_beams_are_what_transformers_gives(model, tokenizer):
    result = start_generation(model, tokenizer, PROMPT, max_new_tokens=10, beams=3).result(60)
    expected = plain(model, tokenizer, max_new_tokens=10, num_beams=3, do_sample=False)
    assert result.ids == expected
    assert result.logprobs == pytest.approx(score(model, tokenizer, PROMPT, result.ids), abs=1e-3)


def score(model, tokenizer, prompt, ids):
    """Log-probabilities of a continuation, by one forward pass."""
    start = tokenizer(prompt, return_tensors="pt").input_ids
    whole = torch.cat([start, torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logs = torch.log_softmax(model(whole).logits[0].float(), dim=-1)
    first = start.shape[1] - 1
    return [float(logs[first + index, token]) for index, token in enumerate(ids)]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_the_models_own(model, tokenizer, temperature):
    result = start_generation(model, tokenizer, PROMPT, max_new_tokens=8, temperature=temperature, seed=3).result(
        60
    )
    assert result.logprobs == pytest.approx(score(model, tokenizer, PROMPT, result.ids), abs=1e-3)


def test_one_handle_serves_for_and_async_for_and_await(model, tokenizer):
    texts = [str(token) for token in start_generation(model, tokenizer, PROMPT, max_new_tokens=5)]

    async def both():
        handle = start_generation(model, tokenizer, PROMPT, max_new_tokens=5)
        tokens = [str(token) async for token in handle]
        return tokens, await handle

    tokens, result = asyncio.run(both())
    assert texts == tokens
    assert result.text == "".join(tokens)


def test_receipt_says_where_it_comes_from_and_is_json(model, tokenizer):
    result = start_generation(model, tokenizer, PROMPT, max_new_tokens=2, temperature=1.0, seed=5).result(60)
    receipt = json.loads(json.dumps(dict(result.receipt)))
    assert receipt["sampling"]["seed"] == 5
    assert receipt["model"]["dtype"] == "float32"
    assert receipt["tokens"] == len(result.tokens) == 2
    assert receipt["finish"] == result.finish == "length"
    assert receipt["versions"]["transformers"] == transformers.__version__
    assert 0 < result.timings.first_token <= result.timings.total
    assert "tok/s" in result.summary()


class Slow(torch.nn.Module):
    """Makes a model wait in its first layer, in an event that can be let go."""

    def __init__(self, layer, gate):
        super().__init__()
        self.layer, self.gate, self.calls = layer, gate, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        self.calls += 1
        time.sleep(self.gate)
        return self.layer(*args, **kwargs)


@pytest.fixture
def slow_model(tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.model.layers[0] = Slow(model.model.layers[0], 0.02)
    return model


def test_cancel_stops_the_thread_and_keeps_the_text(slow_model, tokenizer):
    handle = start_generation(slow_model, tokenizer, "Once upon a time", max_new_tokens=1000)
    tokens = iter(handle)
    first = [next(tokens) for _ in range(3)]
    started = time.monotonic()
    handle.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result(10)
    wait_for(lambda: not any(thread.name == "nbrunner-generate" for thread in threading.enumerate()), 5)
    assert time.monotonic() - started < 1.0
    calls = slow_model.model.layers[0].calls
    partial = handle.partial
    assert partial.finish == "cancelled"
    assert partial.text.startswith("".join(map(str, first)))
    assert len(partial.tokens) <= calls <= len(partial.tokens) + 2


def test_leaving_the_loop_cancels(slow_model, tokenizer):
    handle = start_generation(slow_model, tokenizer, "Once upon a time", max_new_tokens=1000)
    for index, _ in enumerate(handle):
        if index == 2:
            break
    wait_for(lambda: handle.done, 5)
    assert handle.future.cancelled()


def test_a_failure_of_the_model_is_raised_where_it_is_waited_for(slow_model, tokenizer):
    def fail(*_, **__):
        raise UserInputError("no such thing")

    slow_model.model.layers[0].layer.forward = fail
    with pytest.raises(UserInputError, match="no such thing"):
        start_generation(slow_model, tokenizer, PROMPT).result(30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "  \n"}, "empty"),
        ({"prompt": []}, "no tokens"),
        ({"prompt": [[1, 2], [3, 4]]}, "shape"),
        ({"prompt": [5] * 4096}, "too long"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"beams": 0}, "beams"),
        ({"min_new_tokens": 65}, "min_new_tokens"),
        ({"beams": 2, "temperature": 1.0}, "beams or temperature"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(model, tokenizer, options, words):
    threads = threading.active_count()
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(UserInputError, match=words):
        start_generation(model, tokenizer, prompt, **options)
    assert threading.active_count() == threads


def test_a_full_context_ends_the_text_and_says_so(model, tokenizer):
    room = 3
    ids = [5] * (model.config.max_position_embeddings - room)
    result = start_generation(model, tokenizer, ids, max_new_tokens=50, min_new_tokens=50).result(60)
    assert result.finish == "context"
    assert len(result.tokens) == room


def test_the_end_can_be_put_off(model, tokenizer):
    result = start_generation(model, tokenizer, PROMPT, max_new_tokens=30, min_new_tokens=30).result(60)
    assert len(result.tokens) == 30
    assert result.finish == "length"


# -- text as it comes --------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of single bytes: the worst case for characters of several."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=60))
def test_characters_come_whole(text):
    decoder = StreamingDecoder(Bytes())
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2047), max_size=40), st.lists(st.integers(0, 2047), max_size=10))
def test_pieces_of_any_tokens_make_the_decoded_whole(ids, context):
    tokenizer = _tokenizer()
    decoder = StreamingDecoder(tokenizer, context)
    text = "".join(decoder.push(token) for token in ids)
    whole = tokenizer.decode([*context, *ids], skip_special_tokens=True).rstrip("\ufffd")
    assert whole.endswith(text)
    start = tokenizer.decode(context, skip_special_tokens=True)
    if not start.endswith("\ufffd"):
        assert start + text == whole or (start == "" and whole.strip() == text.strip())


def _tokenizer(cache=[]):  # noqa: B006 - one for the whole run: hypothesis calls often
    if not cache:
        cache.append(transformers.AutoTokenizer.from_pretrained(TINY))
    return cache[0]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
