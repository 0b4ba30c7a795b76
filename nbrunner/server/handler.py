"""What a server answers: the first request on a stream decides what the stream is (``docs/protocol.md``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.adapters_wire import wire_name
from nbrunner.blocks.edits import Edits, take_edits
from nbrunner.blocks.passes import KeptPass, SpanGradient, SpanOutput, TooMuchToKeepError
from nbrunner.errors import BadPeerDataError, PeerError, PeerRefusedError, PeerUnreachableError, UserInputError
from nbrunner.protocol.adapters import (
    AdapterOffered,
    AdapterStored,
    GetAdapter,
    OfferAdapter,
    PutAdapter,
    WithdrawAdapter,
)
from nbrunner.protocol.credentials import Terms
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.records import ServerRecord
from nbrunner.protocol.requests import Backward, BackwardResult, Forward, ForwardResult, SummedGradients, TakeSum
from nbrunner.protocol.sessions import Attached, AttachSession, OpenSession, Queued
from nbrunner.protocol.status import GetInfo, Info, Ping, Pong
from nbrunner.protocol.steps import HopTiming, Step
from nbrunner.protocol.tensors import pack
from nbrunner.server.adapters import take_checked
from nbrunner.server.content import Content
from nbrunner.server.host import Host
from nbrunner.server.inputs import CARRY, sizes, take_gradients, take_inputs
from nbrunner.server.measuring import MeasuredPass, check_measure
from nbrunner.server.scheduler import Urgency
from nbrunner.server.session import ServerSession
from nbrunner.swarm.streams import Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_DRAINING = 60.0

RETRY_PAUSED = 15.0
"""A pause may end at any time; whoever asks again in between only wastes a round trip."""


class Handler:
    """Serves the streams of peers whose credentials have been checked.

    Errors meant for the peer are raised as `PeerRefusedError` or `BadPeerDataError`; the node sends them.
    """

    def __init__(self, host: Host, record: Callable[[], ServerRecord], on_change: Callable[[], None]) -> None:
        self.host = host
        self.sessions: dict[str, ServerSession] = host.sessions
        self.draining = False
        self.paused = False
        self.empty = asyncio.Event()
        self.empty.set()
        self._record = record
        self._on_change = on_change

    async def __call__(self, stream: Stream) -> None:
        try:
            message, tensors = await stream.receive()
            if isinstance(message, OpenSession):
                await self._session(stream, message, tensors)
            elif isinstance(message, AttachSession):
                await self._attached(stream, message)
            else:
                while True:
                    await self._request(stream, message, tensors)
                    message, tensors = await stream.receive()
        except PeerUnreachableError as error:
            logger.debug("stream of %s ended: %s", short_peer(stream.peer), error)

    async def announce_draining(self, seconds: float) -> None:
        """Take no new sessions, and ask those that are open to move."""
        self.draining = True
        for session in list(self.sessions.values()):
            try:
                await session.announce_draining(seconds)
            except PeerError as error:
                logger.debug("session %s is already gone: %s", session.id[:8], error)

    # -- sessions ------------------------------------------------------------------------------------------------

    def _session_edits(self, request: OpenSession, tensors: Mapping[str, RawTensor]) -> Edits | None:
        if not request.edits:
            return None
        shape, blocks = self.host.span.hidden_shape, (request.start, request.end)
        return take_edits(request.edits, tensors, blocks=blocks, hidden_shape=shape, rows=None)

    def _check_open(self, request: OpenSession) -> None:
        """`PeerRefusedError` if no session, or not this one, can be opened now."""
        if self.draining:
            raise PeerRefusedError(
                "this server is leaving and takes no new sessions", code="draining", retry_after=RETRY_DRAINING
            )
        if self.paused:
            raise PeerRefusedError(
                "this server is paused and takes no new sessions", code="draining", retry_after=RETRY_PAUSED
            )
        self._check_blocks(request.model, request.start, request.end)
        if request.session in self.sessions:
            raise PeerRefusedError("a session with this id is open here; choose another id", code="session")

    async def _session(self, stream: Stream, request: OpenSession, tensors: Mapping[str, RawTensor]) -> None:
        self._check_open(request)
        quotas, terms = self.host.quotas, stream.terms or Terms()
        adapter = self.host.adapters.use(request.adapter, request.start, request.end)
        quotas.open_session(stream.peer, terms)
        self.host.adapters.pin(request.adapter)
        session: ServerSession | None = None
        try:
            await self._first_room(stream, request)
            self._check_open(request)  # it may have waited
            edits = self._session_edits(request, tensors)
            content = Content.of_session(stream.peer, request, tensors)
            session = ServerSession(self.host, stream, request, content, edits, adapter)
            self.sessions[session.id] = session
            self.empty.clear()
            logger.info(
                "session %s of %s: blocks [%d, %d)",
                session.id[:8],
                short_peer(stream.peer),
                request.start,
                request.end,
            )
            self._on_change()
            await session.run()
        finally:
            if session is not None:
                self.sessions.pop(session.id, None)
            if not self.sessions:
                self.empty.set()
            quotas.close_session(stream.peer)
            self.host.adapters.unpin(request.adapter)
            self._on_change()
            logger.info("session %s closed", request.session[:8])

    async def _first_room(self, stream: Stream, request: OpenSession) -> None:
        """Wait for memory for a short session, so that nobody is let in who could not make a step.

        It is not kept for it: whoever opens sessions and does nothing with them takes nothing from others.
        """

        async def tell(place: int, seconds: float | None) -> None:
            await stream.send(Queued(place, seconds))

        wanted, opening = self._least_bytes(request), object()
        await self.host.room.reserve(stream.peer, opening, wanted, tell if request.wait else None)
        self.host.quotas.set_bytes(opening, 0)

    def _least_bytes(self, request: OpenSession) -> int:
        share = (request.end - request.start) / (self.host.span.end - self.host.span.start)
        return int((self.host.speed.cache_bytes_fixed + 64 * self.host.speed.cache_bytes_per_token) * share)

    async def _attached(self, stream: Stream, request: AttachSession) -> None:
        if (stream.terms or Terms()).role != "host":
            raise PeerRefusedError("only servers of this swarm may push into sessions", code="role")
        session = self.sessions.get(request.session)
        if session is None or session.upstream != stream.peer:
            # one answer for both: whether a session exists is nobody's business but its client's
            raise PeerRefusedError("no session here that you may push to", code="session")
        session.attached.add(stream)
        try:
            await stream.send(Attached())
            while True:
                message, tensors = await stream.receive()
                if not isinstance(message, Step):
                    raise PeerRefusedError(f"{type(message).__name__} has no place in a push", code="schema")
                if session.upstream != stream.peer:
                    raise PeerRefusedError("this session is linked to another server now", code="session")
                session.accept(message, tensors, stream.peer)
        finally:
            session.attached.discard(stream)

    # -- requests ------------------------------------------------------------------------------------------------

    async def _request(self, stream: Stream, message: AnyMessage, tensors: Mapping[str, RawTensor]) -> None:
        if isinstance(message, Ping):
            await stream.send(Pong(message.nonce))
        elif isinstance(message, GetInfo):
            await stream.send(Info(self._record(), self.host.limits))
        elif isinstance(message, Forward):
            await self._forward(stream, message, tensors)
        elif isinstance(message, Backward):
            await self._backward(stream, message, tensors)
        elif isinstance(message, TakeSum):
            await self._take_sum(stream, message)
        elif isinstance(message, PutAdapter):
            await self._put_adapter(stream, message, tensors)
        elif isinstance(message, GetAdapter):
            await stream.send(self.host.served.info(message.adapter))
        elif isinstance(message, OfferAdapter):
            await stream.send(AdapterOffered(self.host.served.offer(stream.peer, message)))
            self._on_change()
        elif isinstance(message, WithdrawAdapter):
            self.host.served.withdraw(stream.peer, message.adapter)
            self._on_change()
            await stream.send(AdapterOffered(message.adapter))
        else:
            raise PeerRefusedError(f"{type(message).__name__} has no place here", code="schema")

    async def _forward(self, stream: Stream, message: Forward, tensors: Mapping[str, RawTensor]) -> None:
        began = time.perf_counter()
        if message.measure is not None:
            await self._measured_forward(stream, message, message.measure, tensors)
            return
        if not message.reply:
            raise PeerRefusedError("a request that wants neither an answer nor a measure", code="schema")
        await self._admit(stream, message.model, message.start, message.end, tensors)
        adapter = self.host.adapters.use(message.adapter, message.start, message.end)
        if message.keep:
            await self._kept_forward(stream, message, tensors, adapter)
            return
        span = self.host.span

        def run() -> list[RawTensor]:
            inputs = take_inputs(tensors, self.host.form)
            output = span.forward(
                inputs.hidden,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                start=message.start,
                end=message.end,
                carry=inputs.carry or None,
                collect=message.capture,
                edits=self._edits(message, tensors),
                adapters=adapter,
            )
            answer = _packed(output, span.dtype)
            if message.capture:
                answer.append(pack("states", torch.stack(output.collected)))
            return answer

        answer, timing = await self._compute(run, began, stream.peer)
        await stream.send(ForwardResult(timing), self._fitting(answer))

    async def _measured_forward(
        self, stream: Stream, message: Forward, measure: Measure, tensors: Mapping[str, RawTensor]
    ) -> None:
        began, queue, compute = time.perf_counter(), 0.0, 0.0
        self._check_blocks(message.model, message.start, message.end)
        extra = check_measure(self.host, message, measure, *sizes(tensors))
        await self._admit(stream, message.model, message.start, message.end, tensors, extra)
        adapter = self.host.adapters.use(message.adapter, message.start, message.end)
        work, more = MeasuredPass(self.host, message, measure, tensors, adapter), True
        while more:
            more, timing = await self._compute(work.advance, began, stream.peer)
            queue, compute = queue + timing.queue, compute + timing.compute
        timing = HopTiming(self.host.peer_id, queue, compute, time.perf_counter() - began)
        await stream.send(ForwardResult(timing), self._fitting(work.answer()))

    async def _kept_forward(
        self,
        stream: Stream,
        message: Forward,
        tensors: Mapping[str, RawTensor],
        adapter: SpanAdapter | None,
    ) -> None:
        if message.capture:
            raise PeerRefusedError("a pass is kept or captured, not both", code="schema")
        began, span, store = time.perf_counter(), self.host.span, self.host.kept
        batch, tokens = sizes(tensors)
        work = batch * tokens * (message.end - message.start)
        allowance, expected = store.allowance(work), store.expected(work, tokens)

        def run() -> tuple[list[RawTensor], KeptPass | None]:
            inputs = take_inputs(tensors, self.host.form)
            edits = self._edits(message, tensors)
            try:
                kept = span.trace(
                    inputs.hidden,
                    attention_mask=inputs.mask,
                    position_ids=inputs.positions,
                    start=message.start,
                    end=message.end,
                    carry=inputs.carry or None,
                    edits=edits,
                    adapter=adapter,
                    adapter_grads=message.adapter_grads,
                    limit=None if expected else allowance,
                )
                kept.nbytes = kept.nbytes or expected
            except TooMuchToKeepError:
                output = span.forward(
                    inputs.hidden,
                    attention_mask=inputs.mask,
                    position_ids=inputs.positions,
                    start=message.start,
                    end=message.end,
                    carry=inputs.carry or None,
                    edits=edits,
                    adapters=adapter,
                )
                return _packed(output, span.dtype), None
            return _packed(kept.output, span.dtype), kept

        (answer, kept), timing = await self._compute(run, began, stream.peer)
        name = None
        if kept is None:
            store.too_much(work)
        else:
            name = store.put(stream.peer, (message.start, message.end), kept, work, tokens)
        await stream.send(ForwardResult(timing, name), self._fitting(answer))

    async def _kept_backward(self, stream: Stream, message: Backward, tensors: Mapping[str, RawTensor]) -> None:
        began = time.perf_counter()
        self._check_blocks(message.model, message.start, message.end)
        kept = self.host.kept.take(message.kept or "", stream.peer, (message.start, message.end))
        batch, tokens = kept.output.hidden.shape[:2]
        self._spend(stream, batch, tokens)

        def run() -> tuple[list[RawTensor], bool]:
            grad, grad_carry = take_gradients(tensors, self.host.form, (batch, tokens))
            return self._answered(stream.peer, message, kept.backward(grad, grad_carry or None))

        (answer, summed), timing = await self._compute(run, began, stream.peer)
        await stream.send(BackwardResult(timing, summed), self._fitting(answer))

    def _answered(self, peer: str, message: Backward, found: SpanGradient) -> tuple[list[RawTensor], bool]:
        """What goes back, and whether the adapter's part of it was added to a sum. In the compute thread."""
        blocks = (message.start, message.end)
        summed = bool(
            message.sum is not None
            and found.adapters
            and self.host.sums.add(peer, message.sum, blocks, found.adapters)
        )
        return _packed_gradient(replace(found, adapters={}) if summed else found), summed

    async def _take_sum(self, stream: Stream, message: TakeSum) -> None:
        numbers, grads = self.host.sums.take(stream.peer, message.id, (message.start, message.end))
        answer = [
            pack(wire_name(block, name), tensor) for block, named in grads.items() for name, tensor in named.items()
        ]
        await stream.send(SummedGradients(numbers), self._fitting(answer))

    async def _backward(self, stream: Stream, message: Backward, tensors: Mapping[str, RawTensor]) -> None:
        if message.kept is not None:
            await self._kept_backward(stream, message, tensors)
            return
        began = time.perf_counter()
        await self._admit(stream, message.model, message.start, message.end, tensors)
        adapter = self.host.adapters.use(message.adapter, message.start, message.end)

        def run() -> tuple[list[RawTensor], bool]:
            inputs = take_inputs(tensors, self.host.form)
            grad, grad_carry = take_gradients(tensors, self.host.form, sizes(tensors))
            found = self.host.span.backward(
                inputs.hidden,
                grad,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                start=message.start,
                end=message.end,
                carry=inputs.carry or None,
                grad_carry=grad_carry or None,
                edits=self._edits(message, tensors),
                adapter=adapter,
                adapter_grads=message.adapter_grads,
            )
            return self._answered(stream.peer, message, found)

        (answer, summed), timing = await self._compute(run, began, stream.peer)
        await stream.send(BackwardResult(timing, summed), self._fitting(answer))

    async def _put_adapter(self, stream: Stream, message: PutAdapter, tensors: Mapping[str, RawTensor]) -> None:
        self._check_model(message.model)
        host = self.host
        # hashing and checking let go of the interpreter, and must not wait for somebody's long forward pass
        found = await asyncio.to_thread(take_checked, message, tensors, host.span, host.limits)
        host.adapters.put(stream.peer, {one.digest: one for one in found})
        await stream.send(AdapterStored([one.digest for one in found]))

    def _edits(self, message: Forward | Backward, tensors: Mapping[str, RawTensor]) -> Edits | None:
        if not message.edits:
            return None
        return take_edits(
            message.edits,
            tensors,
            blocks=(message.start, message.end),
            hidden_shape=self.host.span.hidden_shape,
            rows=sizes(tensors)[0],
        )

    async def _admit(
        self,
        stream: Stream,
        model: str,
        start: int,
        end: int,
        tensors: Mapping[str, RawTensor],
        extra_tokens: int = 0,
    ) -> None:
        """Everything that can be said about a request before its tensors are looked at.

        ``extra_tokens`` are paid for besides those of the tensors.
        """
        self._check_blocks(model, start, end)
        batch, tokens = sizes(tensors)
        limits = self.host.limits
        if not 0 < batch <= limits.batch or not 0 < tokens * batch <= limits.part_tokens:
            raise PeerRefusedError(
                f"{batch} rows × {tokens} tokens; this server allows {limits.batch} rows and "
                f"{limits.part_tokens} tokens together",
                code="limit",
            )
        self._spend(stream, batch, tokens, extra_tokens)

    def _spend(self, stream: Stream, batch: int, tokens: int, extra_tokens: int = 0) -> None:
        terms = stream.terms or Terms()
        wait = self.host.quotas.wait_seconds(stream.peer, terms)
        if wait:
            raise PeerRefusedError(
                f"over your {self.host.quotas.rate(terms):g} tokens per second", code="limit", retry_after=wait
            )
        self.host.quotas.spend(stream.peer, terms, tokens * batch + extra_tokens)
        self.host.traffic.note(stream.peer, tokens, batch)

    async def _compute(self, run: Callable[[], T], began: float, peer: str) -> tuple[T, HopTiming]:
        try:
            done = await self.host.compute.submit(run, Urgency.STATELESS, peer=peer)
        except BadPeerDataError as error:
            raise PeerRefusedError(str(error), code="data") from None
        except UserInputError as error:
            raise PeerRefusedError(str(error), code="data") from None
        except (MemoryError, torch.OutOfMemoryError):
            raise PeerRefusedError("no memory for this request now; send fewer rows", code="full") from None
        except Exception as error:
            logger.exception("a request failed")
            raise PeerRefusedError(f"the request failed here: {type(error).__name__}", code="internal") from error
        total = time.perf_counter() - began
        return done.value, HopTiming(self.host.peer_id, done.queue, done.compute, total)

    def _fitting(self, answer: list[RawTensor]) -> list[RawTensor]:
        size = sum(tensor.spec.nbytes for tensor in answer)
        if size > self.host.limits.frame_bytes:
            raise PeerRefusedError(
                f"the answer has {size} bytes, over {self.host.limits.frame_bytes}; ask for fewer rows",
                code="limit",
            )
        return answer

    def _check_model(self, model: str) -> None:
        if model != self.host.model:
            raise PeerRefusedError(
                f"you ask for model {model}, this server serves {self.host.model}: another model or revision",
                code="model",
            )

    def _check_blocks(self, model: str, start: int, end: int) -> None:
        self._check_model(model)
        if not self.host.span.start <= start < end <= self.host.span.end:
            raise PeerRefusedError(
                f"blocks [{start}, {end}) are not all here: this server has "
                f"[{self.host.span.start}, {self.host.span.end})",
                code="blocks",
            )


def _packed(output: SpanOutput, dtype: torch.dtype) -> list[RawTensor]:
    answer = [pack("hidden", output.hidden.to(dtype))]
    return answer + [pack(f"{CARRY}{index}", tensor) for index, tensor in output.carry.items()]


def _packed_gradient(found: SpanGradient) -> list[RawTensor]:
    answer = [pack("grad", found.hidden)]
    answer += [pack(f"grad_{CARRY}{index}", tensor) for index, tensor in found.carry.items()]
    for block, named in found.adapters.items():
        answer += [pack(wire_name(block, name), tensor) for name, tensor in named.items()]
    return answer
