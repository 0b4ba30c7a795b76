"""Blocks without caches, over the swarm: forward and backward passes for training and for whole texts.

A pass is a chain of independent requests. The client keeps what entered each server's blocks, so that any part of a
pass can be run again elsewhere: when a server is lost, only its blocks are planned anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.measuring import join_rows, measure_states
from nbrunner.blocks.passes import SpanGradient
from nbrunner.client.adapter_grads import AdapterSums, beside_adapter, most_adapted, take_adapter_grads
from nbrunner.client.adapters import AdapterSender
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.measuring import (
    MeasuredPart,
    Request,
    answer_bytes,
    check_request,
    check_size,
    most_layers,
    most_rows,
    take_measured,
)
from nbrunner.client.micro_batches import Batch, micro_batches, together
from nbrunner.client.request_streams import Answer, RequestStreams
from nbrunner.client.runner import Ahead, Carry, ForwardOutput, Gradients, Kept, Pass, Segment, Tape
from nbrunner.client.session import SessionOptions
from nbrunner.client.watch import note_pass
from nbrunner.errors import (
    BadPeerDataError,
    MissingBlocksError,
    PeerError,
    PeerRefusedError,
    SessionError,
    UserInputError,
)
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import MAX_FRAME_BYTES, Limits
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.messages import Backward, BackwardResult, EditOp, Forward, ForwardResult
from nbrunner.protocol.tensors import pack, take
from nbrunner.swarm.directory import SwarmView
from nbrunner.swarm.routing import PlannedHop, plan_chain

logger = logging.getLogger(__name__)

CARRY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)

LENS = "lens"
"""In a record's features: that server holds final norm and head."""

KEEP = "keep"
"""Feature of servers that can keep a pass for its gradients."""

FINAL_CODES = frozenset({"credential", "role", "version"})
"""Refusals that no other server would answer differently."""

BUSY_CODES = frozenset({"full", "draining", "limit"})
"""Refusals that say nothing bad about the server."""


