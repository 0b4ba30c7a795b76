"""Backward passes over the swarm: last blocks first, wherever they were run or can be run again.

Groups of rows that are under way at the same time are answered with the gradients of their hidden states alone;
those of an adapter, which would be as large for each group, are added up in the server and fetched once. What was
added up is counted: if a server does not have exactly what it should, its part is run again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.passes import SpanGradient
from nbrunner.client.adapter_grads import AdapterGrads, AdapterSums, beside_adapter, take_adapter_grads
from nbrunner.client.request_tensors import (
    check_finite,
    edit_tensors,
    gradient_tensors,
    input_tensors,
    join_carries,
    row_groups,
    take_carry,
)
from nbrunner.client.runner import Carry, Gradients, Kept, Pass, Segment, Tape
from nbrunner.client.watch import note_pass
from nbrunner.errors import BadPeerDataError, PeerError, PeerRefusedError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.requests import AdapterSum, Backward, BackwardResult, SummedGradients, TakeSum
from nbrunner.protocol.tensors import take

if TYPE_CHECKING:
    from nbrunner.client.requests import BlockRequests

T = TypeVar("T")
logger = logging.getLogger(__name__)

SUMS = "sums"
"""Feature of servers that add up gradients of adapters."""


@dataclass(frozen=True)
class _Ticket:
    """Gradients that a server has added up: under which numbers, and how to have them computed once more."""

    peer: str
    start: int
    end: int
    numbers: frozenset[int]
    redo: Callable[[], Awaitable[SpanGradient]]


@dataclass
class Summing:
    """The sum that the groups of one batch share.

    Attributes
    ----------
    id
        Random.
    tickets
        What servers have added up so far.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    tickets: list[_Ticket] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def number(self) -> int:
        """For another request: what is answered twice is added once."""
        return next(self._numbers)


