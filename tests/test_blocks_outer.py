"""What is done for a step before it comes: the outer model's part, and a rehearsal. Neither may change a number."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.families import tiny_config
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import Checkpoint, resolve_checkpoint
from nbrunner.blocks.outer import OuterModel
from nbrunner.blocks.rehearsal import Rehearsal, can_rehearse
from nbrunner.blocks.span import BlockSpan

torch.set_num_threads(1)


def saved(name: str, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(folder)
    return resolve_checkpoint(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def span(llama: Checkpoint) -> BlockSpan:
    return BlockSpan.load(llama, 1, 4, dtype="float32")


@pytest.fixture
def outer_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that an outer model is run."""
    runs: list[int] = []
    own = OuterModel.calls

    def calls(self: OuterModel, arguments: Any, start: int, end: int) -> Any:
        runs.append(arguments["inputs_embeds"].shape[1])
        return own(self, arguments, start, end)

    monkeypatch.setattr(OuterModel, "calls", calls)
    return runs


def states(tokens: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "longcat_flash", "bloom"])
def test_a_prepared_step_is_the_same_bit_for_bit(name: str, tmp_path: Path, outer_runs: list[int]) -> None:
    checkpoint = saved(name, tmp_path)
    span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32")
    plain, ahead = span.new_cache(), span.new_cache()
    for cache in (plain, ahead):
        span.forward(states(5, rows=2), cache=cache)
    for step in range(4):
        hidden = states(1, rows=2, seed=step)
        expected = span.forward(hidden, cache=plain).hidden
        prepared = span.prepare(ahead, 2)
        before = len(outer_runs)
        assert torch.equal(span.forward(hidden, cache=ahead, prepared=prepared).hidden, expected)
        assert len(outer_runs) == before


def test_what_was_prepared_for_another_step_is_not_used(span: BlockSpan, outer_runs: list[int]) -> None:
    cache, other = span.new_cache(), span.new_cache()
    span.forward(states(5), cache=cache)
    span.forward(states(4), cache=other)
    prepared = span.prepare(cache, 1)

    def runs_the_outer_model(hidden: torch.Tensor, cache: Any, **arguments: Any) -> bool:
        before = len(outer_runs)
        span.forward(hidden, cache=cache, prepared=prepared, **arguments)
        return len(outer_runs) > before

    padded = torch.ones(1, 6, dtype=torch.bool)
    padded[0, 0] = False
    assert runs_the_outer_model(states(1), other)
    other.crop(1)
    assert runs_the_outer_model(states(2), cache)
    cache.crop(2)
    assert runs_the_outer_model(states(1), cache, attention_mask=padded)
    cache.crop(1)
    assert runs_the_outer_model(states(1), cache, position_ids=torch.tensor([[9]]))
    assert runs_the_outer_model(states(1), cache)  # a token further on
    cache.crop(2)
    assert runs_the_outer_model(states(1), cache, start=1, end=2)
    span.forward(states(1), cache=cache, start=2, end=4)
    cache.crop(1)
    assert not runs_the_outer_model(states(1), cache, attention_mask=torch.ones(1, 6, dtype=torch.bool))


def test_the_outer_model_remembers_no_cache(span: BlockSpan) -> None:
    cache = span.new_cache()
    span.forward(states(3), cache=cache)
    span.prepare(cache, 1)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_rehearsal_changes_nothing_and_reads_few_weights(
    span: BlockSpan, monkeypatch: pytest.MonkeyPatch
) -> None:
    span.choose_products()
    assert can_rehearse(span)
    cache = span.new_cache()
    hidden = states(4)
    expected = span.forward(hidden).hidden
    span.forward(hidden, cache=cache)
    forwards = {name: vars(module).get("forward") for name, module in span.model.named_modules()}
    rehearsal = Rehearsal(span)
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def noting(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(weight))
        return linear(hidden, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    for _ in range(3):
        rehearsal.run()
    assert len(rows) == 3 * 7
    assert max(rows) <= 8
    monkeypatch.undo()
    assert cache.length == 4
    assert {name: vars(module).get("forward") for name, module in span.model.named_modules()} == forwards
    assert torch.equal(span.forward(hidden).hidden, expected)


def test_a_rehearsal_that_fails_leaves_the_block_as_it_was(
    span: BlockSpan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = Rehearsal(span)
    expected = span.forward(states(3)).hidden

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(span.block(1).mlp.act_fn, "forward", fail)
    with pytest.raises(MemoryError):
        rehearsal.run()
    monkeypatch.undo()
    assert torch.equal(span.forward(states(3)).hidden, expected)


def test_experts_and_what_only_a_predecessor_can_make_are_not_rehearsed(tmp_path: Path) -> None:
    assert not can_rehearse(BlockSpan.load(saved("mixtral", tmp_path / "mixtral"), 0, 2, dtype="float32"))
    assert not can_rehearse(BlockSpan.load(saved("zaya", tmp_path / "zaya"), 2, 4, dtype="float32"))
    assert can_rehearse(BlockSpan.load(resolve_checkpoint("tiny"), 0, 2, dtype="float32"))
    assert not can_rehearse(BlockSpan.load(resolve_checkpoint("tiny"), 0, 2, dtype="float32", quantize="int8"))
