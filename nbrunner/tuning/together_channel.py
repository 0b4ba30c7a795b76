"""What the process that trains and its child that averages say to each other, over the child's standard streams.

::

    header length (u32, big endian) | body length (u64) | header | body
    header = msgpack of one of the messages below      body = float32 values, all parameters in one vector

No pickle: the child has read what strangers sent.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec

from nbrunner.protocol.together import Teaching

PREFIX = struct.Struct(">IQ")
_MAX_HEADER = 4 << 20


class Settings(msgspec.Struct, frozen=True):
    """How one takes part.

    Attributes
    ----------
    member
        A name shown to the others.
    every_steps
        Steps between two rounds.
    patience
        Seconds that a round waits for those who are late.
    exchange
        Seconds that the exchange itself may take.
    farewell
        Seconds that who has finished waits for the others.
    clip
        By how many times what we moved since the last round others may differ from us.
    listen
        Multiaddresses to listen on.
    reachable
        Whether others can connect to us there.
    """

    member: str = ""
    every_steps: int = 10
    patience: float = 5.0
    exchange: float = 20.0
    farewell: float = 30.0
    clip: float = 10.0
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    reachable: bool = True


class Participant(msgspec.Struct, frozen=True):
    """One who teaches with us, or did, or ourselves.

    Attributes
    ----------
    peer, name
        PeerID, and the name it chose (of a stranger: escape it).
    you
        Whether it is us.
    state
        ``training``, ``waiting`` for the others, ``averaging``, ``paused``, ``finished``; ``left`` and ``lost`` for
        those who are gone.
    steps, samples
        Its own, as it says.
    round, behind
        How many rounds its parameters went through, and how many fewer than the newest.
    rounds, share
        Rounds we had with it, and its weight in the last of them (0 to 1).
    seen
        Seconds since it last said something.
    clipped
        How many parts it sent that were so far from ours that they were shortened.
    refused
        What was wrong with what it last sent, if it was left out for it.
    """

    peer: str
    name: str
    you: bool
    state: str
    steps: int
    samples: int
    round: int
    rounds: int = 0
    share: float = 0.0
    behind: int = 0
    seen: float = 0.0
    clipped: int = 0
    refused: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What came of a round.

    Attributes
    ----------
    kind
        ``averaged`` with others; ``alone``, where nobody came in time; ``joined``: ours were replaced by those of
        the others, because they go back to other beginnings.
    round, lineage
        Where the parameters are now.
    peers
        PeerIDs of those whose parameters are in it, ours too.
    complete
        Share of the values that was averaged.
    last
        All have finished.
    seconds
        That the trainer waited.
    """

    kind: str
    round: int
    lineage: bytes
    peers: list[str]
    complete: float = 1.0
    last: bool = False
    seconds: float = 0.0


class _Said(msgspec.Struct, frozen=True, tag=True):
    pass


# -- to the child -------------------------------------------------------------------------------------------------


class Start(_Said, frozen=True):
    """The first. Body: our parameters. The rest is where we stand, after a restart of the child.

    Not the lineage: who was away begins anew, from where the others are by then, like all who come late.
    """

    invite: str
    teaching: Teaching
    settings: Settings
    round: int = 0
    steps: int = 0
    samples: int = 0


class Note(_Said, frozen=True):
    """How far training is."""

    steps: int
    samples: int
    fresh: int
    paused: bool = False


class Average(_Said, frozen=True):
    """Body: our parameters. Answered by `Done`, unless another `Average` or `GiveUp` comes first."""

    id: int
    lineage: bytes
    finish: float | None = None


class GiveUp(_Said, frozen=True):
    """The trainer was interrupted while it waited."""


class Leave(_Said, frozen=True):
    """The last."""


# -- from the child -----------------------------------------------------------------------------------------------


class Started(_Said, frozen=True):
    """Body: the parameters to start with, where ``joined``; none, where they are ours."""

    peer: str
    round: int
    lineage: bytes
    joined: bool


class Failed(_Said, frozen=True):
    """It could not start, or cannot go on. ``kind``: name of the exception."""

    kind: str
    reason: str


class Done(_Said, frozen=True):
    """Body: the parameters to go on with; none, where they are the ones that were sent."""

    id: int
    outcome: Outcome


class Called(_Said, frozen=True):
    """Others wait for us."""

    called: bool


class Account(_Said, frozen=True):
    participants: list[Participant]


AnySaid = Start | Note | Average | GiveUp | Leave | Started | Failed | Done | Called | Account

Said = tuple[AnySaid, bytearray]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnySaid)


def bytes_of(vector: Any) -> memoryview:
    """A CPU tensor's bytes, not copied where it is contiguous."""
    return memoryview(vector.contiguous().numpy()).cast("B")


def encode(message: AnySaid, body: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """The buffers to write."""
    header = _encoder.encode(message)
    return [PREFIX.pack(len(header), len(body)) + header, body]


def read(take: Callable[[int], bytearray | None], max_body: int) -> Said | None:
    """The next message, from a function that reads so many bytes; None at the end.

    Raises
    ------
    ValueError
        What came is none (`msgspec.DecodeError` is one).
    """
    prefix = take(PREFIX.size)
    if prefix is None:
        return None
    size, body_size = PREFIX.unpack(prefix)
    if size > _MAX_HEADER or body_size > max_body:
        raise ValueError(f"a message of {size} + {body_size} bytes")
    header = take(size)
    body = take(body_size)
    if header is None or body is None:
        return None
    return _decoder.decode(header), body


def reader(file: Any) -> Callable[[int], bytearray | None]:
    """Reads exactly so many bytes of an unbuffered file; None if it ends before."""

    def take(size: int) -> bytearray | None:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            got = file.readinto(view[at:])
            if not got:
                return None
            at += got
        return data

    return take
