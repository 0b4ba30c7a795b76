"""What a server is asked about itself: whether it is there, and what it serves."""

from __future__ import annotations

from nbrunner.protocol.limits import Limits
from nbrunner.protocol.records import ServerRecord
from nbrunner.protocol.schema import Message, Number, Position


class Ping(Message, frozen=True):
    """Answered by the event loop, not by the compute thread: an answer says that the process is alive."""

    nonce: Number


class Pong(Message, frozen=True):
    """``step``, ``length``: the last step seen and tokens held by the stream's session, if it has one.
    ``busy``: a part of it waits or runs.
    """

    nonce: Number
    step: Number = 0
    length: Position = 0
    busy: bool = False


class GetInfo(Message, frozen=True):
    """Answered by `Info`."""


class Info(Message, frozen=True):
    record: ServerRecord
    limits: Limits
