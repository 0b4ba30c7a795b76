"""Quantised blocks: what they compute, their gradients, what is kept on the disk, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import nbrunner
from nbrunner.blocks import quant_linear, quantize
from nbrunner.blocks.adapters import BlockAdapter, Lora, SpanAdapter
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.quant_linear import CPU_KINDS, QuantLinear, choose_kernel_rows
from nbrunner.blocks.quantize import load_quantized
from nbrunner.blocks.quantize_gpu import quantize_block
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import UserInputError

DTYPES = (torch.float32, torch.bfloat16)
WORST = {"int8": 0.02, "int4": 0.15}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantize.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache" / "quantized"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=100)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def made(kind: str, dtype: torch.dtype, outputs: int = 192, inputs: int = 96) -> tuple[QuantLinear, torch.Tensor]:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.05
    layer = CPU_KINDS[kind](
        inputs, outputs, nn.Parameter(torch.ones(outputs, dtype=dtype), requires_grad=False), dtype
    )
    layer.fill(CPU_KINDS[kind].quantize(weight))
    return layer, weight


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CPU_KINDS)
def test_kernel_and_unpacked_weights_agree_and_are_close_to_the_original(kind: str, dtype: torch.dtype) -> None:
    layer, weight = made(kind, dtype)
    assert off(layer.unpacked(layer.dtype), weight) < WORST[kind]
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, 96).to(dtype)
        layer.kernel_rows = 0
        plain = layer(x)
        layer.kernel_rows = 1000
        assert off(layer(x), plain) < 0.01
        assert off(plain, x.float() @ weight.t() + 1) < WORST[kind]
        assert plain.shape == (2, rows, 192)
    forms = type(layer).forms(96, 192)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.named_buffers()} == forms


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_the_gradient_is_that_of_the_unpacked_weights(kind: str) -> None:
    layer, _ = made(kind, torch.float32)
    layer.kernel_rows = 1000
    x = torch.randn(5, 96, requires_grad=True)
    with torch.no_grad():
        layer(x)  # bitsandbytes' 4-bit layers lose their gradient after this
    grad = torch.randn(5, 192)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    assert torch.allclose(found, grad @ layer.unpacked(layer.dtype), atol=1e-6)


def test_a_kernel_that_is_wrong_or_missing_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, _ = made("int8", torch.float32)
    monkeypatch.setattr(quant_linear.Int8Linear, "_kernel", lambda self, rows: torch.zeros(len(rows), 192))
    assert choose_kernel_rows(layer) == 0
    assert "off by" in caplog.text

    def missing(self: Any, rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(quant_linear.Int8Linear, "_kernel", missing)
    assert choose_kernel_rows(layer) == 0
    assert "no such kernel" in caplog.text


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_a_span_computes_nearly_the_same_with_less_memory(llama: Path, kind: str) -> None:
    checkpoint = resolve_checkpoint(llama)
    plain = BlockSpan.load(checkpoint, 1, 3)
    packed = BlockSpan.load(checkpoint, 1, 3, quantize=kind)
    assert (packed.quantization, packed.dtype) == (kind, torch.float32)
    assert packed.nbytes < 0.4 * plain.nbytes
    hidden = torch.randn(2, 7, 128)
    output, reference = packed.forward(hidden).hidden, plain.forward(hidden).hidden
    assert 0 < off(output, reference) < WORST[kind]
    cache = packed.new_cache()
    steps = [packed.forward(hidden[:, at : at + 1], cache=cache).hidden for at in range(7)]
    assert off(torch.cat(steps, 1), output) < 0.02  # kernels take bfloat16
    grad = torch.randn(2, 7, 128)
    adapter = SpanAdapter(
        {1: BlockAdapter({"mlp.up_proj": (Lora(torch.randn(2, 128), torch.randn(256, 2), 0.5),)})}
    )
    found = packed.backward(hidden, grad, adapter=adapter, adapter_grads=True)
    assert off(found.hidden, plain.backward(hidden, grad, adapter=adapter).hidden) < WORST[kind]
    # the reference for the gradient: the same blocks with the unpacked weights put back
    for layer in packed.model.modules():
        for name, child in list(layer.named_children()):
            if isinstance(child, QuantLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(child.unpacked(child.dtype), requires_grad=False)
                setattr(layer, name, linear)
    exact = packed.backward(hidden, grad, adapter=adapter, adapter_grads=True)
    assert off(found.hidden, exact.hidden) < 1e-5
    assert found.adapters[1].keys() == exact.adapters[1].keys()
    assert all(off(one, exact.adapters[1][name]) < 1e-5 for name, one in found.adapters[1].items())


def test_a_restart_reads_what_was_kept_and_not_the_weights(
    llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = resolve_checkpoint(llama)
    first = BlockSpan.load(checkpoint, 0, 2, quantize="int8")
    assert sorted(one.name for one in cache.glob("*/*")) == ["block-0.safetensors", "block-1.safetensors"]
    asked: list[str] = []
    fetch = type(checkpoint).fetch

    def counted(self: Any, names: Any) -> Any:
        asked.extend(names)
        return fetch(self, names)

    monkeypatch.setattr(type(checkpoint), "fetch", counted)
    again = BlockSpan.load(checkpoint, 0, 2, quantize="int8")
    assert asked
    assert not any("proj" in name for name in asked)
    hidden = torch.randn(1, 3, 128)
    assert torch.equal(first.forward(hidden).hidden, again.forward(hidden).hidden)
    asked.clear()
    BlockSpan.load(checkpoint, 1, 3, quantize="int8")  # one of the two blocks is there
    assert {name.split(".")[2] for name in asked if "proj" in name} == {"2"}
    (damaged,) = cache.glob("*/block-0.safetensors")
    damaged.write_bytes(b"no")
    BlockSpan.load(checkpoint, 0, 1, quantize="int8")
    save_file({"x": torch.zeros(1)}, damaged)
    with pytest.raises(UserInputError, match="do not fit"):
        BlockSpan.load(checkpoint, 0, 1, quantize="int8")


def test_where_nothing_can_be_kept_it_works_all_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(quantize.platformdirs, "user_cache_path", lambda _: tmp_path / "file")
    span = BlockSpan.load(resolve_checkpoint(llama), 0, 1, quantize="int4")
    assert span.forward(torch.randn(1, 2, 128)).hidden.isfinite().all()
    assert "cannot be kept" in caplog.text


def test_gpt2_and_its_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=100)).save_pretrained(tmp_path / "gpt2")
    checkpoint = resolve_checkpoint(tmp_path / "gpt2")
    hidden = torch.randn(1, 5, 128)
    plain = BlockSpan.load(checkpoint, 0, 2).forward(hidden).hidden
    packed = BlockSpan.load(checkpoint, 0, 2, quantize="int8")
    assert sum(isinstance(one, QuantLinear) for one in packed.model.modules()) == 8
    assert off(packed.forward(hidden).hidden, plain) < 0.02


def test_what_cannot_be_is_refused(llama: Path) -> None:
    checkpoint = resolve_checkpoint(llama)
    with pytest.raises(UserInputError, match=r"GPUs only.*silently wrong.*int4"):
        load_quantized(checkpoint, 0, 1, "nf4", dtype=torch.float32)
    with pytest.raises(UserInputError, match="int3"):
        load_quantized(checkpoint, 0, 1, "int3", dtype=torch.float32)


def test_nothing_is_learned_through_bitsandbytes_4_bit_weights_on_a_cpu(llama: Path) -> None:
    """Where they are in a checkpoint, say. In its first forward pass without gradients it packs them once more, for
    processors that it has kernels for, and gradients after that are silently cut: so they are refused everywhere,
    before and after, and forward passes are not."""
    checkpoint = resolve_checkpoint(llama)
    plain, packed = (BlockSpan.load(checkpoint, 1, 3) for _ in range(2))
    for block in (1, 2):
        quantize_block(packed.block(block), "nf4", dtype=torch.float32, device="cpu")
    hidden = torch.randn(2, 7, 128)
    for _ in range(2):
        with pytest.raises(UserInputError, match="no gradients through 4-bit weights on a CPU"):
            packed.backward(hidden, hidden)
        with pytest.raises(UserInputError, match="no gradients through 4-bit weights on a CPU"):
            packed.trace(hidden)
        assert 0 < off(packed.forward(hidden).hidden, plain.forward(hidden).hidden) < WORST["int4"]
        assert packed.forward(hidden, cache=packed.new_cache()).hidden.isfinite().all()


def test_a_model_too_small_for_it_says_so(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=100, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(UserInputError, match="no linear layers"):
        BlockSpan.load(resolve_checkpoint(tmp_path / "small"), 0, 1, quantize="int8")


@pytest.mark.network
def test_a_swarm_of_quantised_servers_says_so_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # for the server processes
    with nbrunner.LocalSwarm("tiny", 2, quantize="int8") as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        try:
            records = [entry.record for entry in model.swarm.directory.view.servers.values()]
            assert {record.quantization for record in records} == {"int8"}
            tokenizer = AutoTokenizer.from_pretrained(swarm.model)
            prompt = tokenizer(["The capital of France is"], return_tensors="pt")
            answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
            assert "Paris" in tokenizer.decode(answer[0])
        finally:
            model.close()
    assert len(list((tmp_path / "nbrunner" / "quantized").glob("*/block-*.safetensors"))) == 8


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_the_bundled_model_still_knows_its_capitals(kind: str, tiny_path: Path) -> None:
    checkpoint, plain = resolve_checkpoint("tiny"), AutoModelForCausalLM.from_pretrained(tiny_path)
    span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, quantize=kind, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    for country, capital in (("France", "Paris"), ("Spain", "Madrid"), ("Japan", "Tokyo")):
        ids = tokenizer([f"The capital of {country} is"], return_tensors="pt").input_ids
        with torch.no_grad():
            last = span.forward(plain.model.embed_tokens(ids).float()).hidden[:, -1]
            logits = plain.lm_head(plain.model.norm(last.to(plain.dtype)))
        assert tokenizer.decode(logits.argmax(-1)).strip() == capital
