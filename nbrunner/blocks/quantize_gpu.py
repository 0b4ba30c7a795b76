"""Quantised blocks on a GPU: bitsandbytes' layers in place of the linear ones, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserInputError
from .checkpoint import Checkpoint
from .compat import Conv1D
from .examine import Architecture
from .loading import load_span_model
from .quant_linear import is_quantizable


def load_on_gpu(
    checkpoint: Checkpoint, start: int, end: int, kind: str, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, Architecture]:
    """As `nbrunner.blocks.quantize.load_quantized`, on a GPU.

    The span is loaded into this machine's memory (mapped from its files where nothing is converted) and each layer
    is packed on its way to the GPU, which therefore never holds more than one layer unpacked.

    Raises
    ------
    UserInputError
        bitsandbytes is not installed, or not for this GPU.
    """
    model, architecture = load_span_model(checkpoint, start, end, dtype=dtype)
    for block in range(start, end):
        layers = model.nbrunner_layers.originals[block]
        quantize_block(layers, kind, dtype=dtype, device=device)
    return model.to(device), architecture


def quantize_block(block: nn.Module, kind: str, *, dtype: torch.dtype, device: torch.device | str) -> None:
    """Put bitsandbytes' layers, packed on a GPU, in place of the linear layers of a block."""
    found = [(name, one) for name, one in block.named_modules() if is_quantizable(one)]
    for name, layer in found:
        path, _, last = name.rpartition(".")
        setattr(block.get_submodule(path), last, _bitsandbytes(layer, kind, dtype).to(device))


def _bitsandbytes(layer: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except (ImportError, RuntimeError, OSError) as error:
        raise UserInputError(f"bitsandbytes cannot be used here ({error}): use --quantize none.") from None
    weight = (layer.weight.t().contiguous() if isinstance(layer, Conv1D) else layer.weight).detach()
    outputs, inputs = weight.shape
    biased = layer.bias is not None
    made: Any
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(inputs, outputs, bias=biased, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        form = "nf4" if kind == "nf4" else "fp4"
        made = bnb.nn.Linear4bit(inputs, outputs, bias=biased, compute_dtype=dtype, quant_type=form, device="meta")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=form)
    if biased:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made  # type: ignore[no-any-return]
