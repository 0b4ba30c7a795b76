"""Products of a few rows with large float32 matrices on a processor, the other way round where that is faster.

A pass of several sessions' steps has some ten rows, and a group of a training batch 64. For so few, MKL is slow at
``rows @ weight.T``, as ``nn.Linear`` asks for it, and ``(weight @ rows.T).T`` is the same. Measured on one core
with AVX-512, 1024 → 2816, in ms:

=====================  ====  ====  ====  ====  ====  ====  ====  ====  =====
rows                      1     4     8    16    32    64    96   128    256
=====================  ====  ====  ====  ====  ====  ====  ====  ====  =====
as ``nn.Linear``       0.43  0.92  1.33  1.75  2.22  3.19  4.30  5.56   9.96
turned round           0.43  0.99  1.01  1.01  1.47  2.69  3.70  5.15  11.16
=====================  ====  ====  ====  ====  ====  ====  ====  ====  =====

Weights packed beforehand for oneDNN would be as fast as that, and a second copy of them. In bfloat16 there is no
such gap; the way back, ``grad @ weight``, is the fast one as it is (and see `nbrunner.blocks.huge_pages`).

It rounds differently in the last bits, and is therefore left to joined passes, which do so anyhow, and to those
that are kept for their gradients. For how many rows it is faster is measured when a server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .best_time import best_seconds

LEAST_WEIGHTS = 1 << 18
"""Smaller layers stay in the processor's caches, where nothing of this holds."""

_TRIED = {5: range(4, 8), 9: range(8, 12), 13: range(12, 16), 24: range(16, 32), 64: range(32, 96)}
"""Each number of rows that is tried, and for which ones it stands."""

_TRIES = 3
_GAIN = 0.93
_SAMPLE_BYTES = 64 << 20  # of different weights, so that they come from memory as in a pass
_SAMPLE_ROWS = 8  # with so many; with more, the work and not the memory decides, and fewer weights do


class ThinProducts:
    """The large float32 linear layers of some blocks.

    Attributes
    ----------
    layers
        Those that are turned round for some numbers of rows.
    """

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        self._turned = False
        self.layers: list[nn.Linear] = []
        by_shape: dict[torch.Size, list[nn.Linear]] = {}
        for block in blocks:
            for module in block.modules():
                if _fits(module):
                    by_shape.setdefault(module.weight.shape, []).append(module)
        for same in by_shape.values():
            counts = rows_worth_turning(same)
            if counts:
                self.layers += same
                for layer in same:
                    layer.forward = self._forward(layer, counts)  # type: ignore[assignment]

    @contextmanager
    def turned(self) -> Iterator[None]:
        """In here products are turned round where that is faster."""
        self._turned = True
        try:
            yield
        finally:
            self._turned = False

    def _forward(self, layer: nn.Linear, counts: frozenset[int]) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            if self._turned and hidden.numel() // layer.in_features in counts:
                return turned_product(layer, hidden)
            return _plain_product(layer, hidden)

        return forward


def turned_product(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """What ``layer`` makes of ``hidden``, by ``weight @ rows.T``."""
    rows = hidden.reshape(-1, layer.in_features)
    product: Tensor = _Turned.apply(rows, layer.weight) if rows.requires_grad else _turned(rows, layer.weight)  # type: ignore[no-untyped-call]
    if layer.bias is not None:
        product = product + layer.bias
    return product.view(*hidden.shape[:-1], layer.out_features)


@torch.no_grad()
def rows_worth_turning(layers: Sequence[nn.Linear]) -> frozenset[int]:
    """For how many rows these layers, all of one shape, are better turned round here. Takes some 100 ms."""
    weight = layers[0].weight
    found: set[int] = set()
    for count, meant in _TRIED.items():
        sample = _SAMPLE_BYTES * min(1.0, _SAMPLE_ROWS / count)
        some = layers[: max(1, int(sample / (weight.numel() * weight.element_size())))]
        rows = torch.randn(1, count, layers[0].in_features, generator=torch.Generator().manual_seed(0))
        if _seconds(turned_product, some, rows) < _GAIN * _seconds(_plain_product, some, rows):
            found.update(meant)
    return frozenset(found)


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Only the plain class: others may do something of their own."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= LEAST_WEIGHTS
    )


def _turned(rows: Tensor, weight: Tensor) -> Tensor:
    # copied first: MKL takes 2.9 ms for 64 rows that are transposed in place, and 2.7 with the copy
    return torch.mm(weight, rows.t().contiguous()).t().contiguous()


class _Turned(torch.autograd.Function):
    """Autograd's own way back from ``weight @ rows.T`` would take half as long again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return _turned(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight, None


def _plain_product(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, layer.weight, layer.bias)


def _seconds(product: Callable[[nn.Linear, Tensor], Tensor], layers: Sequence[nn.Linear], rows: Tensor) -> float:
    return best_seconds(lambda: [product(layer, rows) for layer in layers], _TRIES)
