"""One inference session on this server: its caches, its transcript, and the parts that go through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.cache import buffer_tokens
from nbrunner.blocks.edits import Edits
from nbrunner.errors import BadPeerDataError, PeerRefusedError, UserInputError
from nbrunner.protocol.credentials import Terms
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.refusals import RefusalCode
from nbrunner.protocol.sessions import CloseSession, Draining, OpenSession, Queued, Relink, Relinked, SessionOpened
from nbrunner.protocol.status import Ping, Pong
from nbrunner.protocol.steps import HopTiming, Step, StepFailed
from nbrunner.server.compute import Done
from nbrunner.server.content import Content
from nbrunner.server.inputs import sizes
from nbrunner.server.outgoing import Outgoing
from nbrunner.server.scheduler import Urgency
from nbrunner.server.session_memory import SessionMemory
from nbrunner.server.session_state import PartPlan, PartRefusedError, SessionState
from nbrunner.server.sharing import PrefixSharing
from nbrunner.server.stepping import PartWork
from nbrunner.swarm.streams import Stream

if TYPE_CHECKING:
    from nbrunner.server.host import Host

logger = logging.getLogger(__name__)

DECODE_TOKENS = 16
"""Parts of at most this many tokens × rows go before longer ones: somebody is waiting for each of them."""

NO_CACHE = "this family of models keeps no caches, so it has no sessions: send whole sequences (use_cache=False)"


class _SessionBrokenError(PeerRefusedError):
    """The session cannot go on here."""


@dataclass
class _Arrived:
    """A part that waits, where it came from (None: the client), and when."""

    part: Step
    tensors: Mapping[str, RawTensor]
    source: str | None
    at: float


@dataclass(eq=False)
class ServerSession:
    """A session that a client has opened here; `run` serves it until its stream ends.

    Everything here runs in the event loop. Caches and transcript are touched by `PartWork` only, in the compute
    thread, while this session waits for it.
    """

    host: Host
    stream: Stream
    request: OpenSession
    content: Content
    edits: Edits | None = None
    adapter: SpanAdapter | None = None
    state: SessionState = field(init=False)
    attached: set[Stream] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        limits = self.host.limits
        self.id = self.request.session
        self.terms = self.stream.terms or Terms()
        self.upstream = self.request.upstream
        self.state = SessionState(
            self.request.start,
            self.request.end,
            max_tokens=limits.session_tokens,
            max_batch=limits.batch,
            max_part=limits.part_tokens,
        )
        self.memory = self._empty_memory()
        self.sharing = PrefixSharing(self)
        self._capacity = 0
        self._shared_before = 0
        self._captures: list[tuple[int, torch.Tensor]] = []
        self._parts: asyncio.Queue[_Arrived] = asyncio.Queue()
        self._busy = False
        self._last_step = time.perf_counter()
        blocks = (self.request.start, self.request.end)
        self._out = Outgoing(self.host.node, self.stream, self.id, blocks, in_8bit=self.request.in_8bit)
        self._ended = False

    # -- the client's stream -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the client closes the stream or the connection ends; then nothing of the session is left."""
        worker = asyncio.create_task(self._work(), name=f"session-{self.id[:8]}")
        reader = asyncio.create_task(self._read(), name=f"session-read-{self.id[:8]}")
        try:
            await self.stream.send(SessionOpened(self.id, self.host.croppable))
            done, _ = await asyncio.wait({worker, reader}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._ended = True
            for task in (worker, reader):
                task.cancel()
            await asyncio.gather(worker, reader, return_exceptions=True)
            await self._out.close()
            for stream in self.attached:
                stream.close()
            self.sharing.end()
            self.host.compute.session_ended(self.id)
            self._forget()
            self.host.room.freed()

    async def _read(self) -> None:
        while True:
            message, tensors = await self.stream.receive()
            if isinstance(message, Step):
                self.accept(message, tensors, None)
            elif isinstance(message, Ping):
                busy = self._busy or not self._parts.empty()
                await self.stream.send(Pong(message.nonce, self.state.step, self.state.length, busy))
            elif isinstance(message, Relink):
                self.upstream = message.upstream
                for stream in [one for one in self.attached if one.peer != self.upstream]:
                    stream.close()
                await self.stream.send(Relinked())
            elif isinstance(message, CloseSession):
                return
            else:
                raise PeerRefusedError(
                    f"{type(message).__name__} has no place in a session", code="schema", peer=self.stream.peer
                )

    def accept(self, part: Step, tensors: Mapping[str, RawTensor], source: str | None) -> None:
        """Queue a part from the client (``source`` None) or from the upstream server."""
        arrived = _Arrived(part, tensors, source, time.perf_counter())
        if self._parts.qsize() >= self.host.limits.pending_parts:
            self._fail(arrived, "limit", f"{self.host.limits.pending_parts} parts wait here already")
        else:
            self._parts.put_nowait(arrived)

    async def announce_draining(self, seconds: float) -> None:
        """Tell the client to move."""
        await self.stream.send(Draining(seconds))

    # -- parts ---------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            arrived = await self._parts.get()
            self._busy = True
            try:
                await self._take_part(arrived)
            except PartRefusedError as refusal:
                self._fail(arrived, refusal.code, refusal.reason, refusal.peer)
            except BadPeerDataError as error:
                self._fail(arrived, "data", str(error), arrived.source)
            except _SessionBrokenError:
                raise
            except PeerRefusedError as refusal:
                self._fail(arrived, "limit", str(refusal))
            finally:
                self._busy = False
                if self.sharing.planned is not None:
                    self.sharing.end()
                self._last_step = time.perf_counter()

    async def _take_part(self, arrived: _Arrived) -> None:
        part = arrived.part
        if arrived.source is not None and arrived.source != self.upstream:
            return
        me = part.route[0]
        if (me.peer, me.session) != (self.host.peer_id, self.id):
            raise PartRefusedError("session", f"a step for session {me.session} of peer {short_peer(me.peer)}")
        batch, tokens = sizes(arrived.tensors)
        plan = self.state.plan(part, tokens=tokens, batch=batch)
        if plan is None:
            return
        if not self.memory.cache.croppable and any(
            op.kind == "crop" and 0 < op.count < self.state.length for op in plan.ops
        ):
            raise PartRefusedError("position", "these caches cannot be rolled back; reset them and send all again")
        self._out.choose_link(part)
        timing = HopTiming(self.host.peer_id, 0.0, 0.0, 0.0)
        captured: list[tuple[int, torch.Tensor]] = []
        if part.capture and plan.new_attempt and not plan.new_step:
            captured += self._captures  # what an earlier attempt computed is not computed again
        if plan.new_step:
            self._captures.clear()
        if self.sharing.concerns(plan):
            plan = await self.sharing.begin(part, arrived.tensors, plan)
        work: PartWork | None = None
        if plan.ops or plan.begin < plan.end:
            work, done = await self._run_plan(arrived, plan)
            timing = HopTiming(self.host.peer_id, done.queue, done.compute, time.perf_counter() - arrived.at)
            if work.captured is not None:
                self._captures.append((plan.begin, work.captured))
                captured.append(self._captures[-1])
        else:
            self.state.applied(plan)
        self.state.passed_on(plan)
        held = self.memory.transcript.window(plan.send_from, plan.send_to)
        await self._out.pass_on(part, plan, held, arrived.tensors, timing, captured)
        if work is not None and self.host.is_brief(batch):
            self.host.compute.before_next(self.id, work.prepare_next)

    async def _run_plan(self, arrived: _Arrived, plan: PartPlan) -> tuple[PartWork, Done[None]]:
        host, peer, tokens = self.host, self.stream.peer, plan.end - plan.begin
        wait = host.quotas.wait_seconds(peer, self.terms)
        if wait:
            await asyncio.sleep(wait)
        host.quotas.spend(peer, self.terms, tokens * plan.batch)
        await self._reserve(plan, capture=arrived.part.capture)
        work = PartWork(
            host,
            self.memory,
            arrived.part,
            plan,
            arrived.tensors,
            ended=lambda: self._ended,
            edits=self.edits,
            adapter=self.adapter,
        )
        urgency = Urgency.DECODE if tokens * plan.batch <= DECODE_TOKENS else Urgency.PREFILL
        try:
            brief = urgency is Urgency.DECODE and host.is_brief(tokens * plan.batch)
            done = await host.compute.submit_part(work, urgency, peer=peer, session=self.id, brief=brief)
        except BadPeerDataError:
            raise  # found before anything was changed
        except UserInputError as error:
            if not work.applied or work.started:
                raise await self._broken(arrived, error) from error
            self.state.applied(plan)  # the span refused the tokens and left its caches alone
            raise PartRefusedError("data", str(error)) from None
        except Exception as error:
            raise await self._broken(arrived, error) from error
        self.state.applied(plan)
        if work.computed:
            self.state.computed(plan)
            host.traffic.note(self.stream.peer, tokens, plan.batch)
            if (self.state.start, self.state.end) == (host.span.start, host.span.end):
                host.note_step(tokens * plan.batch, done)
        self.count_bytes(self.memory, work.held_bytes)
        return work, done

    async def _broken(self, arrived: _Arrived, error: Exception) -> PeerRefusedError:
        """Caches are filled in some layers and not in others: tell the client, which rebuilds them elsewhere."""
        logger.error("session %s: a step failed", self.id[:8], exc_info=error)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        code: RefusalCode = "full" if full else "internal"
        reason = f"the step failed here: {type(error).__name__}: {str(error)[:500]}"
        await self._out.tell_now(StepFailed(arrived.part.step, arrived.part.attempt, code, reason))
        return _SessionBrokenError(reason, code=code)

    async def _reserve(self, plan: PartPlan, *, capture: bool) -> None:
        """Have the bytes that a part will need counted before they are allocated; waits for them if it must.

        A session that holds nothing yet, and whose client did not say that it waits, is refused instead: it is as
        well off on another server.
        """
        shared, freezing = self.memory.expected(plan.ops)
        own = plan.end - shared
        if shared != self._shared_before:
            self._capacity, self._shared_before = 0, shared
        capacity = buffer_tokens(own) if own > self._capacity else self._capacity
        share = (self.state.end - self.state.start) / (self.host.span.end - self.host.span.start)
        per_token = self.host.speed.cache_bytes_per_token * share + self.host.form.token_bytes
        row_bytes = self.host.speed.cache_bytes_fixed * share + per_token * capacity
        wanted = int(row_bytes * plan.batch + per_token * freezing)
        if capture:
            blocks = self.state.end - self.state.start
            tokens = (plan.end - plan.begin) * plan.batch
            wanted += self._captured_bytes() + blocks * tokens * self.host.form.token_bytes
        if wanted > self.host.quotas.bytes_of(self.id):
            begun = self.state.length > 0
            tell = self._tell_place if begun or self.request.wait else None
            try:
                await self.host.room.reserve(self.stream.peer, self.id, wanted, tell, growing=begun)
            except PeerRefusedError as refusal:
                rows = f" × {plan.batch} rows" if plan.batch > 1 else ""
                raise PartRefusedError("full", f"{plan.end} tokens{rows}: {refusal}") from None
        else:
            self.host.quotas.set_bytes(self.id, wanted, peer=self.peer)
        self._capacity = capacity

    async def _tell_place(self, place: int, seconds: float | None) -> None:
        await self._out.tell_now(Queued(place, seconds))

    # -- its memory, when others want it -------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """Whose it is."""
        return self.stream.peer

    @property
    def idle_seconds(self) -> float:
        """Since its last step; 0 while it has one, or holds nothing that could be dropped."""
        if self._busy or not self._parts.empty() or not self.state.length:
            return 0.0
        return time.perf_counter() - self._last_step

    def drop(self) -> None:
        """Forget caches and transcript. The client's next step is refused, and rebuilds them from its journal."""
        logger.info("session %s: idle for %.0f s, dropped to make room", self.id[:8], self.idle_seconds)
        self._forget()
        self.state.dropped()

    def count_bytes(self, memory: SessionMemory, held: int) -> None:
        """Have it counted what a memory holds, unless the session has another one by now, or has ended."""
        if memory is self.memory and not self._ended:
            self.host.quotas.set_bytes(self.id, held + self._captured_bytes(), peer=self.peer)

    def _forget(self) -> None:
        self.memory = self._empty_memory()
        self._captures.clear()
        self._capacity = 0
        self.host.quotas.set_bytes(self.id, 0)

    def _empty_memory(self) -> SessionMemory:
        cache = self.host.span.new_cache(self.request.start, self.request.end)
        if cache is None:
            raise PeerRefusedError(NO_CACHE, code="model")
        return SessionMemory(cache, self.content, self.host.frozen, self.peer)

    def _captured_bytes(self) -> int:
        return sum(states.numel() * states.element_size() for _, states in self._captures)

    def _fail(self, arrived: _Arrived, code: RefusalCode, reason: str, peer: str | None = None) -> None:
        part = arrived.part
        self.state.fail(part)
        logger.info("session %s: step %d refused (%s): %s", self.id[:8], part.step, code, reason)
        self._out.tell(StepFailed(part.step, part.attempt, code, reason[:2000], peer))
