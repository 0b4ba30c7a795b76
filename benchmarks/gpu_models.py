"""Blocks of big models with random weights, made where they run: as a span of ours, and as plain transformers.

Both share their weights, so that they take their memory once and are compared on the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from nbrunner.blocks.examine import examine
from nbrunner.blocks.pruning import pruned_class
from nbrunner.blocks.quantize_gpu import quantize_block
from nbrunner.blocks.span import BlockSpan

BITS = {"none": None, "nf4": 4.5}
"""Bits of a weight of linear layers as it is kept; None: the dtype's. nf4 has a scale for each 64 weights."""


@dataclass(frozen=True)
class Blocks:
    """The same blocks twice.

    Attributes
    ----------
    span
        Ours.
    plain
        transformers' own decoder over the same weights, without embedding, final norm and head.
    count
        How many there are.
    nbytes
        Bytes of weights that one step reads.
    """

    span: BlockSpan
    plain: LlamaModel
    count: int
    nbytes: int


def make_blocks(
    shape: Mapping[str, int], count: int, kind: str, dtype: torch.dtype, device: torch.device
) -> Blocks:
    """The first blocks of a model of this shape; ``kind`` is ``none`` or ``nf4``.

    One block after the other gets its weights and is quantised, so that only one is there in full at a time.
    """
    config = config_of(shape, count)
    architecture = examine(config)
    with torch.device("meta"):
        model: Any = pruned_class(architecture.model_class, 0, count, architecture.outside)(config)
        plain = LlamaModel(config)
    for block in model.nbrunner_layers.originals:
        _fill(block, dtype, device)
        if kind != "none":
            quantize_block(block, kind, dtype=dtype, device=device)
    with device:
        model.model.rotary_emb, plain.rotary_emb = (LlamaRotaryEmbedding(config) for _ in range(2))
    plain.norm = plain.embed_tokens = nn.Identity()
    # before the span puts its hooks into them; the memory of what is copied says that weights stay where they are
    plain.layers = nn.ModuleList(
        copy.deepcopy(block, {id(one): one for one in (*block.parameters(), *block.buffers())})
        for block in model.nbrunner_layers.originals
    )
    nbytes = sum(_bytes(one) for block in plain.layers for one in (*block.parameters(), *block.buffers()))
    span = BlockSpan(model.eval(), architecture, SimpleNamespace(uid="random"))  # type: ignore[arg-type]
    return Blocks(span, plain.eval().requires_grad_(False), count, nbytes)


def blocks_that_fit(
    shape: Mapping[str, int], kind: str, dtype: torch.dtype, free: int, *, cached_tokens: int
) -> int:
    """How many blocks of the model fit into so many bytes, each with keys and values of so many tokens."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    keys = hidden // heads * shape["num_key_value_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    bits = BITS[kind] or 8.0 * dtype.itemsize
    each = weights * bits / 8 + 2 * keys * dtype.itemsize * cached_tokens
    unpacked = weights * dtype.itemsize if kind != "none" else 0  # of the block that is being quantised
    return max(1, min(shape["num_hidden_layers"], int((free - unpacked) / each)))


def config_of(shape: Mapping[str, int], count: int) -> LlamaConfig:
    """Of a model of this shape with so many blocks, and next to no vocabulary."""
    return LlamaConfig(**{**shape, "num_hidden_layers": count}, vocab_size=32, max_position_embeddings=4096)


def _fill(block: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Random matrices and norms of one, on the device."""
    for module in block.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=dtype, device=device)
            made = made.normal_(0.0, 0.02) if weight.ndim > 1 else made.fill_(1.0)
            setattr(module, name, nn.Parameter(made, requires_grad=False))


def _bytes(weight: Any) -> int:
    """Of a weight with its scales, where it is quantised by bitsandbytes."""
    nbytes = int(weight.numel() * weight.element_size())
    state = getattr(weight, "quant_state", None)
    while state is not None:
        nbytes += state.absmax.numel() * state.absmax.element_size()
        state = state.state2
    return nbytes
