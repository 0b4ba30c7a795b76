"""bfloat16 products of many rows in float32: the same numbers and gradients, only for many rows, only if faster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nbrunner.blocks import quant_linear, wide_products
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.quant_linear import Int8Linear
from nbrunner.blocks.span import BlockSpan
from nbrunner.blocks.wide_products import NEVER, rows_worth_widening, wide_product, widen_products

BF16 = torch.bfloat16


@pytest.fixture
def from_32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers too, in pieces of a few outputs."""
    monkeypatch.setattr(wide_products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(wide_products, "_PIECE", 96 * 7)
    for module in (wide_products, quant_linear):
        monkeypatch.setattr(module, "rows_worth_widening", lambda: 32)


@pytest.fixture
def measured_anew() -> Iterator[None]:
    rows_worth_widening.cache_clear()
    yield
    rows_worth_widening.cache_clear()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(9, 96), (1, 30, 96), (2, 4, 5, 96)])
def test_the_same_product_and_gradient(from_32_rows: None, biased: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(96, 160, bias=biased, dtype=BF16).requires_grad_(False)
    hidden = torch.randn(*shape).to(BF16).requires_grad_()
    exact = nn.functional.linear(
        hidden.float(), layer.weight.float(), layer.bias.float() if biased else None
    )  # rounded once, at the end
    found = wide_product(layer, hidden)
    assert (found.dtype, found.shape) == (BF16, exact.shape)
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7)
    grad = torch.randn_like(exact).to(BF16)
    (ours,) = torch.autograd.grad(found, hidden, grad)
    (theirs,) = torch.autograd.grad(exact, hidden, grad.float())
    assert ours.dtype == BF16
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
    with torch.no_grad():
        assert torch.equal(wide_product(layer, hidden), found)


def test_only_for_many_rows(from_32_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(nn.Linear(32, 64, dtype=BF16), nn.Linear(64, 32), nn.LayerNorm(32))
    assert widen_products([block]) == [block[0]]
    used: list[int] = []

    def noted(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        used.append(hidden.numel() // layer.in_features)
        return wide_product(layer, hidden)

    monkeypatch.setattr(wide_products, "wide_product", noted)
    for shape in ((1, 31, 32), (1, 32, 32), (4, 16, 32)):
        block[0](torch.randn(shape).to(BF16))
    assert used == [32, 64]


def test_nothing_is_changed_where_it_is_not_faster(measured_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[Any, dict[int, float]] = {
        wide_products._product: {64: 1.0, 128: 1.0},
        nn.functional.linear: {64: 1.0, 128: 1.2},
    }
    monkeypatch.setattr(wide_products, "best_seconds", lambda run, _: seconds[run.func][run.args[0].shape[0]])
    assert rows_worth_widening() == 128
    rows_worth_widening.cache_clear()
    seconds[nn.functional.linear][128] = 1.1
    assert rows_worth_widening() == NEVER
    monkeypatch.setattr(wide_products, "LEAST_WEIGHTS", 0)
    layer = nn.Linear(32, 64, dtype=BF16)
    assert widen_products([layer]) == []
    assert "forward" not in vars(layer)


def test_it_is_measured(measured_anew: None) -> None:
    assert rows_worth_widening() in (64, 128, NEVER)  # whatever it is here


def test_a_span_computes_what_it_did(from_32_rows: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50)).to(BF16).save_pretrained(tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    plain, wide = (BlockSpan.load(checkpoint, 0, 2, dtype="bfloat16") for _ in range(2))
    wide.choose_products()
    assert sum("forward" in vars(module) for module in wide.model.modules()) == 14
    few, many = (torch.randn(1, tokens, 64).to(BF16) for tokens in (31, 40))
    assert torch.equal(wide.forward(few).hidden, plain.forward(few).hidden)
    ours, theirs = wide.forward(many).hidden, plain.forward(many).hidden
    torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
    grad = torch.randn_like(many)
    found, wanted = (span.backward(many, grad).hidden for span in (wide, plain))
    torch.testing.assert_close(found, wanted, rtol=2**-4, atol=2**-4)


def test_quantised_layers_do_the_same(from_32_rows: None) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(64, 128, None, BF16)
    layer.fill(Int8Linear.quantize(torch.randn(128, 64)))
    rows = torch.randn(40, 64).to(BF16).requires_grad_()
    exact = rows.float() @ layer.unpacked(torch.float32).t()
    torch.testing.assert_close(layer(rows).float(), exact, rtol=2**-7, atol=2**-6)
    grad = torch.randn(40, 128).to(BF16)
    (found,) = torch.autograd.grad(layer(rows), rows, grad)
    torch.testing.assert_close(found.float(), grad.float() @ layer.unpacked(torch.float32), rtol=2**-7, atol=2**-5)
