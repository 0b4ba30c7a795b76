"""How long, and by whom, a part of a pass is tried again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.client.session import SessionOptions
from nbrunner.errors import BadPeerDataError, MissingBlocksError, PeerError, PeerRefusedError
from nbrunner.protocol.identity import short_peer
from nbrunner.swarm.directory import Directory, SwarmView
from nbrunner.swarm.routing import PlannedHop, plan_chain

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
        self._pending = pending
        self._model, self._options = model, options
        self._adapter = adapter.uid if adapter is not None else ""
        self._directory = directory
        self._deadline: float | None = None
        self._avoid: dict[str, float] = {}
        self._bad: set[str] = set()
        self._tried: list[str] = []
        self._failures = 0

    def succeeded(self, peer: str) -> None:
        """The next failure is the first again."""
        self._deadline = None
        self._failures = 0

    async def plan(self, start: int, end: int) -> Sequence[PlannedHop]:
        """Servers for these blocks, waited for if there are none; `MissingBlocksError` when the budget is over."""
        options = self._options
        missing: MissingBlocksError | None = None

        def possible(view: SwarmView) -> list[PlannedHop] | None:
            nonlocal missing
            try:
                return plan_chain(
                    view,
                    model=self._model,
                    start=start,
                    end=end,
                    mode="throughput",
                    allowed=options.allowed_peers,
                    blocked=options.blocked_peers,
                    exclude=self._avoided(),
                    adapter=self._adapter,
                    pending=self._pending,
                )
            except MissingBlocksError as error:
                missing = error
                return None

        plan = possible(self._directory.view)
        deadline = self._deadline or time.monotonic() + options.retry_budget
        while plan is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MissingBlocksError(
                    missing.blocks if missing is not None else [(start, end)],
                    model=self._model,
                    tried=[*(missing.tried if missing is not None else []), *self._tried[-8:]],
                ) from missing
            soonest = min(self._avoid.values(), default=float("inf")) - time.monotonic()
            try:
                plan = await self._directory.wait_for(possible, min(left, max(soonest, 0.05)))
            except TimeoutError:
                plan = possible(self._directory.view)
        return plan

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
            self._avoid[peer] = now + (getattr(error, "retry_after", None) or 2.0)
        else:
            self._directory.mark_failed(peer, str(error))
        if now > self._deadline:
            raise error
        self._failures += 1
        if self._failures > 1:  # the first replacement is tried at once; what keeps failing must not be hammered
            await asyncio.sleep(min(0.05 * 2**self._failures, 1.0))

    def _avoided(self) -> frozenset[str]:
        now = time.monotonic()
        return frozenset(peer for peer, until in self._avoid.items() if until > now)