class BackwardRequests:
    """The backward half of `nbrunner.client.requests.BlockRequests`."""

    def __init__(self, requests: BlockRequests) -> None:
        self._requests = requests

    async def run(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        adapter_grads: bool,
        input_grad: bool,
        summing: Summing | None,
    ) -> Gradients:
        """As `BlockRequests.backward`."""
        for one in (grad, *captured.values()):
            if one is not None:
                check_finite(one, "the gradient")
        carry: Carry = {}
        adapters = AdapterSums()
        # below the first block that learns something nobody needs a gradient
        first = 0 if input_grad or tape.adapter is None or not adapter_grads else min(tape.adapter.blocks)
        for segment in reversed(tape.segments):
            if segment.end <= first:
                break
            inner = sorted(block for block in captured if segment.start < block < segment.end)
            for part in reversed(await self._cut(segment, inner, tape)):
                if grad is not None:
                    found = await self._part(part, tape, grad, carry, adapter_grads, summing)
                    grad, carry = found.hidden, found.carry
                    adapters.add(found.adapters)
                if part.start in captured:
                    # what was captured is the edited state; ``grad`` is with respect to the state before its edits
                    extra = captured[part.start]
                    extra = tape.edits.pull_back(extra, part.start) if tape.edits else extra
                    grad = extra if grad is None else grad + extra
        if adapter_grads and tape.adapter is not None and summing is None:
            adapters.fill(tape.adapter)
        if not input_grad:
            return Gradients(None, adapters.found)
        return Gradients(torch.zeros_like(tape.segments[0].hidden) if grad is None else grad, adapters.found)

    async def _cut(self, segment: Segment, blocks: Sequence[int], tape: Tape) -> list[Segment]:
        """The segment cut at some blocks; what enters the later pieces is computed again."""
        parts: list[Segment] = []
        for block in blocks:
            piece = Segment(segment.start, block, segment.hidden, segment.carry)
            run, output = await self._requests.run_again(piece, tape)
            parts += run
            segment = Segment(block, segment.end, output.hidden, output.carry)
        return [*parts, segment]

    async def _part(
        self,
        part: Segment,
        tape: Tape,
        grad: torch.Tensor,
        grad_carry: Carry,
        adapter_grads: bool,
        summing: Summing | None,
    ) -> SpanGradient:
        """One part, until somebody has answered."""
        retry = self._requests.retry(tape.adapter)
        if part.kept is not None:
            try:
                return await self._ask_kept(part.kept, part, tape, grad, grad_carry, adapter_grads, summing)
            except PeerError as error:
                if not (isinstance(error, PeerRefusedError) and error.code == "forgotten"):
                    await retry.failed(part.kept.peer, error)
        while True:
            hops = await retry.plan(part.start, part.end)
            if len(hops) > 1:
                # nobody holds all of it any more: run it again over those who do, and go back through each
                pieces = await self._cut(replace(part, kept=None), [hop.start for hop in hops[1:]], tape)
                adapters = AdapterSums()
                for piece in reversed(pieces):
                    found = await self._part(piece, tape, grad, grad_carry, adapter_grads, summing)
                    grad, grad_carry = found.hidden, found.carry
                    adapters.add(found.adapters)
                return SpanGradient(grad, dict(grad_carry), adapters.found)
            peer = hops[0].peer
            try:
                limits = await self._requests.streams.limits(peer)
                result = await self._ask(peer, limits, part, tape, grad, grad_carry, adapter_grads, summing)
            except PeerError as error:
                await retry.failed(peer, error)
            else:
                retry.succeeded(peer)
                return result

    async def _ask_kept(
        self,
        kept: Kept,
        part: Segment,
        tape: Tape,
        grad: torch.Tensor,
        grad_carry: Carry,
        adapter_grads: bool,
        summing: Summing | None,
    ) -> SpanGradient:
        """Of a pass that its server has kept: only gradients travel."""
        requests = self._requests
        redo = partial(self._part, replace(part, kept=None), tape, grad, grad_carry, adapter_grads, None)
        answers = _Answers(kept.peer, requests, part, tape, adapter_grads, summing, redo)
        for rows, name in kept.names:
            request = Backward(requests.model, part.start, part.end, kept=name, sum=answers.sum())
            tensors = answers.sending(gradient_tensors(rows, grad, grad_carry))
            result, answer = await requests.streams.ask(kept.peer, request, tensors, BackwardResult)
            answers.take(rows, request, result, answer)
        return answers.joined()

    async def _ask(
        self,
        peer: str,
        limits: Limits,
        part: Segment,
        tape: Tape,
        grad: torch.Tensor,
        grad_carry: Carry,
        adapter_grads: bool,
        summing: Summing | None,
    ) -> SpanGradient:
        """Of a pass that is run again from its inputs."""
        requests = self._requests
        adapter = tape.adapter.within(part.start, part.end) if tape.adapter is not None else None
        wanted = adapter if adapter_grads else None
        redo = partial(self._part, replace(part, kept=None), tape, grad, grad_carry, adapter_grads, None)
        answers = _Answers(peer, requests, part, tape, adapter_grads, summing, redo)
        for rows in row_groups(part, beside_adapter(limits, wanted), copies_in=2):
            ops, vectors = edit_tensors(tape.edits, part, rows)
            request = Backward(
                requests.model, part.start, part.end, ops, adapter_grads=wanted is not None, sum=answers.sum()
            )
            inputs = input_tensors(part, rows, tape.mask, tape.positions) + vectors
            tensors = answers.sending(inputs + gradient_tensors(rows, grad, grad_carry))
            result, answer = await requests.ask(peer, request, tensors, BackwardResult, adapter, rows.start)
            answers.take(rows, request, result, answer)
        return answers.joined()

    async def take_sums(self, summing: Summing, adapter: SpanAdapter) -> list[AdapterGrads]:
        """What servers have added up, each once."""
        by_place: dict[tuple[str, int, int], list[_Ticket]] = {}
        for ticket in summing.tickets:
            by_place.setdefault((ticket.peer, ticket.start, ticket.end), []).append(ticket)
        return await _together(self._fetch_sum(summing, adapter, tickets) for tickets in by_place.values())

    async def _fetch_sum(self, summing: Summing, adapter: SpanAdapter, tickets: list[_Ticket]) -> AdapterGrads:
        peer, start, end = tickets[0].peer, tickets[0].start, tickets[0].end
        wanted = adapter.within(start, end)
        sums = AdapterSums()
        if wanted is None:
            return sums.found
        try:
            request = TakeSum(summing.id, start, end)
            result, answer = await self._requests.streams.ask(peer, request, (), SummedGradients)
            numbers = frozenset[int]().union(*(ticket.numbers for ticket in tickets))
            if frozenset(result.numbers) != numbers:
                raise BadPeerDataError(f"peer {short_peer(peer)} has added up something else", peer=peer)
            sums.add(take_adapter_grads(answer, wanted))
        except PeerError as error:
            logger.info("the sum of %s is lost (%s); its part is run again", short_peer(peer), error)
            if not (isinstance(error, PeerRefusedError) and error.code == "forgotten"):
                self._requests.mark_failed(peer, str(error))
            sums = AdapterSums()
            for ticket in tickets:
                sums.add((await ticket.redo()).adapters)
        return sums.found


