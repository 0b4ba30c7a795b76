"""Keeping the server's record in the directory true."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from nbrunner.errors import NBRunnerError
from nbrunner.protocol.records import ServerRecord, ServerState
from nbrunner.server.host import Host
from nbrunner.swarm.directory import Directory
from nbrunner.swarm.node import Node
from nbrunner.swarm.view import SwarmView

logger = logging.getLogger(__name__)

PERIOD = 20.0
LIFETIME = 60.0
"""Three announcements may be lost before others forget us."""

QUIET_SECONDS = 3.0
"""Sessions come and go by the second; the record need not follow each of them."""

_MAX_ROUND_TRIPS = 16


class Announcer:
    """Publishes the record every 20 s, and soon after something in it has changed."""

    def __init__(self, node: Node, base: ServerRecord) -> None:
        self._node = node
        self._base = base
        self._host: Host | None = None
        self._directory: Directory | None = None
        self._state: ServerState = "joining"
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._notes: tuple[str, ...] = ()

    @property
    def state(self) -> ServerState:
        return self._state

    def attach(self, host: Host, directory: Directory | None) -> None:
        """From now on the record tells what the host measures, and round trips from the directory."""
        self._host, self._directory = host, directory

    def record(self) -> ServerRecord:
        """The record as of now."""
        fields: dict[str, object] = {"state": self._state}
        host = self._host
        if host is not None:
            fields |= {
                "step_seconds": min(host.step_seconds, 86400.0),
                "prefill_tokens_per_second": host.speed.prefill_tokens_per_second,
                "queue_seconds": min(host.queue_seconds, 86400.0),
                "cache_bytes_left": host.quotas.bytes_left,
                "cache_bytes_per_token": int(host.bytes_per_token),
                "sessions": host.quotas.sessions,
                "adapters": host.served.uids,
            }
        if self._notes:
            fields["features"] = [*self._base.features, *self._notes]
        fields["round_trips"] = self._round_trips()
        return _replace(self._base, fields)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="announce")

    async def set_state(self, state: ServerState, *notes: str) -> bool:
        """Change the state and publish at once; False if no node took the record.

        ``notes`` are added to the record's features while the state lasts.
        """
        self._state, self._notes = state, notes
        return await self._publish()

    def changed(self) -> None:
        """Something in the record is different now."""
        self._changed.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        published = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(PERIOD):
                    await self._changed.wait()
                    await asyncio.sleep(max(0.0, QUIET_SECONDS - (time.monotonic() - published)))
            except TimeoutError:
                pass
            self._changed.clear()
            published = time.monotonic()
            await self._publish()

    async def _publish(self) -> bool:
        try:
            stored = await self._node.publish(self.record(), lifetime=LIFETIME)
        except NBRunnerError as error:
            stored = False
            if not self._failing:
                logger.warning("could not announce this server: %s", error)
        if stored and self._failing:
            logger.info("announced again")
        self._failing = not stored
        return stored

    def successors(self, view: SwarmView) -> list[str]:
        """Peers that could come after us in a chain."""
        base = self._base
        return [
            peer
            for peer, entry in view.servers.items()
            if peer != self._node.peer_id
            and entry.record.model == base.model
            and entry.record.start <= base.end < entry.record.end
        ]

    def _round_trips(self) -> dict[str, float]:
        """Seconds to them, the nearest first."""
        if self._directory is None:
            return {}
        view = self._directory.view
        trips = [(view.servers[peer].round_trip, peer) for peer in self.successors(view)]
        known = sorted((seconds, peer) for seconds, peer in trips if seconds is not None)
        return {peer: seconds for seconds, peer in known[:_MAX_ROUND_TRIPS]}


def _replace(record: ServerRecord, fields: dict[str, object]) -> ServerRecord:
    changed: ServerRecord = msgspec.structs.replace(record, **fields)
    return changed