class BlockRequests:
    """Forward and backward passes over a swarm. All methods run in the engine's event loop.

    Parameters
    ----------
    connection
        The swarm.
    model
        Uid of the checkpoint.
    dtype
        Of hidden states on the wire.
    options
        Which peers may be used, and how long to try.
    """

    def __init__(
        self, connection: SwarmConnection, model: str, dtype: torch.dtype, options: SessionOptions
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.options = options
        self._directory = connection.directory
        self._streams = RequestStreams(connection.node)
        self.adapters = AdapterSender(self._streams, model)

    @property
    def streams(self) -> RequestStreams:
        """For other requests to the same servers."""
        return self._streams

    async def close(self) -> None:
        await self._streams.close()

    async def forward(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        *,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        capture: bool,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        ahead: Ahead | None = None,
    ) -> ForwardOutput:
        """As `nbrunner.client.runner.BlockRunner.forward`.

        Raises
        ------
        UserInputError
            A sequence that no server takes in one piece, or an adapter over the servers' limits.
        MissingBlocksError
            Nobody could be found for some blocks within the retry budget.
        BadPeerDataError
            Two servers gave bad data for the same input: it is not the servers.
        """
        check_finite(hidden, "hidden states")
        extras = _Extras(mask, positions, capture, edits, adapter=adapter, ahead=None if capture else ahead)
        batch = Batch(hidden.detach(), mask, positions, edits, adapter)
        groups = [] if ahead is None or capture else micro_batches(batch, self._servers(start, end, adapter))
        if len(groups) < 2:
            return await self._one_forward(Segment(start, end, batch.hidden), extras)
        outputs = await together(
            self._one_forward(
                Segment(start, end, part.hidden),
                replace(extras, mask=part.mask, positions=part.positions, adapter=part.adapter),
            )
            for _, part in groups
        )
        parts = tuple((rows, output.tape) for (rows, _), output in zip(groups, outputs, strict=True))
        return ForwardOutput(
            torch.cat([output.hidden for output in outputs]),
            None,
            Tape((), mask, positions, edits, adapter, parts=parts),
            tuple(done for output in outputs for done in output.passes),
        )

    async def _one_forward(self, entry: Segment, extras: _Extras) -> ForwardOutput:
        way = await self._forward(entry, extras)
        return ForwardOutput(
            way.output.hidden,
            way.captured if extras.capture else None,
            Tape(tuple(way.segments), extras.mask, extras.positions, extras.edits, extras.adapter),
            tuple(way.passes),
        )

    def _servers(self, start: int, end: int, adapter: SpanAdapter | None) -> int:
        """How many servers a pass goes through, as far as is known now."""
        options = self.options
        try:
            chain = plan_chain(
                self._directory.view,
                model=self.model,
                start=start,
                end=end,
                mode="throughput",
                allowed=options.allowed_peers,
                blocked=options.blocked_peers,
                adapter=adapter.uid if adapter is not None else "",
            )
        except MissingBlocksError:
            return 1
        return len(chain)

    async def measured(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        measure: Measure,
        *,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        limit: int,
    ) -> tuple[ForwardOutput, list[MeasuredPart], Request]:
        """A forward pass that is measured; what servers without a lens leave out is for the caller to add.

        A comparison with the last state takes two rounds: one to learn it, one in which nothing but measurements
        comes back. Errors as `forward`, and `UserInputError` for what cannot be measured or has too many bytes.
        """
        check_finite(hidden, "hidden states")
        check_request(measure, start, end, hidden.shape[1])
        check_size(measure, hidden.detach(), lenses=self.lenses(start, end), limit=limit)
        entry, request = Segment(start, end, hidden.detach()), Request(measure)
        extras = _Extras(mask, positions, False, edits, None if measure.final else request, adapter=adapter)
        way = await self._forward(entry, extras)
        passes, parts = list(way.passes), list(way.measured)
        if measure.final:
            last = (edits or Edits()).apply(way.output.hidden, end)
            final = last[:, measure.positions] if measure.positions else last
            request = Request(measure, final)
            for segment in way.segments:
                second = replace(extras, request=request, reply=False)
                again = await self._forward(segment, second)
                passes += again.passes
                parts += again.measured
        if measure.layers[0] == start:
            asked = request.own(start)
            state = (edits or Edits()).apply(hidden.detach(), start)
            parts.insert(0, MeasuredPart(asked, measure_states({start: state}, asked, final=request.final)))
        tape = Tape(tuple(way.segments), mask, positions, edits, adapter)
        return ForwardOutput(way.output.hidden, None, tape, tuple(passes)), parts, request

    def lenses(self, start: int, end: int) -> bool:
        """Whether servers with a lens hold all of these blocks."""
        servers = self._directory.view.servers.values()
        records = [one.record for one in servers if one.record.model == self.model and LENS in one.record.features]
        return all(any(one.start <= block < one.end for one in records) for block in range(start, end))

    def _has_lens(self, peer: str) -> bool:
        entry = self._directory.view.servers.get(peer)
        return entry is not None and LENS in entry.record.features

    async def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
    ) -> Gradients:
        """As `nbrunner.client.runner.BlockRunner.backward`; errors as `forward`."""
        if tape.parts:
            if grad is None:
                raise SessionError("a pass of several parts has no inner states to go back from")
            answers = await together(
                self.backward(one, grad[rows], {}, adapter_grads=adapter_grads, input_grad=input_grad)
                for rows, one in tape.parts
            )
            sums = AdapterSums()
            for answer in answers:
                sums.add(answer.adapters)
            inputs = [answer.hidden for answer in answers if answer.hidden is not None]
            return Gradients(torch.cat(inputs) if input_grad else None, sums.found)
        carry: Carry = {}
        adapters = AdapterSums()
        # below the first block that learns something nobody needs a gradient
        first = 0 if input_grad or tape.adapter is None or not adapter_grads else min(tape.adapter.blocks)
        for one in (grad, *captured.values()):
            if one is not None:
                check_finite(one, "the gradient")
        for segment in reversed(tape.segments):
            if segment.end <= first:
                break
            inner = sorted(block for block in captured if segment.start < block < segment.end)
            for part in reversed(await self._cut(segment, inner, tape)):
                if grad is not None:
                    found = await self._backward(part, tape, grad, carry, adapter_grads)
                    grad, carry = found.hidden, found.carry
                    adapters.add(found.adapters)
                if part.start in captured:
                    # what was captured is the edited state; ``grad`` is with respect to the state before its edits
                    extra = captured[part.start]
                    extra = tape.edits.pull_back(extra, part.start) if tape.edits else extra
                    grad = extra if grad is None else grad + extra
        if adapter_grads and tape.adapter is not None:
            adapters.fill(tape.adapter)
        if not input_grad:
            return Gradients(None, adapters.found)
        return Gradients(torch.zeros_like(tape.segments[0].hidden) if grad is None else grad, adapters.found)

    # -- passes --------------------------------------------------------------------------------------------------

    async def _forward(self, entry: Segment, extras: _Extras) -> _Way:
        way = _Way(entry)
        at = entry
        retry = _Retry(self, extras.adapter)
        while at.start < entry.end:
            for hop in await retry.plan(at.start, entry.end):
                try:
                    limits = await self._streams.limits(hop.peer)
                    most = self._most_blocks(hop.peer, at, limits, extras)
                    last = min(
                        hop.end, at.start + min(most, most_adapted(extras.adapter, at.start, hop.end, limits))
                    )
                    part = Segment(at.start, last, at.hidden, at.carry)
                    needed = extras if last < entry.end else replace(extras, last=True)
                    part, answer = await self._ask_forward(hop.peer, limits, part, needed)
                except PeerError as error:
                    await retry.failed(hop.peer, error)
                    break
                way.segments.append(part)
                way.passes.append(answer.done)
                way.captured += answer.captured
                way.measured += answer.measured
                at = way.output = Segment(last, entry.end, answer.hidden, answer.carry)
                retry.succeeded(hop.peer)
                if last < hop.end:
                    break
        return way

    def _asked(self, peer: str, start: int, end: int, extras: _Extras) -> Measure | None:
        if extras.request is None:
            return None
        return extras.request.ask(start, end, has_lens=self._has_lens(peer))

    def _most_blocks(self, peer: str, at: Segment, limits: Limits, extras: _Extras) -> int:
        """How many blocks fit one request: what is captured or measured comes back in one frame."""
        if extras.capture:
            return _most_captured(at.hidden, limits)
        asked = self._asked(peer, at.start, at.end, extras)
        if not asked:
            return 1 << 30
        most = most_layers(asked, at.hidden, limits)
        return 1 << 30 if len(asked.layers) <= most else asked.layers[most] - at.start - 1

    async def _cut(self, segment: Segment, blocks: Sequence[int], tape: Tape) -> list[Segment]:
        """The segment cut at some blocks; what enters the later pieces is computed again."""
        parts: list[Segment] = []
        for block in blocks:
            piece = Segment(segment.start, block, segment.hidden, segment.carry)
            extras = _Extras(tape.mask, tape.positions, False, tape.edits, adapter=tape.adapter)
            way = await self._forward(piece, extras)
            parts += way.segments
            segment = Segment(block, segment.end, way.output.hidden, way.output.carry)
        return [*parts, segment]

    async def _backward(
        self, part: Segment, tape: Tape, grad: torch.Tensor, grad_carry: Carry, adapter_grads: bool
    ) -> SpanGradient:
        retry = _Retry(self, tape.adapter)
        if part.kept is not None:
            try:
                return await self._ask_backward_of_kept(part.kept, part, tape, grad, grad_carry, adapter_grads)
            except PeerError as error:
                if not (isinstance(error, PeerRefusedError) and error.code == "forgotten"):
                    await retry.failed(part.kept.peer, error)
        while True:
            hops = await retry.plan(part.start, part.end)
            if len(hops) > 1:
                # nobody holds all of it any more: run it again over those who do, and go back through each
                pieces = await self._cut(part, [hop.start for hop in hops[1:]], tape)
                adapters = AdapterSums()
                for piece in reversed(pieces):
                    found = await self._backward(piece, tape, grad, grad_carry, adapter_grads)
                    grad, grad_carry = found.hidden, found.carry
                    adapters.add(found.adapters)
                return SpanGradient(grad, dict(grad_carry), adapters.found)
            peer = hops[0].peer
            try:
                limits = await self._streams.limits(peer)
                result = await self._ask_backward(peer, limits, part, tape, grad, grad_carry, adapter_grads)
            except PeerError as error:
                await retry.failed(peer, error)
            else:
                retry.succeeded(peer)
                return result

    # -- one server ----------------------------------------------------------------------------------------------

    async def _ask_forward(
        self,
        peer: str,
        limits: Limits,
        part: Segment,
        extras: _Extras,
    ) -> tuple[Segment, _Answer]:
        """The part as it is for the tape, and what came back."""
        blocks, capture = part.end - part.start, extras.capture
        outputs, carries, states, measured = [], [], [], []
        copies = blocks + 1 if capture else 1
        asked = self._asked(peer, part.start, part.end, extras)
        reply = extras.reply or not extras.last or not asked
        began, compute, sent, received = time.perf_counter(), 0.0, 0, 0
        ahead, kept = extras.ahead, []
        if ahead is not None and KEEP not in self._streams.features(peer):
            ahead = None
        # the gradients of a kept pass come back for the same groups of rows
        room = beside_adapter(limits, extras.within(part) if ahead is not None and ahead.adapter_grads else None)
        for rows in _measured_groups(part, limits, asked) or row_groups(part, room, copies_out=copies):
            ops, vectors = _edits(extras.edits, part, rows, measured=bool(asked))
            tensors = _inputs(part, rows, extras.mask, extras.positions) + vectors
            if asked and asked.final and extras.request and extras.request.final is not None:
                tensors.append(pack("final", extras.request.final[rows].to(self.dtype)))
            wanted = part.hidden[rows].shape
            request = Forward(self.model, part.start, part.end, capture, ops, asked, reply)
            if ahead is not None:
                request = msgspec.structs.replace(request, keep=True, adapter_grads=ahead.adapter_grads)
            result, answer = await self._ask(peer, request, tensors, ForwardResult, extras.adapter, rows.start)
            compute += result.timing.compute
            sent += sum(tensor.spec.nbytes for tensor in tensors)
            received += sum(tensor.spec.nbytes for tensor in answer.values())
            if result.kept is not None:
                kept.append((rows, result.kept))
            try:
                if reply:
                    outputs.append(take(answer, "hidden", dtype=self.dtype, shape=list(wanted)))
                    carries.append(_take_carry(answer, "carry.", wanted))
                if asked:
                    measured.append(take_measured(answer, asked, part.hidden[rows]))
                if capture:
                    states.append(take(answer, "states", dtype=self.dtype, shape=[blocks, *wanted]))
            except BadPeerDataError as error:
                raise BadPeerDataError(f"peer {short_peer(peer)}: {error}", peer=peer) from None
        joined = list(torch.cat(states, dim=1).unbind(0)) if capture else []
        seconds = time.perf_counter() - began
        here = bool(asked and extras.request and extras.request.measure.needs_lens and not asked.needs_lens)
        done = Pass(peer, part.start, part.end, compute, seconds, sent, received, here)
        note_pass(done)
        hidden, carry = (torch.cat(outputs), _join(carries)) if reply else (part.hidden[:0], {})
        found = [MeasuredPart(asked, join_rows(measured))] if asked else []
        held = sum(rows.stop - rows.start for rows, _ in kept)
        if kept and held == part.hidden.shape[0]:
            part = replace(part, kept=Kept(peer, tuple(kept)))
        return part, _Answer(hidden, carry, joined, found, done)

    async def _ask_backward_of_kept(
        self,
        kept: Kept,
        part: Segment,
        tape: Tape,
        grad: torch.Tensor,
        grad_carry: Carry,
        adapter_grads: bool,
    ) -> SpanGradient:
        """As `_ask_backward`, of a pass that its server has kept: only gradients travel."""
        answers = _GradientAnswers(kept.peer, self.dtype, part, tape, adapter_grads)
        for rows, name in kept.names:
            request = Backward(self.model, part.start, part.end, kept=name)
            answers.ask(tensors := _gradients(rows, grad, grad_carry))
            result, answer = await self._streams.ask(kept.peer, request, tensors, BackwardResult)
            answers.take(rows, result, answer)
        return answers.joined()

    async def _ask_backward(
        self,
        peer: str,
        limits: Limits,
        part: Segment,
        tape: Tape,
        grad: torch.Tensor,
        grad_carry: Carry,
        adapter_grads: bool,
    ) -> SpanGradient:
        adapter = tape.adapter.within(part.start, part.end) if tape.adapter is not None else None
        wanted_of = adapter if adapter_grads else None
        answers = _GradientAnswers(peer, self.dtype, part, tape, adapter_grads)
        for rows in row_groups(part, beside_adapter(limits, wanted_of), copies_in=2):
            ops, vectors = _edits(tape.edits, part, rows)
            request = Backward(self.model, part.start, part.end, ops, adapter_grads=wanted_of is not None)
            tensors = _inputs(part, rows, tape.mask, tape.positions) + vectors + _gradients(rows, grad, grad_carry)
            answers.ask(tensors)
            result, answer = await self._ask(peer, request, tensors, BackwardResult, adapter, rows.start)
            answers.take(rows, result, answer)
        return answers.joined()

    async def _ask(
        self,
        peer: str,
        request: Forward | Backward,
        tensors: Sequence[RawTensor],
        expected: type[Answer],
        adapter: SpanAdapter | None,
        row: int,
    ) -> tuple[Answer, Mapping[str, RawTensor]]:
        """One request, its adapter sent before where the server lacks it; ``row`` is its first in the batch."""
        use = await self.adapters.ensure(peer, adapter, request.start, request.end, row=row)
        if use is None:
            return await self._streams.ask(peer, request, tensors, expected)
        try:
            named = msgspec.structs.replace(request, adapter=use)
            return await self._streams.ask(peer, named, tensors, expected)
        except PeerRefusedError as error:
            if error.code != "adapter":
                raise
            self.adapters.forget(peer)
        use = await self.adapters.ensure(peer, adapter, request.start, request.end, row=row)
        return await self._streams.ask(peer, msgspec.structs.replace(request, adapter=use), tensors, expected)


