"""How long, and by whom, a part of a pass is tried again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.client.candidates import Candidates, SessionOptions
from nbrunner.errors import BadPeerDataError, PeerError, PeerRefusedError
from nbrunner.protocol.identity import short_peer
from nbrunner.swarm.directory import Directory
from nbrunner.swarm.routing import PlannedHop

logger = logging.getLogger(__name__)

FINAL_CODES = frozenset({"credential", "role", "version"})
"""Refusals that no other server would answer differently."""

BUSY_CODES = frozenset({"full", "draining", "limit"})
"""Refusals that say nothing bad about the server."""


class Retry:
    """One part of a pass, until it succeeds or the budget is over. The clock starts at the first failure."""

    def __init__(
        self,
        directory: Directory,
        model: str,
        options: SessionOptions,
        adapter: SpanAdapter | None,
        pending: Mapping[str, int],
    ) -> None:
        self._options = options
        self._directory = directory
        self._candidates = Candidates(
            directory,
            model,
            options,
            adapter=adapter.uid if adapter is not None else "",
            mode="throughput",
            pending=pending,
        )
        self._deadline: float | None = None
        self._bad: set[str] = set()
        self._tried: list[str] = []
        self._failures = 0

    def succeeded(self, peer: str) -> None:
        """The next failure is the first again."""
        self._deadline = None
        self._failures = 0

    async def plan(self, start: int, end: int) -> Sequence[PlannedHop]:
        """Servers for these blocks, waited for if there are none; `MissingBlocksError` when the budget is over."""
        deadline = self._deadline or time.monotonic() + self._options.retry_budget
        return await self._candidates.chain(start, end, deadline=deadline, tried=lambda: self._tried[-8:])

    async def failed(self, peer: str, error: PeerError) -> None:
        """Take note of a failure; raises if it makes no sense to go on."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._options.retry_budget
        self._tried.append(f"{short_peer(peer)}: {error}")
        logger.info("request to %s failed: %s", short_peer(peer), error)
        code = error.code if isinstance(error, PeerRefusedError) else ""
        if code in FINAL_CODES or (code == "limit" and not getattr(error, "retry_after", None)):
            raise error
        if isinstance(error, BadPeerDataError) or code in ("schema", "data"):
            self._bad.add(peer)
            if len(self._bad) > 1:
                raise error
        if code in BUSY_CODES:
            self._candidates.avoid(peer, getattr(error, "retry_after", None) or 2.0)
        else:
            self._directory.mark_failed(peer, str(error))
        if now > self._deadline:
            raise error
        self._failures += 1
        if self._failures > 1:  # the first replacement is tried at once; what keeps failing must not be hammered
            await asyncio.sleep(min(0.05 * 2**self._failures, 1.0))
