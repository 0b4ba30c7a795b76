"""Deep prompts over blocks elsewhere, against the same surgery by hooks on the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from client_models import Pair, left_padded, make_pair, prompt
from inprocess_swarm import InProcessSwarm
from test_peft_local import config, fill

import nbrunner
from nbrunner.client.deep_prompts import add_deep_prompts, load_deep_prompts, remove_deep_prompts
from nbrunner.errors import SessionError, UserInputError

VIRTUAL = 3
IDS, MASK = prompt(3, 12), left_padded(3, 12)
LABELS = IDS.masked_fill(MASK == 0, -100)
PADDED: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=["llama", "gpt2", "bloom"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return make_pair(request.param, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return make_pair("llama", tmp_path / "model")


def hooked(model: Any, base: Any) -> torch.nn.Parameter:
    """The reference: before each layer, add to the first positions of a sequence that begins."""
    layers = base.model.layers if hasattr(base, "model") else base.transformer.h
    weight = torch.nn.Parameter(torch.zeros(len(layers), VIRTUAL, base.config.hidden_size))
    model.seen = 0

    def add(index: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> Any:
            if args[0].shape[1] == 1:  # a step of generation: those positions are long past
                return args
            states = torch.cat([args[0][:, :VIRTUAL] + weight[index], args[0][:, VIRTUAL:]], dim=1)
            return (states, *args[1:])

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(add(index))
    return weight


def both(pair: Pair, *, adapted: bool = False) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((ours, its prompts), (plain, its prompts)): prompt tuning by PEFT, and a prompt for every block."""
    made = []
    for base, add in (
        (pair.ours, lambda model: add_deep_prompts(model, VIRTUAL).weight),
        (pair.plain, lambda model: hooked(model, pair.plain)),
    ):
        torch.manual_seed(2)
        inner = peft.get_peft_model(base, config()) if adapted else base
        if adapted:
            fill(inner)
        tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        model = inner if adapted else peft.get_peft_model(base, tuning)
        weight = add(model)
        with torch.no_grad():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
        made.append((model.eval(), weight))
    return made[0], made[1]


def test_loss_and_gradients(pair: Pair) -> None:
    losses, grads = [], []
    for model, weight in both(pair):
        loss = model(**PADDED, labels=LABELS, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        learned = next(one for name, one in model.named_parameters() if "prompt_encoder" in name)
        grads.append((weight.grad, learned.grad))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for found, expected in zip(*grads, strict=True):
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_generation(pair: Pair) -> None:
    (ours, mine), (plain, _) = both(pair)
    expected = plain.generate(**PADDED, **GREEDY)
    assert torch.equal(ours.generate(**PADDED, **GREEDY), expected)
    with torch.no_grad():
        before = ours(**PADDED, use_cache=False).logits
        mine.neg_()
        assert float((ours(**PADDED, use_cache=False).logits - before).abs().max()) > 1e-3


def test_together_with_lora(llama: Pair) -> None:
    grads = []
    for model, weight in both(llama, adapted=True):
        model(**PADDED, labels=LABELS, use_cache=False).loss.backward()
        grads.append(
            [weight.grad] + [one.grad for name, one in sorted(model.named_parameters()) if "lora_" in name]
        )
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_session_keeps_to_its_prompts(llama: Pair) -> None:
    prompts = add_deep_prompts(llama.ours, VIRTUAL)
    with llama.ours.inference_session() as session:
        llama.ours.generate(IDS[1:2], max_new_tokens=2, do_sample=False, session=session)
        with torch.no_grad():
            prompts.weight.add_(1.0)
        with pytest.raises(SessionError, match="adapter"):
            llama.ours.generate(None, max_new_tokens=2, session=session)


@torch.no_grad()
def test_saved_loaded_disabled_removed(llama: Pair, tmp_path: Path) -> None:
    bare = llama.ours(IDS, use_cache=False).logits
    prompts = add_deep_prompts(llama.ours, VIRTUAL)
    torch.testing.assert_close(llama.ours(IDS, use_cache=False).logits, bare)
    prompts.weight.normal_(0, 0.3)
    changed = llama.ours(IDS, use_cache=False).logits
    assert float((changed - bare).abs().max()) > 0.1
    prompts.save(tmp_path)
    prompts.enabled = False
    torch.testing.assert_close(llama.ours(IDS, use_cache=False).logits, bare)
    remove_deep_prompts(llama.ours)
    loaded = load_deep_prompts(llama.ours, tmp_path, is_trainable=True)
    assert loaded.weight.requires_grad
    torch.testing.assert_close(llama.ours(IDS, use_cache=False).logits, changed)


def test_what_cannot_be(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="not a distributed model"):
        add_deep_prompts(llama.plain, 2)
    with pytest.raises(UserInputError, match="positive number"):
        add_deep_prompts(llama.ours, 0)
    with pytest.raises(UserInputError, match="no deep prompts could be read"):
        load_deep_prompts(llama.ours, tmp_path)
    other = make_pair("gpt2", tmp_path / "other")
    add_deep_prompts(other.ours, 2).save(tmp_path)
    other_shape = tmp_path / "narrow"
    from safetensors.torch import save_file

    other_shape.mkdir()
    save_file({"weight": torch.zeros(4, 2, 5)}, other_shape / "deep_prompts.safetensors")
    with pytest.raises(UserInputError, match=r"\[4, 2, 5\]; this model takes \[4, tokens, 64\]"):
        load_deep_prompts(llama.ours, other_shape)


@pytest.fixture
def swarm(llama: Pair) -> Iterator[InProcessSwarm]:
    swarm = InProcessSwarm(llama.folder)
    swarm.add(0, 2)
    swarm.add(2, 4)
    yield swarm
    swarm.close()


@pytest.mark.network
def test_over_servers_one_of_which_is_lost(llama: Pair, swarm: InProcessSwarm) -> None:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(llama.folder, invite=swarm.invite)
    model.generation_config = llama.plain.generation_config
    try:
        swarm.seen_by(model)
        (ours, mine), (plain, theirs) = both(Pair(llama.plain, model, llama.folder))
        loss = ours(**PADDED, labels=LABELS, use_cache=False).loss
        swarm.add(1, 4)
        swarm.seen_by(model)
        swarm.remove(swarm.servers[1])
        loss.backward()
        plain(**PADDED, labels=LABELS, use_cache=False).loss.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.generate(**PADDED, **GREEDY), plain.generate(**PADDED, **GREEDY))
    finally:
        model.close()
