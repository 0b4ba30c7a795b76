"""What leaves a session: parts to the next hop, results and captured states to the client, and word of failures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch

from nbrunner.errors import PeerError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.greeting import EIGHT_BITS
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import MAX_FRAME_BYTES
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.steps import Captured, HopTiming, Step, StepFailed, StepResult
from nbrunner.protocol.tensors import pack, pack_8bit
from nbrunner.server.inputs import windows
from nbrunner.server.link import Link
from nbrunner.server.session_state import PartPlan, next_hop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

logger = logging.getLogger(__name__)

FORWARD_TOKENS = 512
"""Tokens × rows in one frame when a transcript is passed on: the next hop begins while the rest is on its way."""

INLINE_TOKENS = 16
"""Up to so many tokens × rows are sent at once, which takes less than handing them to another task."""

_SHARED = ("mask", "positions")


class Outgoing:
    """The sending side of one session. Everything goes out in the order in which it was handed over.

    Parameters
    ----------
    stream
        The client's.
    session, blocks
        Of the session.
    in_8bit
        Hidden states may go out with 8 bits a number, to whoever understands that.
    """

    def __init__(
        self, node: Node, stream: Stream, session: str, blocks: tuple[int, int], *, in_8bit: bool = False
    ) -> None:
        self._node = node
        self._stream = stream
        self._session = session
        self._blocks = blocks
        self._in_8bit = in_8bit
        self._link: Link | None = None
        self._pushed: tuple[int, int] = (0, 0)
        self._failed: tuple[int, int] = (0, 0)
        self._order = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def choose_link(self, part: Step) -> None:
        """Have a link to the part's next hop, opening it while the part is computed; drop one to another hop."""
        hop = next_hop(part)
        if self._link is not None and (hop is None or self._link.session != hop.session):
            self._link.close()
            self._link = None
        if hop is not None and self._link is None and (part.step, part.attempt) != self._failed:
            self._link = Link(self._node, hop, self._broken)

    async def pass_on(
        self,
        part: Step,
        plan: PartPlan,
        held: Mapping[str, torch.Tensor],
        received: Mapping[str, RawTensor],
        timing: HopTiming,
        captured: Sequence[tuple[int, torch.Tensor]],
    ) -> None:
        """Send what follows from a part. Large sends run beside the next part's computation.

        Parameters
        ----------
        held
            The window of the transcript that the plan says.
        received
            The part's tensors; mask and positions go on as they came.
        captured
            (position, states [blocks, batch, tokens, ...]) for the client.
        """
        job = self._send(part, plan, held, received, timing, captured)
        if (plan.send_to - plan.send_from) * plan.batch <= INLINE_TOKENS and not captured and not self._tasks:
            await job
        else:
            self._start(job)

    def tell(self, message: AnyMessage) -> None:
        """Send something to the client soon."""
        self._start(self.tell_now(message))

    async def tell_now(self, message: AnyMessage) -> None:
        """Send something to the client; if it is gone, its stream says so elsewhere."""
        try:
            await self._stream.send(message)
        except PeerError as error:
            logger.debug("session %s: the client is gone: %s", self._session[:8], error)

    async def close(self) -> None:
        self._closed = True
        if self._link is not None:
            self._link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(
        self,
        part: Step,
        plan: PartPlan,
        held: Mapping[str, torch.Tensor],
        received: Mapping[str, RawTensor],
        timing: HopTiming,
        captured: Sequence[tuple[int, torch.Tensor]],
    ) -> None:
        async with self._order:
            try:
                for position, states in captured:
                    await self._send_captured(part, position, states)
                if plan.send_from < plan.send_to and next_hop(part) is None:
                    await self._answer(part, plan, held, [*part.timings, timing])
            except PeerError as error:
                logger.debug("session %s: the client is gone: %s", self._session[:8], error)
            if plan.send_from < plan.send_to and next_hop(part) is not None:
                shared = [received[name] for name in _SHARED if name in received]
                await self._push(part, plan, held, shared, [*part.timings, timing])

    async def _send_captured(self, part: Step, position: int, states: torch.Tensor) -> None:
        size = MAX_FRAME_BYTES // max(1, states[:, :, :1].numel() * states.element_size())
        for begin, end in windows(0, states.shape[2], size):
            message = Captured(part.step, part.attempt, position + begin, *self._blocks)
            await self._stream.send(message, [pack("states", states[:, :, begin:end])])

    async def _answer(
        self, part: Step, plan: PartPlan, held: Mapping[str, torch.Tensor], timings: list[HopTiming]
    ) -> None:
        pieces = _pieces(held, plan, MAX_FRAME_BYTES, plan.send_to - plan.send_from, in_8bit=self._in_8bit)
        for begin, tensors in pieces:
            await self._stream.send(StepResult(part.step, part.attempt, begin, part.end, timings), tensors)

    async def _push(
        self,
        part: Step,
        plan: PartPlan,
        held: Mapping[str, torch.Tensor],
        shared: list[RawTensor],
        timings: list[HopTiming],
    ) -> None:
        hop, link, key = part.route[1], self._link, (part.step, part.attempt)
        if key == self._failed or (link is not None and link.session != hop.session):
            return  # the client knows already, or a later attempt has chosen another way
        if link is None:  # it broke while this part was computed, and nothing of this attempt had been pushed
            self._report(key, hop.peer, "the connection was lost")
            return
        self._pushed = key
        try:
            limits = await link.limits()
            most = max(1, min(FORWARD_TOKENS, limits.part_tokens) // plan.batch)
            in_8bit = self._in_8bit and EIGHT_BITS in await link.features()
            for begin, tensors in _pieces(held, plan, limits.frame_bytes, most, in_8bit=in_8bit):
                onward = msgspec.structs.replace(part, position=begin, route=part.route[1:], timings=timings)
                await link.send(onward, [*tensors, *shared])
        except PeerError as error:
            self._broken(link, str(error))

    def _broken(self, link: Link, reason: str) -> None:
        """The next hop is gone, or said no: whoever waits for the step must know."""
        if link is not self._link or self._closed:
            return
        self._link = None
        link.close()
        if self._pushed != (0, 0):
            self._report(self._pushed, link.peer, reason)

    def _report(self, key: tuple[int, int], peer: str, reason: str) -> None:
        if key == self._failed:
            return
        self._failed = key
        text = f"cannot push to {short_peer(peer)}: {reason}"
        self.tell(StepFailed(*key, "link", text[:2000], peer))


def _pieces(
    held: Mapping[str, torch.Tensor], plan: PartPlan, frame_bytes: int, tokens: int, *, in_8bit: bool
) -> Iterator[tuple[int, list[RawTensor]]]:
    """A window of the transcript as (begin, tensors) that fit a frame each, and hold at most so many tokens."""
    per_token = sum(tensor[:, :1].numel() * tensor.element_size() for tensor in held.values())
    for begin, end in windows(plan.send_from, plan.send_to, min(tokens, frame_bytes // max(1, per_token))):
        window = slice(begin - plan.send_from, end - plan.send_from)
        parts = {name: tensor[:, window] for name, tensor in held.items()}
        rounded = pack_8bit("hidden", parts.pop("hidden")) if in_8bit else []
        yield begin, [*rounded, *(pack(name, tensor) for name, tensor in parts.items())]