@dataclass(frozen=True)
class _Extras:
    """What a forward pass takes and gives besides hidden states. ``last``: nobody runs on from what comes back."""

    mask: torch.Tensor | None
    positions: torch.Tensor | None
    capture: bool
    edits: Edits | None
    request: Request | None = None
    reply: bool = True
    last: bool = False
    adapter: SpanAdapter | None = None
    ahead: Ahead | None = None

    def within(self, part: Segment) -> SpanAdapter | None:
        """The adapter of these blocks."""
        return None if self.adapter is None else self.adapter.within(part.start, part.end)


@dataclass(frozen=True)
class _Answer:
    hidden: torch.Tensor
    carry: Carry
    captured: list[torch.Tensor]
    measured: list[MeasuredPart]
    done: Pass


class _GradientAnswers:
    """What one server answers about the gradients of one part, group of rows by group of rows."""

    def __init__(self, peer: str, dtype: torch.dtype, part: Segment, tape: Tape, adapter_grads: bool) -> None:
        self._peer, self._dtype, self._part = peer, dtype, part
        adapter = tape.adapter if adapter_grads else None
        self._wanted = None if adapter is None else adapter.within(part.start, part.end)
        self._hidden: list[torch.Tensor] = []
        self._carry: list[dict[int, torch.Tensor]] = []
        self._adapters = AdapterSums()
        self._began, self._compute, self._sent, self._received = time.perf_counter(), 0.0, 0, 0

    def ask(self, tensors: Sequence[RawTensor]) -> None:
        """Count what is sent."""
        self._sent += sum(tensor.spec.nbytes for tensor in tensors)

    def take(self, rows: slice, result: BackwardResult, answer: Mapping[str, RawTensor]) -> None:
        """Check and keep one answer; `BadPeerDataError` names the peer."""
        self._compute += result.timing.compute
        self._received += sum(tensor.spec.nbytes for tensor in answer.values())
        shape = self._part.hidden[rows].shape
        try:
            self._hidden.append(take(answer, "grad", dtype=self._dtype, shape=list(shape)))
            self._carry.append(_take_carry(answer, "grad_carry.", shape))
            if self._wanted is not None:
                self._adapters.add(take_adapter_grads(answer, self._wanted))
        except BadPeerDataError as error:
            raise BadPeerDataError(f"peer {short_peer(self._peer)}: {error}", peer=self._peer) from None

    def joined(self) -> SpanGradient:
        """Of all rows."""
        part, seconds = self._part, time.perf_counter() - self._began
        sizes = (self._compute, seconds, self._sent, self._received)
        note_pass(Pass(self._peer, part.start, part.end, *sizes, backward=True))
        return SpanGradient(torch.cat(self._hidden), dict(_join(self._carry)), self._adapters.found)