class _Answers:
    """What one server answers about the gradients of one part, group of rows by group of rows."""

    def __init__(
        self,
        peer: str,
        requests: BlockRequests,
        part: Segment,
        tape: Tape,
        adapter_grads: bool,
        summing: Summing | None,
        redo: Callable[[], Awaitable[SpanGradient]],
    ) -> None:
        self._peer, self._dtype, self._part, self._redo = peer, requests.dtype, part, redo
        adapter = tape.adapter if adapter_grads else None
        self._wanted = None if adapter is None else adapter.within(part.start, part.end)
        can_sum = self._wanted is not None and SUMS in requests.streams.features(peer)
        self._summing = summing if can_sum else None
        self._hidden: list[torch.Tensor] = []
        self._carry: list[dict[int, torch.Tensor]] = []
        self._adapters = AdapterSums()
        self._summed: set[int] = set()
        self._began, self._compute, self._sent, self._received = time.perf_counter(), 0.0, 0, 0

    def sum(self) -> AdapterSum | None:
        """Where the next request's gradients of the adapter are to be added; None: they are to come back."""
        return None if self._summing is None else AdapterSum(self._summing.id, self._summing.number())

    def sending(self, tensors: list[RawTensor]) -> list[RawTensor]:
        """The same, counted."""
        self._sent += sum(tensor.spec.nbytes for tensor in tensors)
        return tensors

    def take(self, rows: slice, request: Backward, result: BackwardResult, answer: Mapping[str, RawTensor]) -> None:
        """Check and keep one answer; `BadPeerDataError` names the peer."""
        self._compute += result.timing.compute
        self._received += sum(tensor.spec.nbytes for tensor in answer.values())
        shape = self._part.hidden[rows].shape
        try:
            self._hidden.append(take(answer, "grad", dtype=self._dtype, shape=list(shape)))
            self._carry.append(take_carry(answer, "grad_carry.", shape))
            if result.summed and request.sum is not None:
                self._summed.add(request.sum.number)
            elif self._wanted is not None:
                self._adapters.add(take_adapter_grads(answer, self._wanted))
            if self._summed and len(self._summed) < len(self._hidden):
                raise BadPeerDataError("added up some gradients and sent others")
        except BadPeerDataError as error:
            raise BadPeerDataError(f"peer {short_peer(self._peer)}: {error}", peer=self._peer) from None

    def joined(self) -> SpanGradient:
        """Of all rows."""
        part, seconds = self._part, time.perf_counter() - self._began
        sizes = (self._compute, seconds, self._sent, self._received)
        note_pass(Pass(self._peer, part.start, part.end, *sizes, backward=True))
        if self._summing is not None and self._summed:
            ticket = _Ticket(self._peer, part.start, part.end, frozenset(self._summed), self._redo)
            self._summing.tickets.append(ticket)
        return SpanGradient(torch.cat(self._hidden), dict(join_carries(self._carry)), self._adapters.found)


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. The first error is raised once the others have been stopped."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
