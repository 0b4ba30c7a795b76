"""Waiting for memory: who is full is not out. A bounded queue with a place and an estimate, for a bounded time.

Memory becomes free when a session ends, and when one that has been idle is dropped: its client rebuilds it from its
journal with the next step. So nobody is refused while others only hold memory without using it. A peer that has as
much as one may have waits for its own sessions, and holds nobody else up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.limits import Limits
from nbrunner.server.quotas import RETRY_FULL, Quotas

logger = logging.getLogger(__name__)

IDLE_SECONDS = 10.0
"""A session that has had no step for so long may be dropped when others want its memory."""

TELL_SECONDS = 2.0
"""Whoever waits is told its place this often; a client takes a server that is silent for ten seconds for dead."""

_REMEMBERED = 16

Tell = Callable[[int, float | None], Awaitable[None]]
"""Is given the place in the queue, from 1, and the seconds it may take, None if that cannot be said."""


class Droppable(Protocol):
    """A session, as far as its memory goes."""

    @property
    def peer(self) -> str:
        """Whose it is."""

    @property
    def idle_seconds(self) -> float:
        """Since its last step; 0 while it has one."""

    def drop(self) -> None:
        """Forget what it holds, which makes its memory free."""


@dataclass(eq=False)
class _Entry:
    peer: str
    holder: Hashable
    wanted: int
    growing: bool
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class WaitingRoom:
    """Gives out the memory that `Quotas` counts.

    Parameters
    ----------
    sessions
        All that are open, to choose from who is dropped.
    """

    def __init__(
        self,
        quotas: Quotas,
        limits: Limits,
        sessions: Callable[[], Iterable[Droppable]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas, self._limits, self._sessions, self._clock = quotas, limits, sessions, clock
        self._entries: list[_Entry] = []
        self._freed: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def waiting(self) -> int:
        return len(self._entries)

    async def reserve(
        self, peer: str, holder: Hashable, wanted: int, tell: Tell | None = None, *, growing: bool = False
    ) -> None:
        """Have ``wanted`` bytes in all counted for a holder, waiting for them if it must.

        Parameters
        ----------
        tell
            Is told of the waiting; without it, it is refused rather than waited for.
        growing
            A session that is under way; goes before those that have not begun, and the memory they would take.

        Raises
        ------
        PeerRefusedError
            Code ``full``: more than there is at all, too many waiting, or waited as long as is allowed.
        """
        if wanted > self._limits.cache_bytes:
            raise PeerRefusedError(
                f"a session of {wanted} bytes does not fit the {self._limits.cache_bytes} bytes of this server",
                code="full",
                retry_after=RETRY_FULL,
            )
        allowed = self._limits.peer_cache_bytes
        if allowed and wanted > allowed:
            raise PeerRefusedError(
                f"a session of {wanted} bytes is over the {allowed} bytes that you may have here",
                code="full",
                retry_after=RETRY_FULL,
            )
        entry = _Entry(peer, holder, wanted, growing)
        if self._is_next(entry) and self._make_room(entry):
            self._quotas.set_bytes(holder, wanted, peer=peer)
            return
        if tell is None:
            if self._blocked(entry):
                raise PeerRefusedError(
                    f"you have {self._quotas.bytes_of_peer(peer)} of the {allowed} bytes that you may have here, "
                    f"and ask for {wanted}: close a session first",
                    code="full",
                    retry_after=RETRY_FULL,
                )
            raise PeerRefusedError(
                f"no room for {wanted} bytes now: {self._quotas.bytes_left} of {self._limits.cache_bytes} are left",
                code="full",
                retry_after=RETRY_FULL,
            )
        self._admit(entry)
        self._entries.append(entry)
        self._entries.sort(key=lambda one: not one.growing)
        try:
            await self._wait(entry, tell)
            self._quotas.set_bytes(holder, wanted, peer=peer)
        finally:
            self._entries.remove(entry)
            self._wake()

    def freed(self) -> None:
        """Some memory has been given back."""
        self._freed.append(self._clock())
        self._wake()

    def _admit(self, entry: _Entry) -> None:
        """`PeerRefusedError` if nobody else can wait here now."""
        mine = sum(one.peer == entry.peer for one in self._entries)
        if mine >= self._limits.waiting or len(self._entries) >= 16 * self._limits.waiting:
            who = f"you wait for memory {mine} times" if mine else f"{len(self._entries)} wait for memory"
            raise PeerRefusedError(f"no room, and {who} here already", code="full", retry_after=RETRY_FULL)

    async def _wait(self, entry: _Entry, tell: Tell) -> None:
        deadline = self._clock() + self._limits.wait_seconds
        while True:
            await tell(self._place(entry), self._estimate(entry))
            try:
                async with asyncio.timeout(TELL_SECONDS):
                    await entry.wake.wait()
            except TimeoutError:
                pass
            entry.wake.clear()
            if self._is_next(entry) and self._make_room(entry):
                return
            if self._clock() >= deadline:
                raise PeerRefusedError(
                    f"no room for {entry.wanted} bytes came free in {self._limits.wait_seconds:.0f} s: "
                    f"{self._quotas.bytes_left} of {self._limits.cache_bytes} are left",
                    code="full",
                    retry_after=RETRY_FULL,
                )

    def _is_next(self, entry: _Entry) -> bool:
        """Whether nobody is before it who could be let in before it."""
        ahead = self._entries[: self._entries.index(entry)] if entry in self._entries else self._entries
        return not any((one.growing or not entry.growing) and not self._blocked(one) for one in ahead)

    def _blocked(self, entry: _Entry) -> bool:
        """Whether its own peer has too much."""
        return not self._quotas.peer_may_have(entry.peer, entry.holder, entry.wanted)

    def _make_room(self, entry: _Entry) -> bool:
        """Whether there is room, if need be by dropping idle sessions, the longest idle first."""
        mine = [one for one in self._sessions() if one.peer == entry.peer]
        if not self._drop_until(lambda: not self._blocked(entry), mine):
            return False
        return self._drop_until(lambda: self._quotas.room_for(entry.holder, entry.wanted), self._sessions())

    def _drop_until(self, enough: Callable[[], bool], sessions: Iterable[Droppable]) -> bool:
        if enough():
            return True
        idle = [one for one in sessions if one.idle_seconds >= IDLE_SECONDS]
        for session in sorted(idle, key=lambda one: -one.idle_seconds):
            session.drop()
            self._freed.append(self._clock())
            if enough():
                return True
        return False

    def _place(self, entry: _Entry) -> int:
        return self._entries.index(entry) + 1

    def _estimate(self, entry: _Entry) -> float | None:
        """From how often memory came free lately."""
        if not self._freed:
            return None
        mean = (self._clock() - self._freed[0]) / len(self._freed)
        return min(mean * self._place(entry), self._limits.wait_seconds)

    def _wake(self) -> None:
        """All of them: the first may be held back by what its own peer has."""
        for entry in self._entries:
            entry.wake.set()
