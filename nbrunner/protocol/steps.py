"""Steps on their way through a chain: what each hop is sent, and what the client hears of it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nbrunner.protocol.refusals import RefusalCode
from nbrunner.protocol.schema import Block, Id, Message, Number, Peer, Position, Reason, Seconds


class CacheOp(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One change of a session's caches before a step.

    ``crop``: keep the first ``count`` tokens (absolute, so that it is right whether or not an interrupted step
    had arrived). ``select``: keep these rows, in this order (beam search).
    ``repeat``: every row ``count`` times, neighbours together. ``reset``: forget everything.
    """

    kind: Literal["crop", "select", "repeat", "reset"]
    count: Position = 0
    rows: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=65535)]], msgspec.Meta(max_length=4096)] = []


class Hop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One server on a step's way.

    Attributes
    ----------
    peer, session
        Where.
    start, end
        The blocks it runs, inside the span the session was opened for.
    position
        Tokens the client believes this hop to hold (after the step's ops): what it must be sent starts there.
    rebuild
        The hop is new in the chain and is being filled from its neighbour's transcript, which already has the
        step's ops in it: it must not apply them again.
    """

    peer: Peer
    session: Id
    start: Block
    end: Block
    position: Position = 0
    rebuild: bool = False


class HopTiming(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Seconds one hop spent on a step: waiting for the device, computing, and in the server in all."""

    peer: Peer
    queue: Seconds
    compute: Seconds
    total: Seconds


class Step(Message, frozen=True):
    """One part of a step: hidden states of consecutive tokens, on their way through the chain.

    Tensors: ``hidden`` [batch, tokens, ...] for positions ``[position, position + tokens)``; optional ``mask``
    [batch, >= position + tokens] bool, 2D and cumulative, absent when all true; optional ``positions``
    [1 or batch, ...] int64, the position ids of ``[positions_from, ...)``; optional ``carry.N``.

    Attributes
    ----------
    step
        Number of the step in its session, from 1, rising. A server applies ``ops`` when it first sees a number
        and never again; parts it has already computed it only forwards.
    attempt
        Number of the try; replies name it.
    position
        Where this part starts.
    end
        Where the whole step ends. Parts follow one another until one reaches it.
    reply_from
        The client wants the last hop's outputs from this position on.
    route
        The hops from the receiver on, the receiver first. The last one answers on the client's stream.
    capture
        Each hop also sends the client the hidden states that enter its blocks (`Captured`).
    """

    step: Number
    attempt: Number
    position: Position
    end: Position
    reply_from: Position
    route: Annotated[list[Hop], msgspec.Meta(min_length=1, max_length=256)]
    ops: Annotated[list[CacheOp], msgspec.Meta(max_length=64)] = []
    positions_from: Position = 0
    capture: bool = False
    timings: Annotated[list[HopTiming], msgspec.Meta(max_length=256)] = []


class StepResult(Message, frozen=True):
    """Outputs of the last hop. Tensors: ``hidden`` [batch, tokens, ...] from ``position`` on, ``carry.N``."""

    step: Number
    attempt: Number
    position: Position
    end: Position
    timings: Annotated[list[HopTiming], msgspec.Meta(max_length=256)] = []


class Captured(Message, frozen=True):
    """Inputs of blocks ``[start, end)``. Tensor: ``states`` [blocks, batch, tokens, ...] from ``position`` on."""

    step: Number
    attempt: Number
    position: Position
    start: Block
    end: Block


class StepFailed(Message, frozen=True):
    """A step stopped at the hop that sends this, on the client's stream. ``peer`` is who is to blame, if not it."""

    step: Number
    attempt: Number
    code: RefusalCode
    reason: Reason
    peer: Peer | None = None
