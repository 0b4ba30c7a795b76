"""Prompts that a peer's sessions have in common: computed once, held once. The event loop's side of it.

A long part of a session is addressed (`nbrunner.server.content`). If another session of the same peer holds the
same from position 0 on, its caches and outputs become this session's, and only what is different is computed. If
another one is just about to compute it, that is waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.steps import Step
from nbrunner.server.content import Content
from nbrunner.server.scheduler import Urgency
from nbrunner.server.session_memory import SHARED_TOKENS
from nbrunner.server.session_state import PartPlan

if TYPE_CHECKING:
    from nbrunner.server.session import ServerSession

logger = logging.getLogger(__name__)

INLINE_BYTES = 256 << 10
"""More than this is addressed in another thread: it would hold up the event loop for 0.2 ms and more."""


class PrefixSharing:
    """What one session does to share.

    Attributes
    ----------
    planned
        What the session holds once its part is computed; others may wait for it.
    over
        Set when a part that was planned is over, well or badly.
    """

    def __init__(self, session: ServerSession) -> None:
        self._session = session
        self.planned: Content | None = None
        self.over = asyncio.Event()

    def concerns(self, plan: PartPlan) -> bool:
        """Whether a part is worth looking at; steps of single tokens never are."""
        return plan.end - plan.begin >= SHARED_TOKENS and self._session.host.shares_prefixes

    async def begin(self, part: Step, tensors: Mapping[str, RawTensor], plan: PartPlan) -> PartPlan:
        """What is left to do of a part once everything is taken over that another session has of it."""
        content = self._session.memory.content.after(plan.ops) if plan.ops else self._session.memory.content
        if content.tokens != plan.begin:
            return plan
        if sum(raw.spec.nbytes for raw in tensors.values()) > INLINE_BYTES:
            following = await asyncio.to_thread(content.followed_by, part, tensors)
        else:
            following = content.followed_by(part, tensors)
        if following is None:
            return plan
        if not part.capture:  # the states between blocks are kept by nobody
            plan = await self._take_over(following, plan)
        # Only now, so that nobody waits for a session that waits itself.
        self.planned = following
        return plan

    def end(self) -> None:
        """The part is over: what has been planned is held now, or will not be."""
        planned, self.planned = self.planned, None
        if planned is not None and self._session.state.length == planned.tokens:
            self._session.memory.content = planned
        self.over.set()
        self.over = asyncio.Event()

    async def _take_over(self, content: Content, plan: PartPlan) -> PartPlan:
        session = self._session
        while True:
            held, source = self._longest(content, planned=False)
            coming, busy = self._longest(content, planned=True)
            if max(held, coming) <= plan.begin or max(held, coming) < SHARED_TOKENS:
                return plan
            if busy is not None and coming > held:
                await busy.sharing.over.wait()
                continue
            if source is not None and await self._start_like(source, content, plan, held):
                session.host.traffic.note(session.stream.peer, held - plan.begin, plan.batch)
                done = replace(plan, end=held)
                session.state.applied(done)
                session.state.computed(done)
                logger.debug("session %s: %d tokens as in session %s", session.id[:8], held, source.id[:8])
                part_begin = plan.begin - plan.offset
                return replace(plan, ops=(), begin=held, offset=held - part_begin)
            if source is None or source.memory.content.common(content) >= held:
                return plan

    def _longest(self, content: Content, *, planned: bool) -> tuple[int, ServerSession | None]:
        """The session of this peer that holds, or will hold, the most of this."""
        best: tuple[int, ServerSession | None] = (0, None)
        me = self._session
        for other in me.host.sessions.values():
            if other is not me and other.stream.peer == me.stream.peer:
                theirs = other.sharing.planned if planned else other.memory.content
                common = 0 if theirs is None else content.common(theirs)
                if common > best[0]:
                    best = (common, other)
        return best

    async def _start_like(self, source: ServerSession, content: Content, plan: PartPlan, tokens: int) -> bool:
        """Whether it could be done: the other may have lost it by now, or there is no memory to move it."""
        mine, theirs = self._session.memory, source.memory

        def start() -> int | None:
            if theirs.content.common(content) < tokens:
                return None
            with torch.inference_mode():
                try:
                    mine.start_like(theirs, tokens)
                except (MemoryError, torch.OutOfMemoryError):
                    return None
            return theirs.nbytes

        done = await self._session.host.compute.submit(start, Urgency.PREFILL, peer=self._session.stream.peer)
        if done.value is None:
            return False
        mine.content = content.upto(tokens)
        source.count_bytes(theirs, done.value)
        self._session.count_bytes(mine, 0)
        return True
