"""Forward passes whose graphs are kept until their gradients are asked for: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

from nbrunner.blocks.passes import KeptPass
from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.limits import Limits

SECONDS = 120.0
"""A backward pass follows its forward pass after a loss and the other parts of its batch; later is never."""


@dataclass(frozen=True)
class _Held:
    peer: str
    blocks: tuple[int, int]
    kept: KeptPass
    until: float


class KeptPasses:
    """Kept passes by an id that only their peer knows. All methods run in the event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.kept_bytes
        self._held: dict[str, _Held] = {}  # the oldest first
        self._bytes_each = 0.0
        self._longest = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def nbytes(self) -> int:
        """Held now."""
        return sum(one.kept.nbytes for one in self._held.values())

    def allowance(self, work: int) -> int:
        """Bytes that a pass may keep; 0 if by experience it would need more. ``work`` is tokens × blocks."""
        most = self._limit // 2
        return 0 if self._bytes_each * work > most else most

    def expected(self, work: int, tokens: int) -> int:
        """Bytes that a pass will keep, where even twice as much would be allowed; 0 if they must be counted.

        Counting takes 4 % of a pass, so it is left out where nothing depends on it; never for rows of more tokens
        than any that were counted, because some attentions keep the square of them.
        """
        if tokens > self._longest:
            return 0
        expected = int(self._bytes_each * work)
        return expected if 2 * expected <= self._limit // 2 else 0

    def too_much(self, work: int) -> None:
        """A pass needed more than its allowance."""
        self._bytes_each = max(self._bytes_each, 1.0 + self._limit / 2 / work)

    def put(self, peer: str, blocks: tuple[int, int], kept: KeptPass, work: int, tokens: int) -> str:
        """Keep a pass, at the cost of the peer's oldest ones and then of anybody's; its id."""
        self._bytes_each = kept.nbytes / work
        self._longest = max(self._longest, tokens)
        mine = [name for name, one in self._held.items() if one.peer == peer]
        while mine and kept.nbytes + sum(self._held[name].kept.nbytes for name in mine) > self._limit // 2:
            del self._held[mine.pop(0)]
        while self._held and kept.nbytes + self.nbytes > self._limit:
            del self._held[next(iter(self._held))]
        name = secrets.token_hex(16)
        self._held[name] = _Held(peer, blocks, kept, time.monotonic() + SECONDS)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SECONDS, self._forget_old)
        return name

    def take(self, name: str, peer: str, blocks: tuple[int, int]) -> KeptPass:
        """A pass of this peer, which is not kept any longer. `PeerRefusedError` if there is none."""
        held = self._held.get(name)
        if held is None or held.peer != peer or held.blocks != blocks:
            raise PeerRefusedError("this pass is not kept any more; send its inputs", code="forgotten")
        del self._held[name]
        return held.kept

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget_old(self) -> None:
        now = time.monotonic()
        for name in [name for name, one in self._held.items() if one.until <= now]:
            del self._held[name]
        self._timer = None
        if self._held:
            soonest = next(iter(self._held.values())).until
            self._timer = asyncio.get_running_loop().call_later(soonest - now, self._forget_old)
