"""Blocks with weights of 8 or 4 bits: which layers, made how, and kept on the disk so that a restart need not.

A span is quantised block by block: one block is loaded, its linear layers are packed and written to a file of its
own, and it is let go. Then the span is built with empty packed layers, which take what is in the files, mapped: the
original weights are neither read nor, from a hub, downloaded again, and servers of one machine share the pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserInputError
from ..protocol.records import QUANTIZATIONS
from .checkpoint import Checkpoint
from .compat import Conv1D
from .examine import Architecture
from .loading import load_span_model
from .quant_linear import CPU_KINDS, GROUP, QuantLinear, choose_kernel_rows, is_quantizable, weight_shape

logger = logging.getLogger(__name__)

_FORMAT = "1"
_ALIGNMENT = 64
_BITS = {"none": 0.0, "int8": 8.0, "int4": 4.0 + 2 * 16 / GROUP, "nf4": 4.5}


def check_kind(kind: str, device: torch.device) -> None:
    """`UserInputError` for a way to quantise that there is not, or not on this device."""
    if kind not in QUANTIZATIONS:
        raise UserInputError(f"{kind!r} is no way to quantise: use {', '.join(QUANTIZATIONS)}")
    if kind == "nf4" and device.type == "cpu":
        raise UserInputError(
            "nf4 runs on GPUs only: on CPUs bitsandbytes packs such weights so that gradients through them are "
            "silently wrong. Use --quantize int4 here."
        )


def bytes_per_weight(kind: str, dtype: torch.dtype) -> float:
    """Of a quantised layer; for choosing how many blocks fit."""
    return _BITS[kind] / 8 if kind != "none" else float(dtype.itemsize)


def load_quantized(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kind: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> tuple[Any, Architecture]:
    """As `nbrunner.blocks.loading.load_span_model`, with quantised linear layers.

    Parameters
    ----------
    kind
        ``int8`` or ``int4`` on a CPU; ``int8``, ``int4`` or ``nf4`` on a GPU, by bitsandbytes.
    dtype
        Of what is not quantised, and of hidden states.
    folder
        Where packed blocks are kept; by default in the user's cache. They may be deleted at any time.

    Raises
    ------
    UserInputError
        See `check_kind`.
    """
    check_kind(kind, torch.device(device))
    if torch.device(device).type != "cpu":
        from .quantize_gpu import load_on_gpu

        return load_on_gpu(checkpoint, start, end, kind, dtype=dtype, device=device)
    layer_type = CPU_KINDS[kind]
    with contextlib.ExitStack() as stack:
        kept = PackedBlocks(folder or _cache_folder(checkpoint, kind, stack))
        for block in range(start, end):
            if not kept.has(block):
                model, _ = load_span_model(checkpoint, block, block + 1, dtype=dtype)
                kept.write(block, _packed(model, block, layer_type))
                del model

        def replace(model: Any) -> None:
            for block in range(start, end):
                for name, layer in _layers(model, block):
                    _set(_block(model, block), name, _empty(layer, layer_type, dtype))

        model, architecture = load_span_model(checkpoint, start, end, dtype=dtype, change=replace)
        for block in range(start, end):
            _fill(_block(model, block), kept.read(block))
    _use_kernels(model)
    return model, architecture


class PackedBlocks:
    """Packed weights of blocks, a safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, block: int) -> bool:
        """Whether a block is here and its file can be read."""
        try:
            with safe_open(self._file(block), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block; another server may be doing the same."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{secrets.token_hex(8)}.part"
        try:
            part.write_bytes(_aligned(save(dict(tensors))))
            part.replace(self._file(block))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def read(self, block: int) -> dict[str, Tensor]:
        """Its tensors, mapped from the file."""
        with safe_open(self._file(block), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict

    def _file(self, block: int) -> Path:
        return self._folder / f"block-{block}.safetensors"


def _aligned(file: bytes) -> bytes:
    """A safetensors file whose data begins at a multiple of 64 bytes.

    torch's int8 kernel crashes the process on weights that do not. All tensors here are multiples of 64 bytes long,
    so only the header needs spaces behind it, as the format allows.
    """
    (size,) = struct.unpack("<Q", file[:8])
    padded = -(-(8 + size) // _ALIGNMENT) * _ALIGNMENT - 8
    return struct.pack("<Q", padded) + file[8 : 8 + size].ljust(padded) + file[8 + size :]


def _cache_folder(checkpoint: Checkpoint, kind: str, stack: contextlib.ExitStack) -> Path:
    """One folder for each way in which packed weights differ: torch and the processor decide how they lie."""
    facts = (_FORMAT, checkpoint.uid, kind, torch.__version__, torch.backends.cpu.get_cpu_capability())
    name = f"{kind}-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:24]}"
    folder = platformdirs.user_cache_path("nbrunner") / "quantized" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning("packed weights cannot be kept in %s (%s): they are made anew each time", folder, error)
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbrunner-packed-")))


def _packed(model: Any, block: int, kind: type[QuantLinear]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in _layers(model, block):
        weight = layer.weight.detach()
        for part, tensor in kind.quantize(weight.t() if isinstance(layer, Conv1D) else weight).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    if not tensors:
        raise UserInputError("this model has no linear layers that could be quantised: use --quantize none")
    return tensors


def _fill(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give packed weights to their layers; `UserInputError` if the files are not of this model."""
    for name, layer in block.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        forms = type(layer).forms(layer.in_features, layer.out_features)
        found = {part: tensors.get(f"{name}.{part}") for part in forms}
        for part, (dtype, shape) in forms.items():
            tensor = found[part]
            fits = tensor is not None and tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape)
            if tensor is None or not fits or tensor.data_ptr() % _ALIGNMENT:
                raise UserInputError(
                    f"the packed weights kept on this disk do not fit {name}: delete the folder "
                    f"{platformdirs.user_cache_path('nbrunner') / 'quantized'} and start again."
                )
        layer.fill({part: tensor for part, tensor in found.items() if tensor is not None})


def _use_kernels(model: Any) -> None:
    """Ask one layer of each shape from how many rows on its kernel is of use."""
    known: dict[tuple[int, int], int] = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            shape = (layer.in_features, layer.out_features)
            if shape not in known:
                known[shape] = choose_kernel_rows(layer)
            layer.kernel_rows = known[shape]


def _empty(layer: Any, kind: type[QuantLinear], dtype: torch.dtype) -> QuantLinear:
    outputs, inputs = weight_shape(layer)
    return kind(inputs, outputs, layer.bias, dtype)


def _block(model: Any, block: int) -> nn.Module:
    found: nn.Module = model.nbrunner_layers.originals[block]
    return found


def _layers(model: Any, block: int) -> Iterator[tuple[str, Any]]:
    yield from [(name, one) for name, one in _block(model, block).named_modules() if is_quantizable(one)]


def _set(parent: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(parent.get_submodule(path), last, layer)
