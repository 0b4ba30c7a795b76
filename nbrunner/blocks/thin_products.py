"""Products of a few rows with large float32 matrices on a processor, the other way round where that is faster.

A pass of several sessions' steps often has 4 to 15 rows. For so few, MKL takes longer for ``rows @ weight.T``, as
``nn.Linear`` asks for it, than for 16 of them, and ``(weight @ rows.T).T`` is the same. Measured on one core with
AVX-512, 1024 → 2816: 0.7 ms for 1 row; 1.5, 2.7 and 1.75 ms for 4, 9 and 16; turned round 1.4, 1.5 and 1.5 ms. In
bfloat16 there is no such gap.

It rounds differently in the last bits, and is therefore left to joined passes, which do so anyhow. For how many
rows it is faster is measured when a server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .best_time import best_seconds

LEAST_WEIGHTS = 1 << 18
"""Smaller layers stay in the processor's caches, where nothing of this holds."""

_TRIED = (5, 9, 13)  # each stands for itself, the one before it and the two behind it
_TRIES = 3
_GAIN = 0.9
_SAMPLE_BYTES = 64 << 20  # of different weights, so that they come from memory as in a pass


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
    product = torch.mm(layer.weight, rows.t()).t().contiguous()
    if layer.bias is not None:
        product += layer.bias
    return product.view(*hidden.shape[:-1], layer.out_features)


@torch.no_grad()
def rows_worth_turning(layers: Sequence[nn.Linear]) -> frozenset[int]:
    """For how many rows these layers, all of one shape, are better turned round here. Takes some 50 ms."""
    weight = layers[0].weight
    some = layers[: max(1, _SAMPLE_BYTES // (weight.numel() * weight.element_size()))]
    found: set[int] = set()
    for count in _TRIED:
        rows = torch.randn(1, count, layers[0].in_features, generator=torch.Generator().manual_seed(0))
        if _seconds(turned_product, some, rows) < _GAIN * _seconds(_plain_product, some, rows):
            found.update(range(count - 1, count + 3))
    return frozenset(found)


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Only the plain class: others may do something of their own."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= LEAST_WEIGHTS
    )


def _plain_product(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, layer.weight, layer.bias)


def _seconds(product: Callable[[nn.Linear, Tensor], Tensor], layers: Sequence[nn.Linear], rows: Tensor) -> float:
    return best_seconds(lambda: [product(layer, rows) for layer in layers], _TRIES)