@dataclass
class _Way:
    """Segments run, what left the last as the entry of an empty one, and what came back on the way."""

    output: Segment
    segments: list[Segment] = field(default_factory=list)
    captured: list[torch.Tensor] = field(default_factory=list)
    measured: list[MeasuredPart] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)


class _Retry:
    """One part of a pass, until it succeeds or the budget is over. The clock starts at the first failure."""

    def __init__(self, requests: BlockRequests, adapter: SpanAdapter | None) -> None:
        self._requests = requests
        self._adapter = adapter.uid if adapter is not None else ""
        self._directory = requests._directory
        self._deadline: float | None = None
        self._avoid: dict[str, float] = {}
        self._bad: set[str] = set()
        self._tried: list[str] = []
        self._failures = 0

    def succeeded(self, peer: str) -> None:
        self._deadline = None
        self._failures = 0

    async def plan(self, start: int, end: int) -> Sequence[PlannedHop]:
        options = self._requests.options
        missing: MissingBlocksError | None = None

        def possible(view: SwarmView) -> list[PlannedHop] | None:
            nonlocal missing
            try:
                return plan_chain(
                    view,
                    model=self._requests.model,
                    start=start,
                    end=end,
                    mode="throughput",
                    allowed=options.allowed_peers,
                    blocked=options.blocked_peers,
                    exclude=self._avoided(),
                    adapter=self._adapter,
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
                    model=self._requests.model,
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
            self._deadline = now + self._requests.options.retry_budget
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


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """`UserInputError` for NaN and infinity: a server would refuse them, and be right."""
    if not bool(torch.isfinite(tensor).all()):
        raise UserInputError(f"{what} have NaN or infinity in them; nothing was sent")


def row_groups(
    part: Segment, limits: Limits, *, copies_in: int = 1, copies_out: int = 1, extra_bytes: int = 0
) -> list[slice]:
    """The rows of a batch in groups that fit a server's limits, request and answer.

    Parameters
    ----------
    copies_in, copies_out
        How many tensors like the hidden states travel there and back.
    extra_bytes
        Of a row, besides.

    Raises
    ------
    UserInputError
        Not even one row fits.
    """
    rows, tokens = part.hidden.shape[:2]
    row_bytes = part.hidden[0].numel() * part.hidden.element_size()
    carry_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in part.carry.values())
    # positions of 8 bytes and a mask of 1 a token go along
    most_bytes = (
        max(row_bytes * copies_in, row_bytes * copies_out) + copies_in * carry_bytes + 9 * tokens + extra_bytes
    )
    frame = min(limits.frame_bytes, MAX_FRAME_BYTES)
    most = min(limits.batch, limits.part_tokens // tokens, frame // most_bytes)
    if most < 1:
        raise UserInputError(
            f"sequences of {tokens} tokens are more than a server takes in one piece "
            f"({limits.part_tokens} tokens, {frame >> 20} MB): cut the text, or use a session, which goes in parts"
        )
    return [slice(at, min(at + most, rows)) for at in range(0, rows, most)]


def _measured_groups(part: Segment, limits: Limits, asked: Measure | None) -> list[slice]:
    """Rows as `row_groups`, with room for what is measured of them; empty if nothing is."""
    if not asked:
        return []
    narrow = msgspec.structs.replace(limits, batch=min(limits.batch, most_rows(asked, part.hidden)))
    # the final states travel with the request, the measurements with the answer
    extra = max(answer_bytes(asked, part.hidden), part.hidden[0].numel() * part.hidden.element_size())
    return row_groups(part, narrow, extra_bytes=extra)


def _most_captured(hidden: torch.Tensor, limits: Limits) -> int:
    """How many blocks fit one request: the captured states of all of them come back in one frame."""
    row_bytes = hidden[0].numel() * hidden.element_size() + 9 * hidden.shape[1]
    return max(1, min(limits.frame_bytes, MAX_FRAME_BYTES) // row_bytes - 1)


def _inputs(
    part: Segment, rows: slice, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> list[RawTensor]:
    tensors = [pack("hidden", part.hidden[rows])]
    if mask is not None:
        tensors.append(pack("mask", mask[rows]))
    if positions is not None:
        tensors.append(pack("positions", positions if positions.shape[0] == 1 else positions[rows]))
    return tensors + [pack(f"carry.{index}", tensor[rows]) for index, tensor in part.carry.items()]


def _gradients(rows: slice, grad: torch.Tensor, grad_carry: Carry) -> list[RawTensor]:
    return [
        pack("grad", grad[rows]),
        *(pack(f"grad_carry.{index}", tensor[rows]) for index, tensor in grad_carry.items()),
    ]


def _edits(
    edits: Edits | None, part: Segment, rows: slice, *, measured: bool = False
) -> tuple[list[EditOp], list[RawTensor]]:
    """The edits of these rows at these blocks; rows are numbered in the request, not in the batch.

    Those of the state after the last block are only of use where it is measured.
    """
    if not edits:
        return [], []
    ours = [op for op in edits.ops if op.row is None or rows.start <= op.row < rows.stop]
    moved = [op if op.row is None else msgspec.structs.replace(op, row=op.row - rows.start) for op in ours]
    return Edits(tuple(moved), edits.vectors).packed(part.start, part.end + measured)


def _take_carry(answer: Mapping[str, RawTensor], prefix: str, like: Collection[int]) -> dict[int, torch.Tensor]:
    rows, tokens, *_ = like
    return {
        int(name.removeprefix(prefix)): take(answer, name, dtype=CARRY_DTYPES, shape=[rows, tokens, -1])
        for name in answer
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    }


def _join(carries: Sequence[Mapping[int, torch.Tensor]]) -> Carry:
    names = carries[0].keys()
    if any(one.keys() != names for one in carries):
        raise SessionError("parts of one batch came back with different extra outputs")
    return {name: torch.cat([one[name] for one in carries]) for name in names}
