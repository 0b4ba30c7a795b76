"""`model.trace`: numbers of every layer and token, against plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from client_models import Pair, make_pair, prompt
from parity.chain import local_model

from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.edits import Edit
from nbrunner.client.trace import Trace
from nbrunner.errors import UserInputError


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    yield pair
    pair.ours.close()


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    model = local_model(resolve_checkpoint("tiny"), 5)
    yield model
    model.close()


@torch.no_grad()
def plain_states(plain: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """States 0 to N of the plain model, the last one before the final norm."""
    last: list[torch.Tensor] = []
    hook = plain.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    try:
        states = plain(ids, output_hidden_states=True, use_cache=False).hidden_states
    finally:
        hook.remove()
    return [*states[:-1], last[0]]


@torch.no_grad()
def plain_lens(plain: Any, state: torch.Tensor) -> torch.Tensor:
    logits = plain.lm_head(plain.model.norm(state))
    cap = getattr(plain.config, "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)


def test_the_numbers_of_the_plain_model(pair: Pair) -> None:
    ids = prompt()
    trace = pair.ours.trace(ids, keep=("norm", "similarity", "lens", "kl", "hidden"), top_k=3, tokens=[7, 9])
    states = plain_states(pair.plain, ids)
    assert trace.layers == list(range(len(states)))
    assert trace.positions == list(range(ids.shape[1]))
    assert trace.hidden is not None
    for layer, state in enumerate(states):
        assert torch.equal(trace.hidden[layer], state[0])
        lens = plain_lens(pair.plain, state)[0]
        final = plain_lens(pair.plain, states[-1])[0]
        best = lens.topk(3)
        close(trace.norm[layer], state[0].norm(dim=-1))
        close(trace.cos_last[layer], torch.cosine_similarity(state[0], states[-1][0], dim=-1))
        close(trace.entropy[layer], -(lens.exp() * lens).sum(-1))
        close(trace.kl[layer], (final.exp() * (final - lens)).sum(-1))
        close(trace.top_probs[layer], best.values.exp())
        close(trace.prob(9)[layer], lens[:, 9].exp())
        assert np.array_equal(trace.rank(7)[layer], (lens > lens[:, 7:8]).sum(-1).numpy())
        if layer:
            close(trace.cos_previous[layer], torch.cosine_similarity(state[0], states[layer - 1][0], dim=-1))


def close(got: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(np.asarray(got)), wanted.float(), atol=2e-5, rtol=1e-4)


def test_some_layers_and_positions(pair: Pair) -> None:
    ids, last = prompt(), pair.runner.num_blocks
    whole, some = pair.ours.trace(ids), pair.ours.trace(ids, layers=[1, -1], positions=slice(-3, None))
    assert some.layers == [1, last]
    assert some.positions == [9, 10, 11]
    for name in ("norm", "cos_previous", "cos_last", "entropy", "kl", "top_probs", "top_ids"):
        assert np.allclose(getattr(some, name), getattr(whole, name)[[1, last]][:, 9:], atol=1e-5), name
    only = pair.ours.trace(ids, keep=("norm",))
    assert only.norm is not None
    assert (only.top_ids, only.kl, only.cos_last) == (None, None, None)


def test_the_last_state_is_the_prediction(pair: Pair) -> None:
    ids = prompt()
    trace = pair.ours.trace(ids, layers=[-1], top_k=1)
    with torch.no_grad():
        wanted = pair.plain(ids).logits[0].argmax(-1)
    assert trace.top_ids[0, :, 0].tolist() == wanted.tolist()
    assert np.allclose(trace.kl, 0, atol=1e-6)


def test_edits_are_seen(pair: Pair) -> None:
    ids = prompt()
    v = torch.randn(pair.ours.config.hidden_size, generator=torch.Generator().manual_seed(1))
    last = pair.runner.num_blocks
    edits = [Edit.set(0, v, 2), Edit.add(2, v), Edit.scale(last, 3.0)]
    trace = pair.ours.trace(ids, keep=("hidden", "lens"), edits=edits)
    before = pair.ours.trace(ids, keep=("hidden",))
    with torch.no_grad():
        out = pair.ours(ids, use_cache=False, edits=edits)
    torch.testing.assert_close(trace.hidden[0, 2], v)
    assert not torch.equal(trace.hidden[2], before.hidden[2])
    assert trace.top_ids[last, :, 0].tolist() == out.logits[0].argmax(-1).tolist()
    # a state that was not kept is fetched with the same edits
    again = pair.ours.trace(ids, keep=("norm",), edits=edits)
    assert torch.equal(again.state(2, -1), trace.hidden[2, -1])


def test_who_computed_what(pair: Pair) -> None:
    trace = pair.ours.trace(prompt())
    assert trace.peer_of(0) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": [9]}, "states 0 to 4"),
        ({"layers": []}, "states 0 to 4"),
        ({"layers": [2, 1]}, "rising"),
        ({"positions": 12}, "positions 0 to 11"),
        ({"keep": ("everything",)}, "norm, similarity"),
        ({"keep": "norm"}, "norm, similarity"),
        ({"top_k": 0}, "top_k"),
        ({"tokens": [10**6]}, "vocabulary"),
        ({"tokens": [1], "keep": ("norm",)}, "lens"),
        ({"tokens": ["a word"]}, "tokenizer"),
        ({"limit": 1000}, "MB allowed"),
    ],
)
def test_what_cannot_be_traced(pair: Pair, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        pair.ours.trace(prompt(), **arguments)


@pytest.mark.parametrize("text", ["a text", [], torch.zeros(2, 3, dtype=torch.long), [10**6]])
def test_texts_that_cannot_be_traced(pair: Pair, text: Any) -> None:
    with pytest.raises(UserInputError):
        pair.ours.trace(text)


# -- the bundled model shows something true ------------------------------------------------------------------------


def test_the_layer_where_the_capital_appears(tiny: Any) -> None:
    trace: Trace = tiny.trace("The capital of France is", tokens=[" Paris", " Madrid"])
    assert trace.tokens[-2:] == [" France", " is"]
    paris = trace.prob(" Paris")[:, -1]
    assert paris[:6].max() < 0.01 < paris[6] < 0.5 < paris[8]
    assert trace.token_text(trace.top_ids[-1, -1, 0]) == " Paris"


def test_patching_moves_the_answer(tiny: Any) -> None:
    """The country sits on its own token until block 6 reads it from there."""
    spain = tiny.trace("The capital of Spain is", keep=("norm",))

    def madrid(layer: int, position: int) -> float:
        trace = tiny.trace(
            "The capital of France is",
            edits=[Edit.patch(layer, position, spain)],
            layers=[-1],
            positions=-1,
            tokens=[" Madrid"],
        )
        return float(trace.prob(" Madrid")[0, 0])

    assert madrid(2, -2) > 0.9 > 0.1 > madrid(2, -1)
    assert madrid(7, -1) > 0.9 > 0.1 > madrid(7, -2)


def test_a_token_must_be_one(tiny: Any) -> None:
    with pytest.raises(UserInputError, match="tokens"):
        tiny.trace("The capital of France is", tokens=["Paris and Madrid"])
    trace = tiny.trace("The capital of France is")
    with pytest.raises(UserInputError, match="asked for"):
        trace.prob(" Paris")
