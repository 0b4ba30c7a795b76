"""An inference session over a chain of servers that survives the loss of any of them.

`ChainSession` joins the pure `Journal` (what must be sent) and the `History` (the tensors) to the network. One
`step` is tried until it succeeds or the retry budget is over: a try fills the gaps of the chain, sends the step
along it, and waits for the answers; what goes wrong is pinned on one peer, which leaves the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.client.adapters import AdapterSender
from nbrunner.client.candidates import Candidates, SessionOptions
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.history import History, Snapshot
from nbrunner.client.hop import Arrival, HopStream, Inbox
from nbrunner.client.journal import ChainHop, Journal, PendingStep, Segment
from nbrunner.client.reroute import queued_in_words
from nbrunner.client.travel import Receiver, StepOutput, send_segment
from nbrunner.errors import (
    BadPeerDataError,
    MissingBlocksError,
    PeerError,
    PeerRefusedError,
    PeerUnreachableError,
    SessionError,
)
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.sessions import Draining, OpenSession, Queued
from nbrunner.protocol.steps import CacheOp, HopTiming, StepFailed

logger = logging.getLogger(__name__)

PING_SECONDS = 2.0
"""A server whose event loop is silent for this long is taken for dead. Its compute thread may take any time."""

FIRST_CHECK_SECONDS = 1.0
"""How long a step may take before the hops are pinged; longer if the last ones took longer."""

QUEUE_AVOID_SECONDS = 5.0
"""How long a server that made a step wait for memory is left alone when another has room."""

LEAVING_SECONDS = 60.0
"""How long a server that said it leaves is not chosen again."""

RESERVE_TOKENS = 256
"""Room a server should have beyond the tokens known, when a chain is chosen."""


@dataclass(eq=False)
class _Failure(Exception):  # noqa: N818 - control flow inside this file, never seen outside
    """A try failed; ``hop`` is to blame, if one is."""

    error: PeerError
    hop: HopStream | None = None
    avoid_seconds: float = 0.0
    broken_link: tuple[str, str] | None = None
    at_fault: bool = True


@dataclass
class SessionStats:
    """What a session has been through; for receipts and for tests."""

    steps: int = 0
    attempts: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    rebuilt: int = 0


class ChainSession:
    """Hidden states in at block ``start``, hidden states out after block ``end - 1``, with caches in between.

    All methods run in the engine's event loop.

    Parameters
    ----------
    connection
        The swarm.
    model
        Uid of the checkpoint that servers must serve.
    start, end
        Blocks ``[start, end)``.
    edits
        Made at every step; each server is told its own when it joins, so that its successor makes them too.
    adapter, sender
        Used at every step, and who brings it to servers; its tensors must not change.
    """

    def __init__(
        self,
        connection: SwarmConnection,
        model: str,
        start: int,
        end: int,
        options: SessionOptions | None = None,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        sender: AdapterSender | None = None,
    ) -> None:
        self.model = model
        self.options = options or SessionOptions()
        self.stats = SessionStats()
        self.closed = False
        self._edits = edits or Edits()
        self._adapter, self._sender = adapter, sender
        self._connection = connection
        self._directory = connection.directory
        self._journal = Journal(start, end)
        self._history = History()
        self._before: Snapshot = self._history.snapshot()
        self._hops: dict[str, HopStream] = {}
        self._inbox: Inbox = asyncio.Queue()
        self._lock = asyncio.Lock()
        self._attempts = itertools.count(1)
        self._candidates = Candidates(
            self._directory, model, self.options, adapter=adapter.uid if adapter is not None else ""
        )
        self._queued: dict[str, tuple[Queued, float]] = {}
        self._broken: set[tuple[str, str]] = set()
        self._step_seconds = 0.0

    # -- what it holds -------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._journal.length

    @property
    def croppable(self) -> bool:
        """Whether its servers can drop the last tokens of their caches; else they are sent everything again."""
        return self._journal.croppable

    @property
    def batch(self) -> int:
        """Rows; 0 before the first step."""
        return self._history.batch

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each hop, in order; empty before the first step."""
        return [(hop.peer, hop.start, hop.end) for hop in self._journal.hops]

    @property
    def queued(self) -> str:
        """Where it waits for room just now, in words; empty if it does not."""
        return queued_in_words(self._queued, time.monotonic())

    # -- steps ---------------------------------------------------------------------------------------------------

    async def step(
        self,
        hidden: torch.Tensor,
        *,
        ops: Sequence[CacheOp] = (),
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
    ) -> StepOutput:
        """Append tokens and return what leaves the last block for them.

        Parameters
        ----------
        hidden
            [batch, tokens, ...], what enters block ``start``.
        ops
            Applied before, to all caches.
        mask
            [batch, length + tokens] bool, cumulative; None when all true.
        positions
            [1 or batch, tokens] int64 position ids; None for those that follow from length and mask.
        capture
            Also return the hidden states that enter each block.

        Raises
        ------
        MissingBlocksError
            Blocks that nobody could be found for within the retry budget.
        PeerRefusedError
            A limit of the servers; retrying would not help.
        SessionError
            The session is closed.
        """
        async with self._lock:
            if self.closed:
                raise SessionError("this session is closed; open another with model.inference_session()")
            before = self._history.snapshot()
            pending = self._journal.begin(hidden.shape[1], ops)
            try:
                self._history.apply(ops)
                self._history.append(hidden.detach(), mask, positions)
                output = await self._until_done(pending, capture)
            except BaseException:
                self._history.restore(before)
                for hop in self._journal.abort():
                    await self._discard(hop.session)
                raise
            self._queued.clear()
            self._journal.commit()
            self._before = before
            self.stats.steps += 1
            return output

    async def undo(self) -> None:
        """Be as before the last step, which succeeded here while what follows these blocks failed.

        Raises
        ------
        SessionError
            No step to take back: none was made, or it was taken back already.
        """
        async with self._lock:
            self._journal.undo()
            self._history.restore(self._before)

    async def close(self) -> None:
        """Free the caches on all servers. Further steps raise `SessionError`."""
        if self.closed:
            return
        self.closed = True
        hops, self._hops = list(self._hops.values()), {}
        await asyncio.gather(*(hop.close() for hop in hops))

    async def _until_done(self, pending: PendingStep, capture: bool) -> StepOutput:
        deadline: float | None = None
        retry = 0
        while True:
            try:
                await self._complete_chain(pending, deadline)
                return await self._try(pending, capture)
            except _Failure as failure:
                if not failure.at_fault:
                    raise failure.error from None
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self.options.retry_budget
                await self._blame(failure)
                if now > deadline:
                    raise MissingBlocksError(
                        self._journal.gaps() or [(self._journal.start, self._journal.end)],
                        model=self.model,
                        tried=self._tried(failed_before=False),
                    ) from failure.error
                if retry:  # the first replacement is tried at once; what keeps failing must not be hammered
                    await asyncio.sleep(min(0.05 * 2**retry, 1.0))
                retry += 1

    async def _try(self, pending: PendingStep, capture: bool) -> StepOutput:
        attempt = next(self._attempts)
        self.stats.attempts += 1
        started = time.monotonic()
        source = self._history.hidden
        carry: dict[int, torch.Tensor] = {}
        timings: list[HopTiming] = []
        captured: dict[int, torch.Tensor] = {}
        # a mended link would be tried again by the next session; this one keeps to what it knows works
        segments = self._journal.segments(self._broken | set(self._directory.view.bad_links))
        source_from = 0
        for segment in segments:
            receiver = Receiver(pending, attempt, segment, capture, like=self._history.hidden)
            first = self._hops[segment.hops[0].session]
            try:
                await send_segment(
                    first,
                    pending,
                    attempt,
                    segment,
                    limits=[self._hops[hop.session].limits for hop in segment.hops],
                    hidden=source[:, segment.source_from - source_from :],
                    carry={
                        index: tensor[:, segment.source_from - source_from :] for index, tensor in carry.items()
                    },
                    mask=self._history.mask,
                    positions=None
                    if self._history.positions is None
                    else self._history.positions[:, segment.positions_from : pending.end],
                    capture=capture,
                    in_8bit=self.options.in_8bit,
                )
            except PeerError as error:
                raise _Failure(error, first) from None
            await self._receive(receiver, segment, attempt)
            source, carry, source_from = receiver.hidden, receiver.carry, segment.reply_from
            timings += receiver.timings
            captured |= receiver.captured
        self._step_seconds = max(time.monotonic() - started, 0.7 * self._step_seconds)
        states = [captured[block] for block in sorted(captured)] if capture else None
        return StepOutput(source, carry, states, timings)

    async def _receive(self, receiver: Receiver, segment: Segment, attempt: int) -> None:
        """Take what arrives until the segment's outputs are complete."""
        loop = asyncio.get_running_loop()
        patience = max(FIRST_CHECK_SECONDS, 3 * self._step_seconds)
        alarm = loop.call_later(patience, self._inbox.put_nowait, None)
        check: asyncio.Task[None] | None = None
        quiet_rounds = 0
        try:
            while not receiver.complete:
                arrival = await self._inbox.get()
                if arrival is None:
                    if check is not None and check.done():
                        check.result()
                        quiet_rounds += 1
                        if quiet_rounds >= 3:
                            self._raise_stalled(segment)
                    check = asyncio.create_task(self._check_alive(segment))
                    check.add_done_callback(lambda _: self._inbox.put_nowait(None))
                    continue
                if self._hops.get(arrival.hop.session) is not arrival.hop:
                    continue  # from a hop that has left the chain
                if self._accept(receiver, arrival, attempt):
                    quiet_rounds = 0
        finally:
            alarm.cancel()
            if check is not None:
                check.cancel()
                with contextlib.suppress(asyncio.CancelledError, _Failure):
                    await check

    def _accept(self, receiver: Receiver, arrival: Arrival, attempt: int) -> bool:
        hop, message = arrival.hop, arrival.message
        if isinstance(message, PeerError):
            raise _Failure(message, hop)
        if isinstance(message, Draining):
            hop.draining = True
            return False
        if isinstance(message, Queued):
            self._note_place(hop.peer, message)
            if self._somebody_else_for(hop):
                reason = f"waits for memory at place {message.place}"
                raise self._refusal(hop, "full", reason, QUEUE_AVOID_SECONDS)
            return True
        if isinstance(message, Refused):
            raise self._refusal(hop, message.code, message.reason, message.retry_after)
        if isinstance(message, StepFailed):
            if message.attempt != attempt:
                return False
            raise self._step_failure(hop, message)
        try:
            return receiver.take(hop, message, arrival.tensors)
        except BadPeerDataError as error:
            raise _Failure(BadPeerDataError(str(error), peer=hop.peer), hop) from None

    def _step_failure(self, hop: HopStream, message: StepFailed) -> _Failure:
        if message.code == "link" and message.peer:
            error = PeerUnreachableError(
                f"{short_peer(hop.peer)} could not reach {short_peer(message.peer)}: {message.reason}",
                peer=message.peer,
            )
            return _Failure(error, broken_link=(hop.peer, message.peer))
        if message.code == "data":
            upstream = next((one for one in self._hops.values() if one.peer == hop.upstream), None)
            error_text = f"sent {short_peer(hop.peer)} bad data: {message.reason}"
            if upstream is None:
                return _Failure(
                    PeerRefusedError(f"the server refused our hidden states: {message.reason}", code="data"),
                    at_fault=False,
                )
            return _Failure(BadPeerDataError(error_text, peer=upstream.peer), upstream)
        return self._refusal(hop, message.code, message.reason, None)

    def _refusal(self, hop: HopStream, code: str, reason: str, retry_after: float | None) -> _Failure:
        error = PeerRefusedError(reason, peer=hop.peer, code=code, retry_after=retry_after)
        if code in ("limit", "credential", "role", "version"):
            return _Failure(error, hop, at_fault=False)
        if code == "full":
            self._candidates.full.add(hop.peer)
        if code in ("full", "draining"):
            return _Failure(error, hop, avoid_seconds=retry_after or 2.0)
        return _Failure(error, hop)

    # -- who is alive --------------------------------------------------------------------------------------------

    async def _check_alive(self, segment: Segment) -> None:
        """Ping all hops, and put the error of a silent one into the inbox. Returns once all of them are idle."""
        hops = [self._hops[hop.session] for hop in segment.hops]
        while True:
            pongs = await asyncio.gather(*(hop.ping(PING_SECONDS) for hop in hops), return_exceptions=True)
            for hop, pong in zip(hops, pongs, strict=True):
                if isinstance(pong, PeerError):
                    self._inbox.put_nowait(Arrival(hop, pong, {}))
                    return
            states = [pong for pong in pongs if not isinstance(pong, BaseException)]
            await asyncio.sleep(1.0)
            if not any(pong.busy for pong in states):
                return

    def _raise_stalled(self, segment: Segment) -> None:
        """Everybody is alive and idle and the step is not done: a message was lost between two servers."""
        peers = [hop.peer for hop in segment.hops]
        error = PeerUnreachableError("a step was lost on its way through the chain")
        if len(peers) > 1:
            self._broken.update(itertools.pairwise(peers))
        raise _Failure(error)

    async def _blame(self, failure: _Failure) -> None:
        """Take the failed peer out of the chain and out of everybody's view."""
        if failure.broken_link is not None:
            near, far = failure.broken_link
            target = next((hop for hop in self._hops.values() if hop.peer == far), None)
            if target is not None:
                try:
                    await target.ping(PING_SECONDS)
                except PeerError as error:
                    failure = _Failure(error, target)
                else:
                    logger.info("%s cannot reach %s: carrying it across", short_peer(near), short_peer(far))
                    self._broken.add((near, far))
                    self._directory.mark_link_failed(near, far)
                    return
        hop = failure.hop
        if hop is None:
            return
        self.stats.lost.append((hop.peer, str(failure.error)))
        logger.info("lost %s: %s", short_peer(hop.peer), failure.error)
        if failure.avoid_seconds:
            self._candidates.avoid(hop.peer, failure.avoid_seconds)
        elif not (isinstance(failure.error, PeerRefusedError) and failure.error.code in ("position", "session")):
            self._directory.mark_failed(hop.peer, str(failure.error))
        self._journal.drop(hop.session)
        await self._discard(hop.session)

    def _note_place(self, peer: str, place: Queued) -> None:
        self._queued[peer] = (place, time.monotonic())

    def _somebody_else_for(self, hop: HopStream) -> bool:
        """Whether others could take a hop's blocks, as far as we know, and did not say that they are full."""
        entry = next((one for one in self._journal.hops if one.session == hop.session), None)
        if entry is None:
            return False
        tokens = (self._journal.length + RESERVE_TOKENS) * max(self._history.batch, 1)
        return self._candidates.others(hop.peer, entry.start, entry.end, cache_tokens=tokens)

    async def _discard(self, session: str) -> None:
        hop = self._hops.pop(session, None)
        if hop is not None:
            await hop.close(politely=False)

    # -- the chain -----------------------------------------------------------------------------------------------

    async def _complete_chain(self, pending: PendingStep, deadline: float | None) -> None:
        """Fill the gaps of the chain and see that every hop knows who pushes to it."""
        await self._leave_draining(pending)
        failed_before = deadline is not None
        if deadline is None:
            deadline = time.monotonic() + self.options.retry_budget
        tokens = (pending.end + RESERVE_TOKENS) * max(self._history.batch, 1)
        while self._journal.gaps():
            await self._widen_gaps()
            for start, end in self._journal.gaps():
                chain = await self._candidates.chain(
                    start, end, deadline=deadline, tried=lambda: self._tried(failed_before), cache_tokens=tokens
                )
                for planned in chain:
                    self._journal.place(ChainHop(planned.peer, secrets.token_hex(16), planned.start, planned.end))
            await self._open_new_hops()
        await self._relink()

    async def _widen_gaps(self) -> None:
        """Let go of newcomers beside a gap: they hold nothing yet, and the best chain for all of it may be another.

        Without this the hole a newcomer leaves is patched by itself, with the server next to it twice in a row.
        """
        while True:
            edges = {edge for gap in self._journal.gaps() for edge in gap}
            beside = next((hop for hop in self._journal.hops if hop.fresh and ({hop.start, hop.end} & edges)), None)
            if beside is None:
                return
            self._journal.drop(beside.session)
            await self._discard(beside.session)

    def _tried(self, failed_before: bool) -> list[str]:
        """Who was lost lately, and how long we waited, for whoever reads that nobody is left."""
        lost = [f"{short_peer(peer)}: {why}" for peer, why in self.stats.lost[-8:]]
        hint = f"Waited {self.options.retry_budget:.0f} s for another server."
        return [*lost, hint] if failed_before else lost

    async def _open_hop(self, hop: ChainHop, upstream: str | None) -> HopStream:
        ops, vectors = self._edits.packed(hop.start, hop.end)
        request = OpenSession(
            hop.session,
            self.model,
            hop.start,
            hop.end,
            upstream,
            ops,
            in_8bit=self.options.in_8bit,
            wait=hop.peer in self._candidates.full,
        )
        node = self._connection.node
        if self._adapter is None or self._sender is None:
            return await HopStream.open(node, hop.peer, request, self._inbox, vectors, self._note_place)
        try:
            return await HopStream.open(
                node, hop.peer, await self._with_adapter(hop, request), self._inbox, vectors, self._note_place
            )
        except PeerRefusedError as error:
            if error.code != "adapter":
                raise
            self._sender.forget(hop.peer)
        return await HopStream.open(
            node, hop.peer, await self._with_adapter(hop, request), self._inbox, vectors, self._note_place
        )

    async def _with_adapter(self, hop: ChainHop, request: OpenSession) -> OpenSession:
        assert self._sender is not None  # noqa: S101 - looked at by `_open_hop`
        use = await self._sender.ensure(hop.peer, self._adapter, hop.start, hop.end)
        return msgspec.structs.replace(request, adapter=use)

    async def _open_new_hops(self) -> None:
        new = [hop for hop in self._journal.hops if hop.session not in self._hops]
        broken = self._broken | set(self._directory.view.bad_links)
        results = await asyncio.gather(
            *(self._open_hop(hop, self._journal.upstream_of(hop.session, broken)) for hop in new),
            return_exceptions=True,
        )
        fatal: BaseException | None = None
        for hop, result in zip(new, results, strict=True):
            self._queued.pop(hop.peer, None)
            waited = hop.peer in self._candidates.full
            if isinstance(result, HopStream):
                self._candidates.full.discard(hop.peer)
                self._hops[hop.session] = result
                self._journal.croppable = all(one.croppable for one in self._hops.values())
                if self.stats.steps:
                    self.stats.rebuilt += 1
                continue
            self._journal.drop(hop.session)
            if isinstance(result, PeerRefusedError) and result.code == "full" and waited:
                fatal = result  # all others were asked before, and this one was waited for
            elif isinstance(result, PeerRefusedError) and result.code in ("full", "draining", "limit"):
                if result.code == "full":
                    self._candidates.full.add(hop.peer)
                self._candidates.avoid(hop.peer, result.retry_after or 2.0)
                self.stats.lost.append((hop.peer, str(result)))
            elif isinstance(result, PeerRefusedError) and result.code in ("credential", "role", "version"):
                fatal = result
            elif isinstance(result, PeerError):
                self._directory.mark_failed(hop.peer, str(result))
                self.stats.lost.append((hop.peer, str(result)))
            else:
                fatal = result
        if fatal is not None:
            raise fatal

    async def _relink(self) -> None:
        broken = self._broken | set(self._directory.view.bad_links)
        for hop in list(self._hops.values()):
            upstream = self._journal.upstream_of(hop.session, broken)
            if hop.upstream != upstream:
                try:
                    await hop.relink(upstream)
                except PeerError as error:
                    raise _Failure(error, hop) from None

    async def _leave_draining(self, pending: PendingStep) -> None:
        """Move away from servers that said they leave, where somebody else holds their blocks."""
        while not self._inbox.empty():
            arrival = self._inbox.get_nowait()
            if arrival is not None and self._hops.get(arrival.hop.session) is arrival.hop:
                if isinstance(arrival.message, Draining):
                    arrival.hop.draining = True
                elif isinstance(arrival.message, PeerError):
                    await self._blame(_Failure(arrival.message, arrival.hop))
        for hop in [one for one in self._hops.values() if one.draining]:
            entry = next((one for one in self._journal.hops if one.session == hop.session), None)
            if entry is None:
                continue
            if not self._candidates.others(hop.peer, entry.start, entry.end, with_room=False):
                continue
            self._candidates.avoid(hop.peer, LEAVING_SECONDS)
            self._journal.drop(hop.session)
            await self._discard(hop.session)
