"""Products of many rows with bfloat16 matrices on a processor, in float32 where that is faster.

A processor without matrix units multiplies bfloat16 at half the speed of float32 or less. One row is bound by
memory and is left as it is; but a prompt or a training batch is worth having the weights widened, a piece at a
time. Measured on one core with AVX-512 and its bfloat16 instructions, 1024 → 2816: 16 rows 1.6 ms and 2.1 widened,
64 rows 4.9 and 4.0, 256 rows 17.6 and 11.4, 512 rows 35 and 21.

The result is rounded to bfloat16 as before; both ways add up in float32, and differ in the order in which they do.
From how many rows on it is faster, if at all, is measured when a server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .best_time import best_seconds

LEAST_WEIGHTS = 1 << 18
"""Smaller layers are little work in either way."""

NEVER = 1 << 62

_PIECE = 1 << 20  # weights widened at a time: 4 MB, which a core's cache holds
_TRIED = (64, 128)
_TRIED_WIDTH = 2048
_TRIES = 3
_GAIN = 0.9


def widen_products(blocks: Iterable[nn.Module]) -> list[nn.Linear]:
    """Have the large bfloat16 linear layers of some blocks multiply many rows in float32, if that is faster here.

    Their weights get no gradient: servers keep them as they are.

    Returns
    -------
    list of nn.Linear
        Those that do.
    """
    layers = [module for block in blocks for module in block.modules() if _fits(module)]
    least = rows_worth_widening() if layers else NEVER
    if least == NEVER:
        return []
    for layer in layers:
        layer.forward = _forward(layer, least)  # type: ignore[assignment] # of this object only, as in thin_products
    return layers


def wide_product(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """What ``layer`` makes of ``hidden``, computed in float32."""
    rows = hidden.reshape(-1, layer.in_features)
    product: Tensor = _Product.apply(rows, layer.weight) if rows.requires_grad else _product(rows, layer.weight)  # type: ignore[no-untyped-call]
    if layer.bias is not None:
        product = product + layer.bias
    return product.view(*hidden.shape[:-1], layer.out_features)


@cache
@torch.no_grad()
def rows_worth_widening() -> int:
    """From how many rows on a product with a bfloat16 matrix is faster in float32 on this machine, or `NEVER`.

    Takes some 50 ms, once.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * _PIECE // _TRIED_WIDTH, _TRIED_WIDTH, generator=generator).to(torch.bfloat16)
    for count in _TRIED:
        rows = torch.randn(count, _TRIED_WIDTH, generator=generator).to(torch.bfloat16)
        wide, plain = partial(_product, rows, weight), partial(nn.functional.linear, rows, weight)
        if best_seconds(wide, _TRIES) < _GAIN * best_seconds(plain, _TRIES):
            return count
    return NEVER


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Only the plain class: others may do something of their own."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= LEAST_WEIGHTS
    )


def _forward(layer: nn.Linear, least: int) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        if hidden.numel() >= least * layer.in_features:
            return wide_product(layer, hidden)
        return nn.functional.linear(hidden, layer.weight, layer.bias)

    return forward


def _pieces(weight: Tensor) -> list[slice]:
    size = max(1, _PIECE // weight.shape[1])
    return [slice(begin, begin + size) for begin in range(0, weight.shape[0], size)]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    wide = rows.float()
    product = rows.new_empty(rows.shape[0], weight.shape[0])
    for piece in _pieces(weight):
        product[:, piece] = wide @ weight[piece].float().t()
    return product


class _Product(torch.autograd.Function):
    """Keeps nothing but the weights: widened ones would be twice the model."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return _product(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight: Tensor = ctx.weight
        wide = grad.float()
        found = wide.new_zeros(grad.shape[0], weight.shape[1])
        for piece in _pieces(weight):
            found.addmm_(wide[:, piece], weight[piece].float())
        return found.to(grad.dtype), None
