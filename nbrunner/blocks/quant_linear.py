"""Linear layers with 8- or 4-bit weights on the CPU, over torch's own packed kernels, with a right backward pass.

The kernels are private functions of torch, so `choose_kernel_rows` looks, when a server starts, whether they give
the right thing on this machine, and up to how many rows they are faster than a matrix product with the weights
unpacked. They have no gradient: ours is that of the unpacked weights, which is what the forward pass computes with.

Measured on one core with AVX-512, 1024 → 2816, one row: plain bfloat16 436 µs, int8 and int4 186 µs; 64 rows:
4.9 ms, 5.7 ms, 5.4 ms. With float32 rows the kernels take 2 to 6 ms for one row, so that they are always given
bfloat16: an error of 0.4 %, beside that of the weights.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UserInputError
from .best_time import best_seconds
from .compat import Conv1D
from .wide_products import rows_worth_widening

logger = logging.getLogger(__name__)

OUTPUTS = 64
"""int4 layers have a multiple of so many outputs: what kernels pack together with AVX-512; half of it with AVX2."""

GROUP = 32
"""Weights that share a scale in int4. 32 has half the error of 128 for 0.1 bytes more a weight."""

LEAST_WEIGHTS = 1 << 14
"""Layers with fewer weights stay as they are: routers of experts, gates. They are small, errors in them are not."""

KERNEL_DTYPE = torch.bfloat16
_TRIES = 7  # the best of so many: on a busy machine a single one may be ten times too long
_TRIED_ROWS = (1, 4, 16, 64, 256)
_ALLOWED_ERROR = 0.02  # of the product, relative: bfloat16's own rounding is 0.004


def is_quantizable(layer: nn.Module) -> bool:
    """Whether a layer is replaced: a linear one, large enough, of a shape that the kernels take."""
    if not isinstance(layer, (nn.Linear, Conv1D)) or layer.weight.numel() < LEAST_WEIGHTS:
        return False
    outputs, inputs = weight_shape(layer)
    return inputs % GROUP == 0 and outputs % OUTPUTS == 0


def weight_shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs): Conv1D keeps its weight the other way round."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


class QuantLinear(nn.Module):
    """A linear layer whose weights are kept packed; frozen, but gradients pass through it to its input.

    Parameters
    ----------
    in_features, out_features
        As in ``nn.Linear``.
    bias
        [out_features], or None.
    dtype
        Of inputs and outputs.
    """

    kind: ClassVar[str]
    packed: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.register_parameter("bias", bias)
        self.kernel_rows = 0
        self.weight = torch.empty(0)  # until filled: gpt2 initialises the weights of layers that it knows by name

    @classmethod
    @abstractmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a weight [out_features, in_features], in whatever dtype it is."""

    @classmethod
    @abstractmethod
    def forms(cls, in_features: int, out_features: int) -> dict[str, tuple[torch.dtype, Any]]:
        """(dtype, shape) of each of those tensors."""

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] that the packed one stands for."""

    @abstractmethod
    def _kernel(self, rows: Tensor) -> Tensor:
        """``rows @ weight.T`` by torch's kernel, in `KERNEL_DTYPE`."""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take packed weights; not kept in ``state_dict``, which is what checkpoints are compared with."""
        self.__dict__.pop("weight", None)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features).to(self.dtype)
        product: Tensor = _Product.apply(rows, self) if rows.requires_grad else self.product(rows)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """``rows @ weight.T``, in the faster of the two ways."""
        if rows.shape[0] <= self.kernel_rows:
            return self._kernel(rows.to(KERNEL_DTYPE).contiguous()).to(self.dtype)
        return _unpacked_product(self, rows)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class Int8Linear(QuantLinear):
    """One scale for each output: the largest weight becomes 127."""

    kind = "int8"

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        # rounded first: what is divided by must be what is multiplied with later
        scales = (weight.abs().amax(1).clamp(min=1e-12) / 127).to(KERNEL_DTYPE)
        packed = (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return {"packed": packed, "scales": scales}

    @classmethod
    def forms(cls, in_features: int, out_features: int) -> dict[str, tuple[torch.dtype, Any]]:
        return {"packed": (torch.int8, (out_features, in_features)), "scales": (KERNEL_DTYPE, (out_features,))}

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype) * self.scales[:, None].to(dtype)

    def _kernel(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self.packed, self.scales)


