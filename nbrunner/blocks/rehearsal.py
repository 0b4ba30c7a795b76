"""A step of a block without its products, which brings the code of a step back into the processor's caches.

A server that waits for others of its chain for some 20 ms finds them full of what others have done since. Eight
blocks of hidden 1024 then take 31.4 ms instead of 29.2: the first of them 4.1 instead of 3.6, those after it less
and less. After a rehearsal of one block they take 30.5, even if it was 13 ms ago (medians of 40 steps, in turn, on
a virtual machine with a core for each process). A rehearsal takes 0.5 ms, 1.1 if the code has to be fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .span import BlockSpan

LEAST_SHARE = 0.9
"""Of a block's weights must be in linear layers: what else has weights is not left out, and would read them."""

_OUTPUTS = 8  # of each product are computed all the same: the way to it is to be rehearsed too


class Rehearsal:
    """The first block of a span on zeros.

    Parameters
    ----------
    span
        One for which `can_rehearse` holds.
    """

    def __init__(self, span: BlockSpan) -> None:
        cache = span.new_cache(span.start, span.start + 1)
        if cache is None:
            raise ValueError("a family without caches has no steps to rehearse")
        self._cache = cache
        self._hidden = torch.zeros((1, 1, *span.hidden_shape), dtype=span.dtype)
        self._block = span.block(span.start)
        (self._call,) = span.prepare(cache, 1).calls
        self._short = {layer: _short(layer) for layer in _linears(self._block)}

    def run(self) -> None:
        """Nothing else may use the span meanwhile."""
        self._cache.reset()
        with torch.inference_mode(), _in_place_of_their_own(self._short):
            self._call.run(self._block, self._hidden, {})


def can_rehearse(span: BlockSpan) -> bool:
    """Whether nearly all weights of a block are in linear layers, in this machine's memory."""
    if span.device.type != "cpu" or span.carry_at(span.start) or not span.architecture.cached:
        return False
    block = span.block(span.start)
    everything = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    return sum(layer.weight.nbytes for layer in _linears(block)) >= LEAST_SHARE * everything


def _linears(block: nn.Module) -> list[nn.Linear]:
    """Only of the plain class: others may do something of their own."""
    return [module for module in block.modules() if type(module) is nn.Linear]


def _short(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight[:_OUTPUTS]

    def forward(hidden: Tensor) -> Tensor:
        output = hidden.new_zeros(*hidden.shape[:-1], layer.out_features)
        output[..., : weight.shape[0]] = nn.functional.linear(hidden, weight)
        return output

    return forward


@contextmanager
def _in_place_of_their_own(forwards: dict[nn.Linear, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    own = {layer: layer.__dict__.get("forward") for layer in forwards}  # some have one (thin and wide products)
    for layer, forward in forwards.items():
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, before in own.items():
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before
