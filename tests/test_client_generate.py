"""`generate` and `forward` over spans give what the plain model gives, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from client_models import GREEDY, Pair, left_padded, make_pair, prompt, save_plain, without_end

from nbrunner.errors import SessionError, UserInputError

FAMILIES = ["llama", "bloom", "gemma2", "gemma3_text", "gpt2", "qwen3", "opt"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = save_plain("llama", tmp_path_factory.mktemp("assistant"), seed=5)
    without_end(model)
    return model


ONE, TWO = prompt(1), prompt(2, seed=2)
MASK = left_padded()

WAYS: dict[str, Callable[[Any], torch.Tensor]] = {
    "greedy": lambda m: m.generate(ONE, **GREEDY),
    "left padding": lambda m: m.generate(TWO, attention_mask=MASK, **GREEDY),
    "beams": lambda m: m.generate(TWO, num_beams=3, **GREEDY),
    "beams with padding": lambda m: m.generate(TWO, attention_mask=MASK, num_beams=3, **GREEDY),
    "beams, all returned": lambda m: m.generate(TWO, num_beams=3, num_return_sequences=3, **GREEDY),
    "beams, sampled": lambda m: m.generate(TWO, num_beams=3, max_new_tokens=8, do_sample=True),
    "sampled, four of each": lambda m: m.generate(
        TWO, do_sample=True, num_return_sequences=4, max_new_tokens=8, temperature=0.9, top_p=0.9, top_k=20
    ),
    "typical and min_p": lambda m: m.generate(ONE, do_sample=True, max_new_tokens=8, typical_p=0.9, min_p=0.01),
    "penalties": lambda m: m.generate(ONE, repetition_penalty=1.3, no_repeat_ngram_size=2, **GREEDY),
    "prompt lookup": lambda m: m.generate(ONE.repeat(1, 2), prompt_lookup_num_tokens=3, **GREEDY),
    "guidance": lambda m: m.generate(ONE, guidance_scale=1.5, **GREEDY),
    "prefill in chunks": lambda m: m.generate(TWO, prefill_chunk_size=5, **GREEDY),
    "embeddings": lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(TWO), **GREEDY),
    "no cache": lambda m: m.generate(TWO, use_cache=False, **GREEDY),
    "a static cache asked for": lambda m: m.generate(
        ONE, cache_implementation="static", disable_compile=True, **GREEDY
    ),
    "steps by hand": lambda m: _by_hand(m),
    "cache of an earlier call": lambda m: _second_turn(m),
    "padded forward": lambda m: m(TWO, attention_mask=MASK).logits[0, 5:],
    "loss": lambda m: m(TWO, labels=TWO).loss,
    "a tuple": lambda m: m(TWO, return_dict=False)[0],
}


@torch.no_grad()
def _by_hand(model: Any) -> torch.Tensor:
    cache, logits = None, []
    for piece in (TWO[:, :5], TWO[:, 5:6], TWO[:, 6:]):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _second_turn(model: Any) -> torch.Tensor:
    first = model.generate(TWO, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, TWO[:, :3]], dim=1)
    return model.generate(longer, past_key_values=first.past_key_values, **GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_same_as_the_plain_model(pair: Pair, way: str) -> None:
    results = []
    for model in (pair.plain, pair.ours):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(WAYS[way](model))
    expected, found = results
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    del results, found
    assert pair.open_sessions == 0  # whatever was opened for the call is closed with it


@pytest.mark.parametrize("sampled", [False, True])
def test_assisted(llama: Pair, assistant: Any, sampled: bool) -> None:
    results = []
    for model in (llama.plain, llama.ours):
        torch.manual_seed(3)
        results.append(model.generate(ONE, assistant_model=assistant, max_new_tokens=10, do_sample=sampled))
    assert torch.equal(*results)


def test_a_distributed_model_assists(llama: Pair) -> None:
    expected = llama.plain.generate(ONE, **GREEDY)
    assert torch.equal(llama.plain.generate(ONE, assistant_model=llama.ours, **GREEDY), expected)
    assert torch.equal(llama.ours.generate(ONE, assistant_model=llama.ours, **GREEDY), expected)
    assert llama.open_sessions == 0


def test_hidden_states(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.plain(TWO, attention_mask=MASK, output_hidden_states=True, use_cache=False).hidden_states
        found = pair.ours(TWO, attention_mask=MASK, output_hidden_states=True, use_cache=False).hidden_states
    assert len(found) == len(expected) == pair.runner.num_blocks + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0, 5:], other[0, 5:], rtol=0, atol=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5)


def test_hidden_states_in_generate(pair: Pair) -> None:
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True, **GREEDY}
    expected, found = pair.plain.generate(TWO, **options), pair.ours.generate(TWO, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert len(one) == len(other)
        for state, reference in zip(one, other, strict=True):
            torch.testing.assert_close(state, reference, rtol=0, atol=1e-5)


def test_streamer_sees_the_same(llama: Pair) -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    seen = []
    for model in (llama.plain, llama.ours):
        notes = Notes()
        model.generate(ONE, streamer=notes, **GREEDY)
        seen.append(notes.seen)
    assert seen[0] == seen[1]


def test_the_returned_cache_stays_open_and_others_close(llama: Pair) -> None:
    output = llama.ours.generate(ONE, return_dict_in_generate=True, guidance_scale=1.5, **GREEDY)
    assert llama.open_sessions == 1  # that of the result; the one for the guidance is closed
    del output
    assert llama.open_sessions == 0


def test_an_interrupted_generate_frees_its_caches(llama: Pair) -> None:
    class Interrupt:
        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        llama.ours.generate(ONE, streamer=Interrupt(), **GREEDY)
    assert llama.open_sessions == 0


def test_beams_compute_their_prompt_once(llama: Pair) -> None:
    before = len(llama.runner.sessions)
    output = llama.ours.generate(TWO, num_beams=3, return_dict_in_generate=True, **GREEDY)
    assert len(llama.runner.sessions) == before + 1
    history = llama.runner.sessions[-1].history
    assert history.batch == 6
    assert output.past_key_values.batch_size == 6
    calls = _prefill_rows(llama, num_beams=3)
    assert calls == [2, 6]


def _prefill_rows(pair: Pair, **options: Any) -> list[int]:
    """Rows of the first two steps."""
    rows: list[int] = []
    open_session = pair.runner.open_session

    def noting(edits: Any = None, **_: Any) -> Any:
        session = open_session()
        step = session.step

        def note(hidden: torch.Tensor, **kwargs: Any) -> Any:
            rows.append(hidden.shape[0])
            return step(hidden, **kwargs)

        session.step = note
        return session

    pair.runner.open_session = noting
    try:
        pair.ours.generate(TWO, **options, max_new_tokens=3, do_sample=False)
    finally:
        pair.runner.open_session = open_session
    return rows[:2]


def test_gradients(pair: Pair) -> None:
    def gradient(model: Any) -> torch.Tensor:
        embeds = model.get_input_embeddings()(TWO).detach().requires_grad_(True)
        model(inputs_embeds=embeds, attention_mask=MASK, use_cache=False).logits[:, 5:].pow(2).mean().backward()
        return embeds.grad

    expected = gradient(pair.plain)
    torch.testing.assert_close(gradient(pair.ours), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_through_inner_hidden_states(pair: Pair) -> None:
    def gradient(model: Any) -> torch.Tensor:
        embeds = model.get_input_embeddings()(TWO).detach().requires_grad_(True)
        states = model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True).hidden_states
        (states[0].sin().mean() + states[2].pow(2).mean() + states[3].cos().mean()).backward()
        return embeds.grad

    expected = gradient(pair.plain)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(gradient(pair.ours), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_blocks_are_modules(llama: Pair) -> None:
    blocks = llama.ours.blocks
    assert len(blocks) == 4
    assert (blocks[-1].start, blocks[-1].end) == (3, 4)
    assert [(one.start, one.end) for one in blocks[1:3]] == [(1, 2), (2, 3)]
    assert repr(blocks[1:3]) == "<RemoteBlocks [1, 3) of hidden 64, torch.float32>"
    with torch.no_grad():
        states = llama.plain(TWO, output_hidden_states=True).hidden_states
        torch.testing.assert_close(blocks[0:3](states[0]), states[3], rtol=0, atol=1e-5)
        torch.testing.assert_close(blocks[1](states[1]), states[2], rtol=0, atol=1e-5)
    hidden = states[1].clone().requires_grad_(True)
    blocks[1:3](hidden).pow(2).sum().backward()
    whole = states[1].clone().requires_grad_(True)
    blocks[2](blocks[1](whole)).pow(2).sum().backward()
    torch.testing.assert_close(hidden.grad, whole.grad, rtol=1e-4, atol=1e-4)


def test_blocks_refuse_what_does_not_fit(llama: Pair) -> None:
    blocks = llama.ours.blocks
    good = torch.zeros(1, 3, 64)
    for bad, message in (
        (good[0], "shape"),
        (good.double(), "float32"),
        (good[..., :32], r"\[1, 3, 32\]"),
        (good[:, :0], "at least one"),
        (torch.full_like(good, float("nan")), "NaN"),
        ([1.0], "list"),
    ):
        with pytest.raises(UserInputError, match=message):
            blocks[0](bad)
    with pytest.raises(UserInputError, match="position_ids"):
        blocks[0](good, position_ids=torch.arange(4)[None])
    with pytest.raises(UserInputError, match="attention_mask"):
        blocks[0](good, attention_mask=torch.ones(1, 4))
    with pytest.raises(UserInputError, match="empty"):
        blocks[3:2]
    with pytest.raises(UserInputError, match="step"):
        blocks[::2]
    with pytest.raises(IndexError, match="there are 4"):
        blocks[4]


def test_no_silent_loss_of_gradients(llama: Pair) -> None:
    embeds = llama.ours.get_input_embeddings()(ONE).detach().requires_grad_(True)
    output = llama.ours(inputs_embeds=embeds, use_cache=True)
    with pytest.raises(UserInputError, match="use_cache=False"):
        output.logits.sum().backward()
    output = llama.ours(inputs_embeds=embeds)  # nobody asked for a cache: gradients it is
    output.logits.sum().backward()
    assert embeds.grad is not None
    with pytest.raises(SessionError, match="gradients were being computed"):
        llama.ours(ONE, past_key_values=output.past_key_values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.empty(1, 0, dtype=torch.long)}, "empty"),
        ({"inputs": torch.tensor([[1, 96]])}, "vocabulary is 0 to 95"),
        ({"inputs": torch.tensor([[1, -1]])}, "vocabulary"),
        ({"inputs": torch.tensor([1, 2])}, "shape"),
        ({"inputs": torch.ones(1, 3)}, "integer"),
        ({"inputs": [[1, 2]]}, "tensor"),
        ({"inputs": ONE, "attention_mask": torch.ones(1, 5)}, "attention_mask"),
        ({"inputs": ONE, "attention_mask": torch.zeros(1, 12)}, "without any token"),
        ({"inputs": ONE.repeat(1, 100)}, "at most"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_sent(
    llama: Pair, arguments: dict[str, Any], message: str
) -> None:
    before = len(llama.runner.sessions)
    with pytest.raises(UserInputError, match=message):
        llama.ours.generate(**arguments, max_new_tokens=3)
    assert sum(session.length for session in llama.runner.sessions[before:]) == 0
    assert llama.open_sessions == 0


def test_other_bad_input(llama: Pair) -> None:
    from transformers import DynamicCache

    with pytest.raises(UserInputError, match="DynamicCache"):
        llama.ours(ONE, past_key_values=DynamicCache(config=llama.ours.config))
    with pytest.raises(UserInputError, match="output_attentions"):
        llama.ours(ONE, output_attentions=True)
    with pytest.raises(UserInputError, match="tensor of shape"):
        llama.ours(ONE, attention_mask=torch.ones(1, 1, 12, 12))
    with pytest.raises(UserInputError, match="position_ids"):
        llama.ours(ONE, position_ids=torch.arange(5)[None])


def test_learned_positions_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = make_pair("gpt2", tmp_path_factory.mktemp("short"))
    limit = pair.ours.config.n_positions
    long = prompt(1, limit - 2)
    with pytest.raises(UserInputError, match="positions for only"):
        pair.ours.generate(long, max_new_tokens=5)
    assert torch.equal(
        pair.ours.generate(long, max_new_tokens=2, do_sample=False),
        pair.plain.generate(long, max_new_tokens=2, do_sample=False),
    )


def test_a_closed_model_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = make_pair("llama", tmp_path_factory.mktemp("closed"))
    pair.ours.close()
    pair.ours.close()
    for use in (lambda: pair.ours.generate(ONE), lambda: pair.ours.blocks, lambda: pair.ours.inference_session()):
        with pytest.raises(SessionError, match="load it again"):
            use()


def test_it_is_the_architectures_own_class(pair: Pair) -> None:
    assert type(pair.ours).__name__ == type(pair.plain).__name__
    assert isinstance(pair.ours, type(pair.plain))
    assert not pair.ours.training