class Int4Linear(QuantLinear):
    """A scale and a zero for each 32 weights of an output; codes packed as torch's kernel wants them here."""

    kind = "int4"

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        groups = weight.float().reshape(outputs, inputs // GROUP, GROUP)
        most, least = groups.amax(-1), groups.amin(-1)
        scales = ((most - least) / 15).clamp(min=1e-12).to(KERNEL_DTYPE)
        zeros = (least + scales.float() * 8).to(KERNEL_DTYPE)
        codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
        packed = _pack(codes.to(torch.int32).reshape(outputs, inputs))
        return {"packed": packed, "scales": torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()}

    @classmethod
    def forms(cls, in_features: int, out_features: int) -> dict[str, tuple[torch.dtype, Any]]:
        return {
            "packed": (torch.uint8, (out_features, in_features // 2)),
            "scales": (KERNEL_DTYPE, (in_features // GROUP, out_features, 2)),
        }

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        groups = self.in_features // GROUP
        codes = _unpack(self.packed, self.in_features, _block_of_this_processor())
        scales, zeros = self.scales.to(dtype).transpose(0, 1)[..., None].unbind(2)
        grouped = codes.view(self.out_features, groups, GROUP).to(dtype) - 8
        return (grouped * scales + zeros).view(self.out_features, self.in_features)

    def _kernel(self, rows: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)


CPU_KINDS: dict[str, type[QuantLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def _pack(codes: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1)


def _unpack(packed: Tensor, in_features: int, block: int) -> Tensor:
    """Codes [outputs, inputs], uint8: of `block` outputs, the first half lies in the low nibbles."""
    blocks = packed.view(-1, in_features, block // 2)
    return torch.cat([blocks & 0xF, blocks >> 4], -1).transpose(1, 2).reshape(-1, in_features)


@cache
def _block_of_this_processor() -> int:
    """Outputs that the kernel packs together: 64 with AVX-512, 32 with AVX2; found by packing something known."""
    codes = torch.randint(0, 16, (OUTPUTS, GROUP), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = _pack(codes)
    for block in (64, 32, 16):
        if torch.equal(_unpack(packed, GROUP, block).int(), codes):
            return block
    raise UserInputError(
        "int4 weights are packed on this processor in a way that nbrunner does not know: use --quantize int8."
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, linear: QuantLinear) -> Tensor:
        ctx.linear = linear
        return _unpacked_product(linear, rows)  # not the kernel: the gradient is that of exactly this

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        linear: QuantLinear = ctx.linear
        dtype = _product_dtype(grad)
        return (grad.to(dtype) @ linear.unpacked(dtype)).to(grad.dtype), None


@torch.no_grad()
def choose_kernel_rows(linear: QuantLinear) -> int:
    """Up to how many rows torch's kernel is right and faster than unpacking, on this machine; 0: never.

    Takes some 50 ms; the answer holds for layers of about this size.
    """
    most, generator = 0, torch.Generator().manual_seed(0)
    weight = linear.unpacked(linear.dtype)
    for count in _TRIED_ROWS:
        rows = torch.randn(count, linear.in_features, generator=generator).to(KERNEL_DTYPE)
        try:
            found = linear._kernel(rows)
        except RuntimeError as problem:
            logger.warning("torch's %s kernel does not run here (%s): weights are unpacked", linear.kind, problem)
            return 0
        wanted = rows.float() @ weight.float().t()
        error = (found.float() - wanted).norm() / wanted.norm().clamp(min=1e-12)
        if not error < _ALLOWED_ERROR:
            logger.warning("torch's %s kernel is off by %.3f here: weights are unpacked", linear.kind, float(error))
            return 0
        plain = rows.to(linear.dtype)
        kernel, unpacked = partial(linear._kernel, rows), partial(_unpacked_product, linear, plain)
        if best_seconds(kernel, _TRIES) > best_seconds(unpacked, _TRIES):
            break
        most = count
    return most


def _unpacked_product(linear: QuantLinear, rows: Tensor) -> Tensor:
    dtype = _product_dtype(rows)
    return (rows.to(dtype) @ linear.unpacked(dtype).t()).to(rows.dtype)


def _product_dtype(rows: Tensor) -> torch.dtype:
    """In which many rows are multiplied faster on this processor (`nbrunner.blocks.wide_products`)."""
    wide = rows.dtype == torch.bfloat16 and rows.shape[0] >= rows_worth_widening()
    return torch.float32 if wide else rows.dtype
