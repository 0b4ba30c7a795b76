"""Blocks without caches, over the swarm: forward and backward passes for training and for whole texts.

A pass is a chain of independent requests. The client keeps what entered each server's blocks, so that any part of a
pass can be run again elsewhere: when a server is lost, only its blocks are planned anew.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec
import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.measuring import join_rows, measure_states
from nbrunner.client.adapter_grads import AdapterGrads, beside_adapter, most_adapted
from nbrunner.client.adapters import AdapterSender
from nbrunner.client.candidates import SessionOptions
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.measuring import (
    MeasuredPart,
    Request,
    check_request,
    check_size,
    most_layers,
    take_measured,
)
from nbrunner.client.request_backward import BackwardRequests, Summing
from nbrunner.client.request_retry import Retry
from nbrunner.client.request_streams import Answer, RequestStreams
from nbrunner.client.request_tensors import (
    check_finite,
    edit_tensors,
    input_tensors,
    join_carries,
    measured_groups,
    most_captured,
    row_groups,
    take_carry,
)
from nbrunner.client.runner import Ahead, Carry, ForwardOutput, Gradients, Kept, Pass, Segment, Tape
from nbrunner.client.watch import note_pass
from nbrunner.errors import (
    BadPeerDataError,
    PeerError,
    PeerRefusedError,
)
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.requests import Backward, Forward, ForwardResult
from nbrunner.protocol.tensors import pack, take
from nbrunner.swarm.routing import PlannedHop

logger = logging.getLogger(__name__)

LENS = "lens"
"""In a record's features: that server holds final norm and head."""

KEEP = "keep"
"""Feature of servers that can keep a pass for its gradients."""


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
        self._pending: Counter[str] = Counter()
        self.adapters = AdapterSender(self._streams, model)

    @property
    def streams(self) -> RequestStreams:
        """For other requests to the same servers."""
        return self._streams

    async def close(self) -> None:
        await self._streams.close()

    async def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
        summing: Summing | None = None,
    ) -> Gradients:
        """As `nbrunner.client.runner.BlockRunner.backward`; errors as `forward`.

        With ``summing`` servers may keep the gradients of the adapter, for `take_sums`.
        """
        back = BackwardRequests(self)
        return await back.run(tape, grad, captured, adapter_grads, input_grad, summing)

    async def take_sums(self, summing: Summing, adapter: SpanAdapter) -> list[AdapterGrads]:
        """The gradients of an adapter that servers have added up over the groups of a batch."""
        return await BackwardRequests(self).take_sums(summing, adapter)

    def retry(self, adapter: SpanAdapter | None) -> Retry:
        """For one part of a pass."""
        return Retry(self._directory, self.model, self.options, adapter, self._pending)

    def mark_failed(self, peer: str, why: str) -> None:
        """Do not use a peer for a while."""
        self._directory.mark_failed(peer, why)

    async def run_again(self, piece: Segment, tape: Tape) -> tuple[list[Segment], Segment]:
        """Blocks of a finished pass once more: the segments run, and what left them as the entry of the next."""
        extras = _Extras(tape.mask, tape.positions, False, tape.edits, adapter=tape.adapter)
        way = await self._forward(piece, extras)
        return way.segments, way.output

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
        way = await self._forward(Segment(start, end, hidden.detach()), extras)
        return ForwardOutput(
            way.output.hidden,
            way.captured if capture else None,
            Tape(tuple(way.segments), mask, positions, edits, adapter),
            tuple(way.passes),
        )

    def servers(self, start: int, end: int, adapter: SpanAdapter | None) -> int:
        """How many servers could be busy with these blocks at the same time, as far as is known now."""
        options, uid = self.options, adapter.uid if adapter is not None else ""
        return sum(
            entry.record.model == self.model
            and entry.record.state == "online"
            and entry.record.start < end
            and entry.record.end > start
            and (options.allowed_peers is None or peer in options.allowed_peers)
            and (options.blocked_peers is None or peer not in options.blocked_peers)
            and (not uid or uid in entry.record.adapters)
            for peer, entry in self._directory.view.servers.items()
        )

    @contextmanager
    def _giving(self, hops: Sequence[PlannedHop]) -> Iterator[None]:
        """These have a part of a batch for as long as it lasts: other parts go to others if there are some."""
        peers = [hop.peer for hop in hops]
        self._pending.update(peers)
        try:
            yield
        finally:
            self._pending.subtract(peers)

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

    # -- passes --------------------------------------------------------------------------------------------------

    async def _forward(self, entry: Segment, extras: _Extras) -> _Way:
        way = _Way(entry)
        at = entry
        retry = self.retry(extras.adapter)
        while at.start < entry.end:
            hops = await retry.plan(at.start, entry.end)
            with self._giving(hops), self.adapters.ahead(hops, extras.adapter):
                for hop in hops:
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
            return most_captured(at.hidden, limits)
        asked = self._asked(peer, at.start, at.end, extras)
        if not asked:
            return 1 << 30
        most = most_layers(asked, at.hidden, limits)
        return 1 << 30 if len(asked.layers) <= most else asked.layers[most] - at.start - 1

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
        for rows in measured_groups(part, limits, asked) or row_groups(part, room, copies_out=copies):
            ops, vectors = edit_tensors(extras.edits, part, rows, measured=bool(asked))
            tensors = input_tensors(part, rows, extras.mask, extras.positions) + vectors
            if asked and asked.final and extras.request and extras.request.final is not None:
                tensors.append(pack("final", extras.request.final[rows].to(self.dtype)))
            wanted = part.hidden[rows].shape
            request = Forward(self.model, part.start, part.end, capture, ops, asked, reply)
            if ahead is not None:
                request = msgspec.structs.replace(request, keep=True, adapter_grads=ahead.adapter_grads)
            result, answer = await self.ask(peer, request, tensors, ForwardResult, extras.adapter, rows.start)
            compute += result.timing.compute
            sent += sum(tensor.spec.nbytes for tensor in tensors)
            received += sum(tensor.spec.nbytes for tensor in answer.values())
            if result.kept is not None:
                kept.append((rows, result.kept))
            try:
                if reply:
                    outputs.append(take(answer, "hidden", dtype=self.dtype, shape=list(wanted)))
                    carries.append(take_carry(answer, "carry.", wanted))
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
        hidden, carry = (torch.cat(outputs), join_carries(carries)) if reply else (part.hidden[:0], {})
        found = [MeasuredPart(asked, join_rows(measured))] if asked else []
        held = sum(rows.stop - rows.start for rows, _ in kept)
        if kept and held == part.hidden.shape[0]:
            part = replace(part, kept=Kept(peer, tuple(kept)))
        return part, _Answer(hidden, carry, joined, found, done)

    async def ask(
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


@dataclass
class _Way:
    """Segments run, what left the last as the entry of an empty one, and what came back on the way."""

    output: Segment
    segments: list[Segment] = field(default_factory=list)
    captured: list[torch.Tensor] = field(default_factory=list)
    measured: list[MeasuredPart] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
