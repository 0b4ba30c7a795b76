"""The head of groups of rows, before its model asks for it: the same numbers, and never where it may differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import Pair, make_pair, prompt
from parity.families import tiny_config
from torch import nn

from nbrunner.client.head_ahead import AheadLinear, BatchAhead, HeadAhead

IDS = prompt(4, 12, seed=2)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "cohere", "granite", "opt"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(family: str, tmp_path: Path) -> Pair:
    return make_pair(family, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return make_pair("llama", tmp_path)


def learn(
    model: Any, *, ids: torch.Tensor = IDS, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logits, and the gradient with respect to the embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    output = model(inputs_embeds=embeddings, labels=ids, use_cache=False, **options)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), embeddings.grad


def assert_same(ours: Any, plain: Any, **options: Any) -> None:
    for one, other in zip(learn(ours, **options), learn(plain, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def ahead(model: Any) -> HeadAhead:
    found = model.nbrunner_skeleton.remote.head
    assert found is not None
    return found


def was_used(model: Any) -> bool:
    """Whether the last batch's logits were made ahead."""
    last = ahead(model)._last
    return last is not None and not last.unused and last._left == 0


def test_loss_logits_and_gradients_are_the_same(pair: Pair) -> None:
    assert_same(pair.ours, pair.plain)
    assert was_used(pair.ours)
    assert_same(pair.ours, pair.plain)  # and again


def test_random_numbers_are_nobody_elses(tmp_path: Path) -> None:
    """The dropout of the embeddings draws what it draws in the plain model, and what comes after it too."""
    pair = make_pair("gpt2", tmp_path)
    states = []
    for model in (pair.ours, pair.plain):
        model.train()
        model.transformer.drop.p = 0.5
        torch.manual_seed(5)
        learn(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert was_used(pair.ours)
    torch.manual_seed(6)
    ours = learn(pair.ours)
    torch.manual_seed(6)
    for one, other in zip(ours, learn(pair.plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_has_come_is_followed_when_little_is_out() -> None:
    batch, states = BatchAhead(None, nn.Linear(4, 4), 8), torch.randn(8, 3, 4)
    found = [batch._due(slice(row, row + 1), states[row : row + 1]) for row in (5, 1, 0, 7, 4)]
    assert found == [[]] * 5
    runs = batch._due(slice(3, 4), states[3:4])
    assert [rows for rows, _ in runs] == [slice(0, 2), slice(3, 6), slice(7, 8)]
    assert all(torch.equal(joined, states[rows]) for rows, joined in runs)
    assert [rows for rows, _ in batch._due(slice(2, 3), states[2:3])] == [slice(2, 3)]
    assert [rows for rows, _ in batch._due(slice(6, 7), states[6:7])] == [slice(6, 7)]


def test_two_groups_are_followed_one_by_one() -> None:
    batch = BatchAhead(None, nn.Linear(1, 1), 2)
    assert batch._due(slice(1, 2), torch.zeros(1, 1, 1))
    assert batch._due(slice(0, 1), torch.zeros(1, 1, 1))


def test_a_head_on_some_of_the_states_is_the_models_own(llama: Pair) -> None:
    for model in (llama.ours, llama.plain):
        model.few = model(inputs_embeds=embedded(model), use_cache=False, logits_to_keep=3).logits
    torch.testing.assert_close(llama.ours.few, llama.plain.few, rtol=1e-5, atol=1e-5)
    assert not was_used(llama.ours)
    assert ahead(llama.ours).begin(4) is None  # it would be for nothing again
    assert_same(llama.ours, llama.plain)


def embedded(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    return found


def test_the_base_by_itself(llama: Pair) -> None:
    """As losses of other libraries do, which call the head on parts themselves."""
    states = [model.model(inputs_embeds=embedded(model), use_cache=False)[0] for model in (llama.ours, llama.plain)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    parts = [model.lm_head(found[:2]) for model, found in zip((llama.ours, llama.plain), states, strict=True)]
    torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-5)
    assert ahead(llama.ours).begin(4) is None


def test_other_states_of_that_shape(llama: Pair) -> None:
    hidden = llama.ours.model(inputs_embeds=embedded(llama.ours), use_cache=False)[0].detach()
    torch.testing.assert_close(llama.ours.lm_head(hidden * 2), llama.plain.lm_head(hidden * 2))


def test_part_of_a_batch_and_twice(llama: Pair) -> None:
    found = []
    for model in (llama.ours, llama.plain):
        embeddings = embedded(model)
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        logits[1].square().sum().backward(retain_graph=True)
        logits[2:].sum().backward()
        found.append(embeddings.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_watched_learned_or_wrapped(llama: Pair) -> None:
    own = ahead(llama.ours)
    llama.plain.requires_grad_(False)
    assert own.begin(4)
    seen: list[int] = []
    hook = llama.ours.lm_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    assert_same(llama.ours, llama.plain)
    hook.remove()
    assert seen == [4]  # once, as without any groups
    llama.ours.lm_head.weight.requires_grad_(True)
    llama.plain.lm_head.weight.requires_grad_(True)
    assert_same(llama.ours, llama.plain)
    torch.testing.assert_close(llama.ours.lm_head.weight.grad, llama.plain.lm_head.weight.grad)
    llama.ours.lm_head.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert own.begin(4) is None
    assert own.begin(4)
    llama.ours.lm_head = nn.Sequential(llama.ours.lm_head)
    assert own.begin(4) is None
    assert_same(llama.ours, llama.plain)


def test_a_copy_of_the_head_has_weights_of_its_own(llama: Pair) -> None:
    twin = copy.deepcopy(llama.ours.lm_head)
    assert isinstance(twin, AheadLinear)
    with torch.no_grad():
        twin.weight.zero_()
    assert twin(torch.randn(2, 3, twin.in_features)).abs().max() == 0
    assert "lm_head.weight" in llama.ours.state_dict()


def test_a_head_with_a_bias(llama: Pair) -> None:
    bias = torch.randn(llama.plain.lm_head.out_features)
    for model in (llama.ours, llama.plain):
        model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    assert_same(llama.ours, llama.plain)
    assert was_used(llama.ours)


def test_models_without_a_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_config("llama"))
    assert HeadAhead.of(model) is None
