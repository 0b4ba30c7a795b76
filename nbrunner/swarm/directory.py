"""The directory: who serves what, as far as this process knows, kept up to date in the background.

What happens to us counts at once: a peer that failed leaves the view in the moment it is reported, not when the
next records come. It returns when it has both announced itself again and answered a ping. The first would be enough
for a peer that was lost to others too; the second keeps out one that announces itself but that we cannot reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nbrunner.errors import NBRunnerError, PeerError
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.node import Node
from nbrunner.swarm.pings import RoundTrips
from nbrunner.swarm.view import ServerEntry, SwarmView

__all__ = ["Directory", "ServerEntry", "SwarmView"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_BAN_SECONDS = 15.0  # doubled each time the same peer fails again
_MAX_BAN_SECONDS = 300.0
_FORGIVEN_SECONDS = 300.0  # without a failure, after which the count begins again
_LINK_SECONDS = 60.0
_PINGS_PER_REFRESH = 4
_PING_PERIOD = 20.0
_HURRY_PERIOD = 0.5  # between refreshes while somebody waits for a change
_ROUND_TRIP_KNOWN_SECONDS = 120.0


@dataclass
class _Failure:
    reason: str
    count: int
    at: float  # monotonic, as until
    until: float
    expires: float  # of the record it had then, unix seconds
    started: float


@dataclass(frozen=True)
class _Known:
    record: ServerRecord
    expires: float


class Directory:
    """The servers of a node's swarm.

    Parameters
    ----------
    node
        Through which to ask.
    refresh
        Seconds between refreshes.
    targets
        Which peers to measure round trips to, given a view; all servers by default. A server passes those that
        could come after it in a chain.
    """

    def __init__(
        self,
        node: Node,
        *,
        refresh: float = 5.0,
        targets: Callable[[SwarmView], Sequence[str]] | None = None,
    ) -> None:
        self._node = node
        self._period = refresh
        self._targets = targets or (lambda view: list(view.servers))
        self._trips = RoundTrips(node)
        self._known: dict[str, _Known] = {}
        self._failures: dict[str, _Failure] = {}
        self._past_failures: dict[str, _Failure] = {}
        self._bad_links: dict[tuple[str, str], float] = {}
        self._heard_at = float("-inf")
        self._heard = 0
        self._updated = 0.0
        self._view = SwarmView()
        self._news = asyncio.Event()
        self._wake = asyncio.Event()
        self._waiting = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._runner: asyncio.Task[None] | None = None
        self._pings: dict[str, asyncio.Task[None]] = {}

    @property
    def view(self) -> SwarmView:
        """What is known now; never changes, a newer one takes its place."""
        return self._view

    async def start(self) -> None:
        """Fetch the records once and keep them fresh from then on."""
        await self.refresh()
        self._runner = asyncio.create_task(self._run(), name="directory")

    async def close(self) -> None:
        tasks = [task for task in (self._runner, self._refreshing, *self._pings.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._trips.close()

    # -- what happened to others' requests ------------------------------------------------------------------------

    def mark_failed(self, peer: str, reason: str) -> None:
        """A peer did not do what it was asked: take it out of the view now."""
        now = time.monotonic()
        if peer not in self._failures:
            past = self._past_failures.get(peer)
            count = past.count + 1 if past is not None and now - past.at < _FORGIVEN_SECONDS else 1
            ban = min(_BAN_SECONDS * 2 ** (count - 1), _MAX_BAN_SECONDS)
            known = self._known.get(peer)
            self._failures[peer] = _Failure(
                reason=reason[:500],
                count=count,
                at=now,
                until=now + ban,
                expires=known.expires if known else 0.0,
                started=known.record.started if known else 0.0,
            )
            logger.info("peer %s failed: %s", short_peer(peer), reason)
        self._trips.forget(peer)
        self._rebuild()

    def mark_link_failed(self, near: str, far: str) -> None:
        """``near`` could not reach ``far``; for a while chains do not push from one to the other."""
        self._bad_links[near, far] = time.monotonic() + _LINK_SECONDS
        self._rebuild()

    # -- asking ---------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Fetch the records now. Calls at the same time share one fetch."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh(), name="directory-refresh")
        # Shielded: one caller's cancellation must not take the fetch from the others.
        await asyncio.shield(self._refreshing)

    async def wait_for(self, condition: Callable[[SwarmView], T | None], timeout: float) -> T:
        """Wait until a view satisfies a condition, and return what the condition returned.

        While somebody waits, records are fetched twice a second.

        Raises
        ------
        TimeoutError
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                while True:
                    news = self._news
                    value = condition(self._view)
                    if value is not None:
                        return value
                    self._wake.set()
                    await news.wait()
        finally:
            self._waiting -= 1

    async def measure(self, peer: str, timeout: float = 3.0) -> float:
        """Ping a peer now; the round trip in seconds. `PeerError` if it does not answer."""
        seconds = await self._trips.measure(peer, timeout)
        self._heard_at = time.monotonic()
        self._forgive(peer)
        self._rebuild()
        return seconds

    # -- in the background ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            period = _HURRY_PERIOD if self._waiting else self._period
            rest = self._refreshed_at + period - time.monotonic()
            if rest > 0:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest):
                        await self._wake.wait()
                        continue
            try:
                await self.refresh()
            except NBRunnerError as error:
                logger.debug("no fresh records: %s", error)
                self._refreshed_at = time.monotonic()
                if self._node.closed:
                    return

    async def _refresh(self) -> None:
        held, heard = await self._node.fetch_held()
        self._refreshed_at = time.monotonic()
        self._updated, self._heard = time.time(), heard
        if heard:
            self._heard_at = self._refreshed_at
        for peer, (record, expires) in held.items():
            known = self._known.get(peer)
            if known is None or expires > known.expires:
                self._known[peer] = _Known(record, expires)
        self._rebuild()
        self._start_pings()

    def _rebuild(self) -> None:
        """Make a new view of what is known, and wake who waits for one."""
        now, wall = time.monotonic(), time.time()
        self._known = {peer: known for peer, known in self._known.items() if known.expires > wall}
        self._bad_links = {link: until for link, until in self._bad_links.items() if until > now}
        self._failures = {
            peer: failure
            for peer, failure in self._failures.items()
            if peer in self._known or now - failure.at < _FORGIVEN_SECONDS
        }
        self._past_failures = {
            peer: failure
            for peer, failure in self._past_failures.items()
            if now - failure.at < 2 * _FORGIVEN_SECONDS
        }
        servers: dict[str, ServerEntry] = {}
        failed: dict[str, ServerEntry] = {}
        for peer, known in self._known.items():
            if known.record.state == "offline":
                self._trips.forget(peer)
                continue
            failure = self._failures.get(peer)
            stale = self._trips.age(peer) > _ROUND_TRIP_KNOWN_SECONDS
            entry = ServerEntry(
                known.record,
                known.expires,
                None if stale else self._trips.get(peer),
                wall + failure.until - now if failure else 0.0,
                failure.reason if failure else "",
            )
            (failed if failure else servers)[peer] = entry
        self._view = SwarmView(servers, failed, frozenset(self._bad_links), self._heard, self._updated)
        self._news.set()
        self._news = asyncio.Event()

    def _start_pings(self) -> None:
        """Ping a few: first those that may come back, then those never measured, then the longest not measured."""
        back = [peer for peer in self._view.failed if self._may_return(peer)]
        due = [
            peer
            for peer in self._targets(self._view)
            if peer != self._node.peer_id and self._trips.age(peer) > _PING_PERIOD
        ]
        due.sort(key=lambda peer: -self._trips.age(peer))
        for peer in [*back, *due]:
            if len(self._pings) >= _PINGS_PER_REFRESH:
                break
            if peer not in self._pings:
                task = asyncio.create_task(self._ping(peer), name=f"ping-{peer[-6:]}")
                self._pings[peer] = task
                task.add_done_callback(lambda _, peer=peer: self._pings.pop(peer, None))  # type: ignore[misc]

    async def _ping(self, peer: str) -> None:
        began = time.monotonic()
        try:
            await self.measure(peer)
        except PeerError as error:
            if peer in self._failures:
                self._failures[peer].until = time.monotonic() + _BAN_SECONDS
            elif self._heard_at >= began - self._period:
                # Somebody else was heard meanwhile, so it is this peer and not our own connection.
                self.mark_failed(peer, str(error))
            else:
                self._rebuild()
        except NBRunnerError as error:
            logger.debug("no ping: %s", error)

    def _may_return(self, peer: str) -> bool:
        failure, known = self._failures.get(peer), self._known.get(peer)
        if failure is None or known is None or known.expires <= failure.expires:
            return False
        return known.record.started != failure.started or time.monotonic() >= failure.until

    def _forgive(self, peer: str) -> None:
        if self._may_return(peer):
            self._past_failures[peer] = self._failures.pop(peer)
            logger.info("peer %s is back", short_peer(peer))
