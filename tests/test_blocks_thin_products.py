"""Products turned round: the same numbers, only in joined and kept passes, only where that is faster here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nbrunner.blocks import thin_products
from nbrunner.blocks.batching import Batcher, SpanStep
from nbrunner.blocks.batching_probe import choose_joining
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.blocks.thin_products import ThinProducts, rows_worth_turning, turned_product


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin_products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(thin_products, "rows_worth_turning", lambda _: frozenset(range(2, 16)))


def small(folder: Path) -> BlockSpan:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50, attention_bias=True)).save_pretrained(folder)
    return BlockSpan.load(resolve_checkpoint(folder), 0, 2, dtype="float32")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(9, 96), (1, 3, 96), (2, 4, 5, 96)])
def test_the_same_product(biased: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(96, 160, bias=biased)
    hidden = torch.randn(*shape)
    found = turned_product(layer, hidden)
    torch.testing.assert_close(found, layer(hidden))
    assert found.is_contiguous()


@pytest.mark.parametrize("biased", [False, True])
def test_the_same_gradient(biased: bool) -> None:
    layer = nn.Linear(96, 160, bias=biased).requires_grad_(False)
    hidden, grad = torch.randn(2, 7, 96, requires_grad=True), torch.randn(2, 7, 160)
    (ours,) = torch.autograd.grad(turned_product(layer, hidden), hidden, grad)
    (plain,) = torch.autograd.grad(layer(hidden), hidden, grad)
    torch.testing.assert_close(ours, plain)


def test_only_in_here_and_only_for_these_numbers_of_rows(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32, dtype=torch.bfloat16), nn.LayerNorm(32))
    products = ThinProducts([block])
    assert products.layers == [block[0]]
    used: list[int] = []

    def noted(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        used.append(hidden.numel() // layer.in_features)
        return turned_product(layer, hidden)

    monkeypatch.setattr(thin_products, "turned_product", noted)
    block[0](torch.randn(5, 32))
    with products.turned():
        for rows in (1, 2, 15, 16):
            block[0](torch.randn(1, rows, 32))
    block[0](torch.randn(5, 32))
    assert used == [2, 15]


def test_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(product: Any, layers: Sequence[nn.Linear], rows: torch.Tensor) -> float:
        return 1.0 if product is turned_product else {5: 0.9, 9: 3.0, 13: 2.0, 24: 1.0, 64: 1.1}[rows.shape[1]]

    layers = [nn.Linear(512, 512) for _ in range(2)]
    assert rows_worth_turning(layers) <= set(range(4, 96))  # whatever it is here
    monkeypatch.setattr(thin_products, "_seconds", seconds)
    assert rows_worth_turning(layers) == {*range(8, 16), *range(32, 96)}


def test_small_layers_are_left_alone(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    span = BlockSpan.load(resolve_checkpoint(tmp_path), 0, 2, dtype="float32")
    span.choose_products()
    assert span._thin.layers == []


def test_kept_passes_are_turned_and_have_the_same_gradients(
    always: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, hidden, grad = small(tmp_path), torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    plain = span.trace(hidden)
    span.choose_products()
    used: list[int] = []

    def noted(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        used.append(states.numel() // layer.in_features)
        return turned_product(layer, states)

    monkeypatch.setattr(thin_products, "turned_product", noted)
    turned = span.trace(hidden)
    assert used == [14] * 14  # the linear layers of two blocks
    torch.testing.assert_close(turned.output.hidden, plain.output.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.backward(grad).hidden, plain.backward(grad).hidden, rtol=1e-5, atol=1e-5)


def test_joined_steps_are_those_of_each_session_alone(always: None, tmp_path: Path) -> None:
    span = small(tmp_path)
    before = span.forward(hidden := torch.randn(1, 9, 64)).hidden
    batcher = Batcher(span, choose_joining(span))
    assert batcher.layout == "packed"
    assert len(span._thin.layers) == 14
    assert torch.equal(span.forward(hidden).hidden, before)  # alone nothing is different, to the last bit
    pairs = [(span.new_cache(), span.new_cache()) for _ in range(5)]
    for tokens in ([3, 1, 2, 5, 4], [1] * 5, [1] * 5, [2, 1, 1, 1, 4]):
        states = [torch.randn(1, count, 64) for count in tokens]
        steps = [SpanStep(state, ours) for state, (ours, _) in zip(states, pairs, strict=True)]
        for outcome, state, (_, alone) in zip(batcher.forward(steps), states, pairs, strict=True):
            assert not isinstance(outcome, Exception)
            torch.testing.assert_close(
                outcome.hidden, span.forward(state, cache=alone).hidden, rtol=1e-5, atol=1e-5
            )
    assert batcher.joined == 20
