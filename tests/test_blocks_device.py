"""Spans on a device that is not the processor: nothing is mixed up, nothing is read back in the middle of a pass.

torch's ``meta`` device stands in for a GPU: it refuses tensors of another device, and whoever wants to look at a
number of it gets an error, where a GPU would make everybody wait. The last tests need a GPU, and skip without.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.__main__ import quiet
from parity.checks import save_plain
from parity.families import tiny_config

from nbrunner.blocks.adapters import BlockAdapter, Lora, SpanAdapter
from nbrunner.blocks.batching import Batcher, Joining, Layout, SpanStep
from nbrunner.blocks.batching_probe import choose_joining
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.host_copies import to_device, to_host
from nbrunner.blocks.passes import SpanOutput, outputs_on_host
from nbrunner.blocks.span import BlockSpan
from nbrunner.protocol.edits import EditOp

ELSEWHERE = torch.device("meta")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(name: str, folder: Path, device: torch.device) -> BlockSpan:
    torch.manual_seed(0)
    save_plain(tiny_config(name), folder)
    checkpoint = resolve_checkpoint(folder)
    span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32")
    span.model.to(device)
    span.device = device
    return span


def step(span: BlockSpan, cache: Any, tokens: int, *, rows: int = 1, **more: Any) -> SpanStep:
    """As a server makes it, everything in this machine's memory. A mask that hides something is looked at by
    transformers itself, once in a pass."""
    length = cache.length + tokens
    mask = torch.ones(rows, length, dtype=torch.bool)
    positions = torch.arange(cache.length, length)[None]
    return SpanStep(torch.randn(rows, tokens, *span.hidden_shape), cache, mask, positions, **more)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "packed"),
        ("gemma3_text", "packed"),  # sliding windows
        ("gpt2", "packed"),  # learned positions
        ("minicpm3", "concat"),
        ("bloom", "padded"),
        ("falcon#alibi", "padded"),
    ],
)
def test_a_pass_mixes_no_devices_and_looks_at_nothing(name: str, layout: Layout, tmp_path: Path) -> None:
    span = load(name, tmp_path, ELSEWHERE)
    batcher = Batcher(span, Joining(layout))
    block = span.start
    vector = Edits((EditOp("add", block, 0, vector=0),), {0: torch.ones(*span.hidden_shape)})
    sessions = [(1, {}), (2, {}), (1, {"edits": vector, "collect": True})]
    caches = [span.new_cache() for _ in sessions]
    for tokens in (5, 1, 1):
        steps = [
            step(span, cache, tokens, rows=rows, **more)
            for cache, (rows, more) in zip(caches, sessions, strict=True)
        ]
        for one, outcome in zip(steps, batcher.forward(steps), strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            assert outcome.hidden.device == ELSEWHERE
            assert outcome.hidden.shape == one.hidden.shape
    assert batcher.joined == batcher.steps == 3 * len(sessions)
    for cache in caches:
        assert {tensor.device for tensor in cache._tensors()} == {ELSEWHERE}
        cache.select([0, 0])
        cache.crop(1)
    alone = step(span, caches[0], 1, rows=2)
    found = span.forward(alone.hidden, cache=alone.cache, position_ids=alone.position_ids, collect=True)
    assert {found.hidden.device, *(one.device for one in found.collected)} == {ELSEWHERE}


def test_adapters_that_lie_elsewhere_come_along(tmp_path: Path) -> None:
    span = load("llama", tmp_path, ELSEWHERE)
    name, (inputs, outputs) = next(iter(span.linears(0).items()))
    lora = Lora(torch.randn(2, inputs), torch.randn(outputs, 2), 0.5)
    adapter = SpanAdapter({0: BlockAdapter({name: (lora,)}, torch.randn(3, *span.hidden_shape))})
    found = span.forward(torch.randn(2, 4, *span.hidden_shape), cache=span.new_cache(), adapters=adapter)
    assert found.hidden.device == ELSEWHERE


def test_reading_a_number_of_it_is_an_error(tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    span = load("llama", tmp_path, ELSEWHERE)
    hidden = torch.randn(1, 3, *span.hidden_shape)
    with pytest.raises((NotImplementedError, RuntimeError)):
        span.forward(hidden, attention_mask=torch.ones(1, 3, dtype=torch.bool, device=ELSEWHERE))
    with pytest.raises((NotImplementedError, RuntimeError)):
        hidden + torch.ones(3, *span.hidden_shape, device=ELSEWHERE)


def test_on_a_processor_nothing_is_copied() -> None:
    here = torch.device("cpu")
    tensors = [torch.randn(2, 3), torch.ones(1, dtype=torch.long)]
    assert [one.data_ptr() for one in to_host(tensors)] == [one.data_ptr() for one in tensors]
    assert to_device(tensors[0], here) is tensors[0]
    assert to_device(tensors[0], here, torch.bfloat16).dtype == torch.bfloat16
    outputs = [SpanOutput(tensors[0], {1: tensors[1]}, [tensors[0]]), SpanOutput(tensors[1])]
    found = outputs_on_host(outputs)
    assert found == outputs
    assert outputs_on_host([]) == []


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    yield torch.device("cuda:0")
    torch.cuda.empty_cache()


@GPU
def test_copies_to_a_gpu_and_back(gpu: torch.device) -> None:
    tensors = [torch.randn(7, 5), torch.arange(12).view(3, 4).T, torch.zeros(0, 2)]
    there = [to_device(one, gpu) for one in tensors]
    assert {one.device for one in there} == {gpu}
    doubled = to_host([2 * one for one in there])
    for one, twice in zip(tensors, doubled, strict=True):
        assert twice.device.type == "cpu"
        assert torch.equal(twice, 2 * one)
    assert to_device(tensors[0], gpu, torch.bfloat16).dtype == torch.bfloat16


@GPU
@pytest.mark.parametrize("name", ["llama", "bloom", "deepseek_v3"])
def test_a_gpu_computes_what_the_processor_computes(name: str, tmp_path: Path, gpu: torch.device) -> None:
    folder = tmp_path / name
    torch.manual_seed(0)
    save_plain(tiny_config(name), folder)
    checkpoint = resolve_checkpoint(folder)
    here, there = (
        BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", device=device)
        for device in ("cpu", gpu)
    )
    joining = choose_joining(there)
    assert joining.layout == choose_joining(here).layout
    caches = [[span.new_cache() for _ in range(3)] for span in (here, there)]
    for tokens in (5, 1, 1):
        outputs = []
        for span, own in zip((here, there), caches, strict=True):
            torch.manual_seed(tokens)
            steps = [step(span, cache, tokens) for cache in own]
            outcomes = Batcher(span, joining).forward(steps)
            outputs.append(outputs_on_host([one for one in outcomes if isinstance(one, SpanOutput)]))
        for ours, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-3, atol=1e-4)
