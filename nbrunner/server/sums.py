"""Gradients of adapters added up over the parts of a batch, until their peer fetches them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.requests import AdapterSum

SECONDS = 120.0

PEERS = 4
"""How many peers may have all they are allowed here."""

Key = tuple[str, str, int, int]
"""Peer, id, and the blocks ``[start, end)``."""


@dataclass
class _Sum:
    until: float
    numbers: set[int] = field(default_factory=set)
    grads: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    nbytes: int = 0


class GradientSums:
    """Sums by who asked for them. `add` is for the compute thread, `take` for the event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.adapter_bytes
        self._sums: dict[Key, _Sum] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Held now."""
        return sum(one.nbytes for one in self._sums.values())

    def add(
        self,
        peer: str,
        wanted: AdapterSum,
        blocks: tuple[int, int],
        grads: Mapping[int, Mapping[str, torch.Tensor]],
    ) -> bool:
        """Add one part's gradients, unless they have been; False if there is no room for another sum."""
        with self._lock:
            now = time.monotonic()
            for key in [key for key, one in self._sums.items() if one.until <= now]:
                del self._sums[key]
            key = (peer, wanted.id, *blocks)
            held = self._sums.get(key)
            if held is None:
                size = sum(one.numel() * one.element_size() for named in grads.values() for one in named.values())
                theirs = sum(one.nbytes for (owner, *_), one in self._sums.items() if owner == peer)
                if theirs + size > self._limit or self.nbytes + size > PEERS * self._limit:
                    return False
                held = self._sums[key] = _Sum(now + SECONDS, nbytes=size)
            if wanted.number in held.numbers:
                return True
            for block, named in grads.items():
                sums = held.grads.setdefault(block, {})
                for name, one in named.items():
                    sums[name] = sums[name] + one if name in sums else one
            held.numbers.add(wanted.number)
            held.until = now + SECONDS
            return True

    def take(
        self, peer: str, name: str, blocks: tuple[int, int]
    ) -> tuple[list[int], dict[int, dict[str, torch.Tensor]]]:
        """The numbers that were added up, and the sum, which is not kept any longer."""
        with self._lock:
            held = self._sums.pop((peer, name, *blocks), None)
        if held is None:
            raise PeerRefusedError("these gradients are not kept any more", code="forgotten")
        return sorted(held.numbers), held.grads
