"""How one try of a step is put into frames, and how its answers are put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nbrunner.client.hop import HopStream
from nbrunner.client.journal import PendingStep, Segment
from nbrunner.errors import BadPeerDataError, PeerRefusedError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.greeting import EIGHT_BITS
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.steps import Captured, HopTiming, Step, StepResult
from nbrunner.protocol.tensors import pack, pack_8bit, take

PIPELINE_TOKENS = 128
"""Least tokens in a part of a prefill that several servers work on at once. On CPU, a Llama of hidden 1024 runs
128 tokens at the same speed per token as 512; below that matrices get too thin."""

PARTS_PER_HOP = 2
"""With p parts and n servers a prefill takes (p + n - 1) / p of one server's share: two parts per server are enough
to hide most of it, and each part costs a message per hop."""


@dataclass(frozen=True)
class StepOutput:
    """What a step returns.

    Attributes
    ----------
    hidden
        [batch, tokens, ...], what leaves the last block.
    carry
        Further outputs of the last block, by their index, where an architecture has them.
    captured
        For each block, [batch, tokens, ...] that entered it; None unless asked for.
    timings
        One entry a hop and part.
    """

    hidden: torch.Tensor
    carry: dict[int, torch.Tensor]
    captured: list[torch.Tensor] | None
    timings: list[HopTiming]


def part_ends(begin: int, end: int, *, rows: int, token_bytes: int, limits: Sequence[Limits]) -> list[int]:
    """Where the parts of tokens ``[begin, end)`` end, so that each fits every hop's limits and long ones pipeline.

    Parameters
    ----------
    rows
        Sequences in the batch.
    token_bytes
        Bytes of one token of one row on the wire.
    limits
        Of every server on the way.
    """
    most = min(
        min(limit.part_tokens for limit in limits) // max(rows, 1),
        min(limit.frame_bytes for limit in limits) // max(rows * token_bytes, 1),
    )
    if most < 1:
        raise PeerRefusedError(
            f"a batch of {rows} rows is more than these servers take at once; use fewer rows", code="limit"
        )
    size = most
    if len(limits) > 1:
        share = -(-(end - begin) // (PARTS_PER_HOP * len(limits)))
        size = min(most, max(share, -(-PIPELINE_TOKENS // max(rows, 1))))
    return [*range(begin + size, end, size), end]


async def send_segment(
    first: HopStream,
    pending: PendingStep,
    attempt: int,
    segment: Segment,
    *,
    limits: Sequence[Limits],
    hidden: torch.Tensor,
    carry: Mapping[int, torch.Tensor],
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    capture: bool,
    in_8bit: bool = False,
) -> None:
    """Send a step to the first hop of a segment, in parts.

    Parameters
    ----------
    hidden, carry
        From ``segment.source_from`` to the step's end.
    mask
        [batch, end] bool or None.
    positions
        [1 or batch, end - segment.positions_from] or None.
    in_8bit
        Send hidden states with 8 bits a number, if the first hop understands that.
    """
    token_bytes = hidden[:1, :1].numel() * hidden.element_size()
    ends = part_ends(segment.source_from, pending.end, rows=hidden.shape[0], token_bytes=token_bytes, limits=limits)
    shared: list[RawTensor] = []
    if mask is not None:
        shared.append(pack("mask", mask))
    if positions is not None:
        shared.append(pack("positions", positions))
    begin = segment.source_from
    for end in ends:
        window = slice(begin - segment.source_from, end - segment.source_from)
        step = Step(
            step=pending.number,
            attempt=attempt,
            position=begin,
            end=pending.end,
            reply_from=segment.reply_from,
            route=list(segment.hops),
            ops=list(pending.ops),
            positions_from=segment.positions_from,
            capture=capture,
        )
        rounded = in_8bit and EIGHT_BITS in first.features
        tensors = pack_8bit("hidden", hidden[:, window]) if rounded else [pack("hidden", hidden[:, window])]
        tensors += [pack(f"carry.{index}", tensor[:, window]) for index, tensor in carry.items()]
        await first.send(step, [*tensors, *shared])
        begin = end


class Receiver:
    """Collects the answers to one try of a step over one segment, and checks every one of them."""

    def __init__(
        self, pending: PendingStep, attempt: int, segment: Segment, capture: bool, *, like: torch.Tensor
    ) -> None:
        self._pending = pending
        self._attempt = attempt
        self._segment = segment
        self._like = like
        self._upto = segment.reply_from
        self._parts: list[torch.Tensor] = []
        self._carry: dict[int, list[torch.Tensor]] = {}
        self._states: dict[str, list[torch.Tensor]] = {}
        self._states_upto = {hop.session: pending.begin for hop in segment.hops} if capture else {}
        self.timings: list[HopTiming] = []

    @property
    def complete(self) -> bool:
        return self._upto == self._pending.end and all(
            upto == self._pending.end for upto in self._states_upto.values()
        )

    @property
    def hidden(self) -> torch.Tensor:
        """[batch, end - reply_from, ...]."""
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)

    @property
    def carry(self) -> dict[int, torch.Tensor]:
        return {index: torch.cat(parts, dim=1) for index, parts in self._carry.items()}

    @property
    def captured(self) -> dict[int, torch.Tensor]:
        """Block index → hidden states that entered it for the step's tokens."""
        found = {}
        for hop in self._segment.hops:
            if hop.session in self._states_upto:
                stacked = torch.cat(self._states[hop.session], dim=2)
                found.update({hop.start + index: stacked[index] for index in range(stacked.shape[0])})
        return found

    def take(self, hop: HopStream, message: AnyMessage, tensors: Mapping[str, RawTensor]) -> bool:
        """Take an answer; False if it belongs to something else. `BadPeerDataError` if it cannot be right."""
        if isinstance(message, StepResult):
            return self._take_result(hop, message, tensors)
        if isinstance(message, Captured):
            return self._take_captured(hop, message, tensors)
        raise BadPeerDataError(f"sent {type(message).__name__} in the middle of a step")

    def _take_result(self, hop: HopStream, message: StepResult, tensors: Mapping[str, RawTensor]) -> bool:
        if (message.step, message.attempt) != (self._pending.number, self._attempt):
            return False
        if hop.session != self._segment.hops[-1].session:
            raise BadPeerDataError("answered a step though it is not the last of the chain")
        hidden = take(
            tensors, "hidden", dtype=self._like.dtype, shape=[self._like.shape[0], None, *self._like.shape[2:]]
        )
        if message.position != self._upto or not 0 < hidden.shape[1] <= self._pending.end - self._upto:
            raise BadPeerDataError(
                f"answered for positions {message.position}+{hidden.shape[1]}, expected {self._upto} on"
            )
        self._upto += hidden.shape[1]
        self._parts.append(hidden)
        for name in tensors:
            if name.startswith("carry.") and name[6:].isdecimal():
                shape = [self._like.shape[0], hidden.shape[1], -1]
                carry = take(tensors, name, dtype=[self._like.dtype, torch.float32, torch.int64], shape=shape)
                self._carry.setdefault(int(name[6:]), []).append(carry)
        self.timings += message.timings
        return True

    def _take_captured(self, hop: HopStream, message: Captured, tensors: Mapping[str, RawTensor]) -> bool:
        if (message.step, message.attempt) != (self._pending.number, self._attempt):
            return False
        upto = self._states_upto.get(hop.session)
        entry = next((one for one in self._segment.hops if one.session == hop.session), None)
        if upto is None or entry is None:
            return False
        if (message.start, message.end) != (entry.start, entry.end):
            raise BadPeerDataError(f"captured blocks [{message.start}, {message.end}), not its own")
        shape = [entry.end - entry.start, self._like.shape[0], None, *self._like.shape[2:]]
        states = take(tensors, "states", dtype=self._like.dtype, shape=shape)
        begin = message.position
        if begin + states.shape[2] <= upto:
            return True  # from before the step's tokens: a hop that is being rebuilt runs those too
        if begin > upto:
            raise BadPeerDataError(f"captured from position {begin}, expected {upto}")
        self._states.setdefault(hop.session, []).append(states[:, :, upto - begin :])
        self._states_upto[hop.session] = begin + states.shape[2]
        return True
