"""Gradients of adapters as they come back from servers: checked, added up, and never more than a frame of them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.adapters_wire import wire_name
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import MAX_FRAME_BYTES, Limits
from nbrunner.protocol.tensors import take

AdapterGrads = Mapping[int, Mapping[str, torch.Tensor]]
"""By block, then by the tensor's name."""


class AdapterSums:
    """Gradients added up over parts of a batch.

    Attributes
    ----------
    found : dict
        The sums so far.
    """

    def __init__(self) -> None:
        self.found: dict[int, dict[str, torch.Tensor]] = {}

    def add(self, grads: AdapterGrads) -> None:
        """Add those of another part, or of other blocks."""
        for block, named in grads.items():
            sums = self.found.setdefault(block, {})
            for name, one in named.items():
                sums[name] = sums[name] + one if name in sums else one

    def fill(self, adapter: SpanAdapter) -> None:
        """Zero for whatever no gradient came to."""
        for block, one in adapter.blocks.items():
            sums = self.found.setdefault(block, {})
            for name, tensor in one.tensors.items():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor)


def take_adapter_grads(answer: Mapping[str, RawTensor], adapter: SpanAdapter) -> AdapterGrads:
    """The gradient of every tensor of an adapter; `BadPeerDataError` if one is missing, misshapen or not finite."""
    return {
        block: {
            name: take(answer, wire_name(block, name), dtype=tensor.dtype, shape=list(tensor.shape))
            for name, tensor in one.tensors.items()
        }
        for block, one in adapter.blocks.items()
    }


def beside_adapter(limits: Limits, adapter: SpanAdapter | None) -> Limits:
    """What is left of a frame for hidden states when gradients of an adapter are in it too."""
    if adapter is None:
        return limits
    held = sum(one.nbytes for one in adapter.blocks.values())
    frame = min(limits.frame_bytes, MAX_FRAME_BYTES)
    return msgspec.structs.replace(limits, frame_bytes=max(frame - held, 0))


def most_adapted(adapter: SpanAdapter | None, start: int, end: int, limits: Limits) -> int:
    """How many blocks from ``start`` on fill half a frame with adapters, and so with gradients; at least one."""
    half, held = min(limits.frame_bytes, MAX_FRAME_BYTES) // 2, 0
    for block in range(start, end):
        one = adapter.blocks.get(block) if adapter is not None else None
        held += one.nbytes if one is not None else 0
        if held > half and block > start:
            return block - start
    return max(end - start, 1)
