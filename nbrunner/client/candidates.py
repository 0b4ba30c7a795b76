"""Servers that may be asked now: those the swarm knows, less those that a session or request avoids for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from nbrunner.errors import MissingBlocksError
from nbrunner.swarm.directory import Directory, SwarmView
from nbrunner.swarm.routing import Mode, PlannedHop, plan_chain


@dataclass(frozen=True)
class SessionOptions:
    """How a session chooses servers and how long it tries.

    Attributes
    ----------
    allowed_peers, blocked_peers
        PeerIDs to which the chain is limited, or which it must avoid.
    retry_budget
        Seconds from the first failure of a step until it is given up.
    in_8bit
        Hidden states of sessions travel with 8 bits a number, between those who understand that.
    """

    allowed_peers: Collection[str] | None = None
    blocked_peers: Collection[str] | None = None
    retry_budget: float = 30.0
    in_8bit: bool = False


class Candidates:
    """Servers for blocks of one model, on behalf of one session or request.

    Parameters
    ----------
    model
        Uid of the checkpoint that servers must serve.
    adapter
        Uid of an adapter that they must serve; empty for none.
    mode
        See `plan_chain`.
    pending
        See `plan_chain`; read anew at each plan.

    Attributes
    ----------
    full : set of str
        Those of the avoided that said they have no room. Where nobody else is left they are asked again, and waited
        for.
    """

    def __init__(
        self,
        directory: Directory,
        model: str,
        options: SessionOptions,
        *,
        adapter: str = "",
        mode: Mode = "latency",
        pending: Mapping[str, int] | None = None,
    ) -> None:
        self.full: set[str] = set()
        self._directory = directory
        self._model, self._options, self._adapter = model, options, adapter
        self._mode: Mode = mode
        self._pending = pending
        self._avoided: dict[str, float] = {}

    def avoid(self, peer: str, seconds: float) -> None:
        """Leave a server alone for a while."""
        self._avoided[peer] = time.monotonic() + seconds

    def others(self, peer: str, start: int, end: int, *, cache_tokens: int = 0, with_room: bool = True) -> bool:
        """Whether others could take a server's blocks, as far as we know.

        Parameters
        ----------
        with_room
            And have not said that they are full, nor are avoided for another reason.
        """
        without = {peer} | (self._now_avoided() | self.full if with_room else set())
        try:
            self._chain(self._directory.view, start, end, without, cache_tokens)
        except MissingBlocksError:
            return False
        return True

    async def chain(
        self, start: int, end: int, *, deadline: float, tried: Callable[[], Sequence[str]], cache_tokens: int = 0
    ) -> Sequence[PlannedHop]:
        """Servers for blocks ``[start, end)``, in order; waits for them until ``deadline`` (`time.monotonic`).

        Raises
        ------
        MissingBlocksError
            Blocks that nobody had; it says what was ``tried``.
        """
        missing: MissingBlocksError | None = None

        def possible(view: SwarmView) -> list[PlannedHop] | None:
            nonlocal missing
            avoided = self._now_avoided()
            for without in (avoided, avoided - self.full) if avoided & self.full else (avoided,):
                try:
                    return self._chain(view, start, end, without, cache_tokens)
                except MissingBlocksError as error:
                    missing = error
            return None

        plan = possible(self._directory.view)
        while plan is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MissingBlocksError(
                    missing.blocks if missing is not None else [(start, end)],
                    model=self._model,
                    tried=[*(missing.tried if missing is not None else []), *tried()],
                ) from missing
            soonest = min(self._avoided.values(), default=float("inf")) - time.monotonic()
            try:
                plan = await self._directory.wait_for(possible, min(left, max(soonest, 0.05)))
            except TimeoutError:
                plan = possible(self._directory.view)
        return plan

    def _chain(
        self, view: SwarmView, start: int, end: int, without: Collection[str], cache_tokens: int
    ) -> list[PlannedHop]:
        return plan_chain(
            view,
            model=self._model,
            start=start,
            end=end,
            mode=self._mode,
            allowed=self._options.allowed_peers,
            blocked=self._options.blocked_peers,
            exclude=frozenset(without),
            adapter=self._adapter,
            cache_tokens=cache_tokens,
            pending=self._pending,
        )

    def _now_avoided(self) -> set[str]:
        now = time.monotonic()
        return {peer for peer, until in self._avoided.items() if until > now}
