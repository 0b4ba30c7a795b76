"""The lens and the measures against formulas written out on the plain model's hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from client_models import make_pair, prompt
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.blocks import lens as lens_module
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.measuring import measure_states
from nbrunner.errors import UserInputError
from nbrunner.protocol.frames import encode_frame
from nbrunner.protocol.measure import Measure, measured_bytes, measured_shapes, problem_of
from nbrunner.protocol.requests import Forward, ForwardResult
from nbrunner.protocol.steps import HopTiming
from nbrunner.protocol.tensors import pack

FAMILIES = ["llama", "gemma2", "gpt2", "opt", "cohere"]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


def states_of(pair: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """States 0 to N, the last before the final norm."""
    found: list[torch.Tensor] = []
    span = pair.runner.spans[-1]
    embeds: list[torch.Tensor] = []
    layer = pair.ours.nbrunner_skeleton.layer
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        pair.ours(ids, use_cache=False)
    hook.remove()
    output = pair.runner.forward(embeds[0], 0, span.end, capture=True)
    found += output.captured
    return [*found, output.hidden]


def test_the_last_state_through_the_lens_is_the_model(both: Any) -> None:
    ids = prompt(2, 7)
    expected = both.plain(ids).logits.float()
    states = states_of(both, ids)
    for lens in (Lens.of(both.ours), Lens.load(resolve_checkpoint(both.folder), torch.float32)):
        torch.testing.assert_close(lens.logits(states[-1]), expected, rtol=1e-4, atol=1e-4)
        assert lens.vocabulary == expected.shape[-1]
    with torch.no_grad():
        torch.testing.assert_close(both.ours(ids).logits, expected, rtol=1e-4, atol=1e-4)  # it still is a model


def test_formulas(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(2, 7)
    plain = llama.plain(ids, output_hidden_states=True)
    raw = states_of(llama, ids)
    layers, positions, tokens = [0, 1, 3, 4], [1, 4, 6], [5, 17]
    lens = Lens.of(llama.ours)
    wanted = Measure(layers, positions, norm=True, similarity=True, top=3, tokens=tokens, final=True, hidden=True)
    monkeypatch.setattr(lens_module, "CHUNK_BYTES", 4 * lens.vocabulary * 4)  # several chunks, the last one short
    found = measure_states(dict(enumerate(raw)), wanted, lens=lens, final=raw[4][:, positions])
    shapes = measured_shapes(wanted, 2, 3, (64,), "float32")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: shape for name, (_, shape) in shapes.items()
    }
    assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
        name: f"torch.{kind}" for name, (kind, _) in shapes.items()
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    assert size == measured_bytes(wanted, 2, 3, (64,), "float32")
    last = torch.log_softmax(plain.logits[:, positions], -1)
    cosine = torch.nn.functional.cosine_similarity
    for index, layer in enumerate(layers):
        state = raw[layer][:, positions]
        if layer < 4:
            torch.testing.assert_close(state, plain.hidden_states[layer][:, positions], rtol=1e-5, atol=1e-5)
        log_probs = torch.log_softmax(llama.plain.lm_head(llama.plain.model.norm(state)), -1)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(found["norm"][index], state.norm(dim=-1), **close)
        before = raw[max(layer - 1, 0)][:, positions]
        torch.testing.assert_close(found["cos_previous"][index], cosine(state, before, dim=-1), **close)
        torch.testing.assert_close(found["cos_last"][index], cosine(state, raw[4][:, positions], dim=-1), **close)
        best = log_probs.topk(3)
        assert torch.equal(found["top_ids"][index].long(), best.indices)
        torch.testing.assert_close(found["top_log_probs"][index], best.values, **close)
        entropy = torch.distributions.Categorical(logits=log_probs).entropy()
        torch.testing.assert_close(found["entropy"][index], entropy, **close)
        torch.testing.assert_close(found["token_log_probs"][index], log_probs[..., tokens], **close)
        order = log_probs.argsort(-1, descending=True).argsort(-1)
        assert torch.equal(found["token_ranks"][index].long(), order[..., tokens])
        kl = torch.nn.functional.kl_div(log_probs, last, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found["kl"][index], kl, **close)
        assert torch.equal(found["hidden"][index], state)


def test_what_is_missing_is_said(llama: Any) -> None:
    states = {1: torch.zeros(1, 2, 64)}
    with pytest.raises(UserInputError, match="lens"):
        measure_states(states, Measure([1], top=1))
    with pytest.raises(UserInputError, match="last block"):
        measure_states(states, Measure([1], final=True, similarity=True))
    with pytest.raises(UserInputError, match=r"\[64\]"):
        Lens.of(llama.ours).logits(torch.zeros(2, 63))
    zero = measure_states({0: torch.zeros(1, 2, 64), 1: torch.ones(1, 2, 64)}, Measure([1], similarity=True))
    assert torch.equal(zero["cos_previous"], torch.zeros(1, 1, 2))


def test_a_lens_of_512_tokens_and_80_layers_of_8192_is_small() -> None:
    wanted = Measure(list(range(1, 81)), norm=True, similarity=True, top=5)
    full = Measure(list(range(1, 81)), hidden=True)

    def moved(measure: Measure) -> int:
        """Bytes of the frames of one request and its answer, without what any pass over the blocks moves."""
        shapes = measured_shapes(measure, 1, 512, (8192,), "bfloat16")
        empty = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (kind, shape) in shapes.items()}
        answer = [pack(f"measured.{name}", tensor) for name, tensor in empty.items()]
        frames = [
            encode_frame(Forward("model", 0, 80, measure=measure)),
            encode_frame(ForwardResult(HopTiming("", 0.1, 0.1, 0.1)), answer),
        ]
        return sum(memoryview(part).nbytes for frame in frames for part in frame)

    assert measured_bytes(wanted, 1, 512, (8192,), "bfloat16") < moved(wanted) < 10e6
    states = measured_bytes(full, 1, 512, (8192,), "bfloat16")
    assert states == 80 * 512 * 8192 * 2
    print(f"a lens of 512 tokens × 80 layers: {moved(wanted) / 1e6:.1f} MB, the states {states / 1e6:.0f} MB")


@given(
    layers=st.lists(st.integers(0, 12), max_size=6),
    positions=st.lists(st.integers(0, 12), max_size=6),
    tokens=st.lists(st.integers(0, 120), max_size=3),
    top=st.integers(0, 64),
    vocabulary=st.one_of(st.none(), st.just(96)),
)
def test_problems_are_all_found(
    layers: list[int], positions: list[int], tokens: list[int], top: int, vocabulary: int | None
) -> None:
    good = (
        bool(layers)
        and layers == sorted(set(layers))
        and positions == sorted(set(positions))
        and layers[0] >= 3
        and layers[-1] <= 8
        and (not positions or positions[-1] < 10)
        and (vocabulary is not None or not (top or tokens))
        and all(token < 96 for token in tokens)
    )
    wanted = Measure(layers, positions, top=top, tokens=tokens)
    assert (problem_of(wanted, layers=(3, 8), tokens=10, vocabulary=vocabulary) is None) == good
