"""Gradients of every method through two servers, and through quantised ones: those of the whole model here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import local_model, prompt, save_plain
from inprocess_swarm import InProcessSwarm
from parity.families import in_this_release
from test_deep_prompts import hooked
from test_peft_local import fill
from torch import nn
from tuning_models import FACTS, REVIEWS, TINY, distributed, plain, tokenizer, two_spans

import nbrunner
from nbrunner.blocks import quantize
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.quant_linear import CPU_KINDS, QuantLinear
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import UserInputError
from nbrunner.tuning.data import read_examples
from nbrunner.tuning.encoding import Collator, Encoding, pad_id
from nbrunner.tuning.methods import Taught, teach
from nbrunner.tuning.settings import Settings

__all__ = ["distributed", "tokenizer", "two_spans"]

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt", "prompt_tokens": 4},
    "p-tuning": {"method": "p-tuning", "prompt_tokens": 4},
    "lora": {"method": "lora", "rank": 4},
    "lora, every module": {"method": "lora", "rank": 4, "target_modules": "all-linear"},
    "deep-prompt": {"method": "deep-prompt", "prompt_tokens": 3},
    "classify": {"method": "classify", "prompt_tokens": 4},
    "classify, lora": {"method": "classify", "rank": 4},
}


def gradients(taught: Taught, batch: dict[str, torch.Tensor], *more: nn.Parameter) -> dict[str, torch.Tensor]:
    taught.model.eval()
    taught.model(**batch).loss.backward()
    found = {name.rpartition("base_model.model.")[2]: one.grad for name, one in taught.parameters}
    return {**found, **{f"more {index}": one.grad for index, one in enumerate(more)}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, within: float) -> None:
    """``within`` of the largest of each tensor."""
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        largest = float(one.abs().max())
        assert largest > 1e-7, name
        assert float((found[name] - one).abs().max()) <= within * max(largest, 1e-3), name


def batch_of(rows: Any, tokenizer: Any, classes: tuple[Any, ...], *, left: bool) -> dict[str, torch.Tensor]:
    encoding = Encoding(tokenizer, most_tokens=64, max_length=None, classes=classes)
    encoded = encoding.encode(read_examples(rows, labelled=bool(classes)))
    batch = Collator(pad_id(tokenizer), left=left)([encoded[index] for index in range(4)])
    assert int(batch["attention_mask"].min()) == 0
    return batch


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("name", METHODS)
def test_through_two_spans(distributed: Any, tokenizer: Any, name: str, left: bool) -> None:
    settings = Settings.of(**METHODS[name])
    classifies = settings.method == "classify"
    if classifies and not left:
        pytest.skip("the head reads the last token: its rows are padded on the left")
    classes = ("bad", "good") if classifies else ()
    batch = batch_of(REVIEWS if classifies else FACTS, tokenizer, classes, left=left)
    ours = teach(distributed, settings, classes=classes)
    if settings.method == "deep-prompt":
        theirs = teach(plain(), Settings.of(method="prompt", prompt_tokens=3))
        weight = hooked(theirs.model, theirs.model.get_base_model())
        mine = next(one for _, one in ours.parameters if one.ndim == 3)
        with torch.no_grad():
            for one in (weight, mine):
                one.copy_(0.3 * torch.randn(one.shape, generator=torch.Generator().manual_seed(4)))
        found, expected = gradients(ours, batch), gradients(theirs, batch, weight)
        assert_same({"weight": mine.grad}, {"weight": weight.grad}, within=1e-5)
        prompts = [
            next(one for key, one in each.items() if "prompt" in key and one.ndim == 2)
            for each in (found, expected)
        ]
        assert_same({"prompt": prompts[0]}, {"prompt": prompts[1]}, within=1e-5)
        return
    if classifies:
        here = plain("AutoModelForSequenceClassification", num_labels=2)
        here.score.load_state_dict(head_of(ours.model))
        theirs = teach(here, settings, classes=classes)
    else:
        theirs = teach(plain(), settings)
    for one in (ours, theirs):
        fill(one.model)
    assert_same(gradients(ours, batch), gradients(theirs, batch), within=1e-5)


def head_of(model: Any) -> dict[str, torch.Tensor]:
    """What the head of a model with an adapter begins with."""
    score = model.get_base_model().score
    return dict(getattr(score, "original_module", score).state_dict())


def test_of_a_module_between_blocks(distributed: Any, tokenizer: Any) -> None:
    """Block 3 begins the second server: the module stands between the two, and once more inside the second."""
    batch = batch_of(FACTS, tokenizer, (), left=False)
    module, reference = nn.Linear(128, 128), plain().requires_grad_(False)
    nn.init.normal_(module.weight, std=0.02)
    ours = distributed.path([*range(3), module, 3, 4, module, *range(5, 8)])
    found = gradients(Taught(ours, distributed), batch, *module.parameters())
    module.zero_grad()
    for index in (2, 4):
        reference.model.layers[index].register_forward_hook(lambda *given: module(given[-1]))
    expected = gradients(Taught(reference, reference), batch, *module.parameters())
    names = ("more 0", "more 1")
    assert_same({one: found[one] for one in names}, {one: expected[one] for one in names}, within=1e-5)


@pytest.mark.parametrize("family", ["xglm", "mpt", "qwen3_moe", "ctrl", "phimoe", "falcon_h1"])
def test_architectures_that_need_care(tmp_path: Path, family: str) -> None:
    """Heads by other names, experts in one tensor, routers, caches asked for by the configuration, mamba."""
    if not in_this_release(family):
        pytest.skip("transformers does not have it here")
    save_plain(family, tmp_path)
    ids = prompt(2, 8)
    for method in ("lora", "prompt"):
        taught = teach(local_model(resolve_checkpoint(tmp_path), 2), Settings.of(method=method))
        fill(taught.model)
        taught.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        for name, one in taught.parameters:
            assert one.grad is not None, name
            assert bool(torch.isfinite(one.grad).all()), name
        assert any(float(one.grad.abs().max()) > 0 for _, one in taught.parameters)


def test_architectures_without_a_head_for_labels(tmp_path: Path) -> None:
    save_plain("codegen", tmp_path)
    model = local_model(resolve_checkpoint(tmp_path), 2)
    with pytest.raises(UserInputError, match="no AutoModelForSequenceClassification for codegen models"):
        teach(model, Settings.of(method="classify"), classes=("bad", "good"))


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_through_quantised_servers(tokenizer: Any, kind: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Right: those of a model that has the weights which the packed ones stand for."""
    monkeypatch.setattr(quantize.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    settings = Settings.of(method="lora", rank=4, target_modules="all-linear")
    reference = plain()
    packed = BlockSpan.load(resolve_checkpoint(TINY), 0, 8, dtype="float32", quantize=kind)
    linears = dict(reference.named_modules())
    unpacked = {
        name: one.unpacked(one.dtype) for name, one in packed.model.named_modules() if isinstance(one, QuantLinear)
    }
    assert len(unpacked) > 8
    for name, weight in unpacked.items():
        linears[name].weight.data.copy_(weight)
    swarm = InProcessSwarm(TINY)
    swarm.add(0, 3, quantize=kind)
    swarm.add(3, 8, quantize=kind)
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(TINY, invite=swarm.invite)
    try:
        swarm.seen_by(model)
        ours, theirs = teach(model, settings), teach(reference, settings)
        for one in (ours, theirs):
            fill(one.model)
        batch = batch_of(FACTS, tokenizer, (), left=False)
        assert_same(gradients(ours, batch), gradients(theirs, batch), within=1e-4)
        run = nbrunner.finetune(model, FACTS, method="lora", max_steps=12, lr=5e-3, out_dir=tmp_path / "run")
        run.result(90)
        assert run.history["loss"][-1] < 0.7 * run.history["loss"][0]
    finally:
        model.close()
        swarm.close()
