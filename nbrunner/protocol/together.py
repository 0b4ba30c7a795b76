"""What clients that teach one adapter together say to each other, and how they find each other.

A *teaching* is a name, a method, and named parameters with their shapes; its digest is over all of that, so that
those who teach something else never mix with it. Who takes part files a signed record under one DHT key of the
swarm, and holds a stream to each of the others. Parameters travel as one float32 vector: all of them, in the order
of their names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.credentials import swarm_name
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.records import open_payload, sign_payload
from nbrunner.protocol.schema import Message, Number, Peer, Text

MAX_PARTICIPANTS = 64
"""Everyone holds a stream to everyone."""

MAX_VALUES = 1 << 28
"""Parameters of one teaching: 1 GiB as float32."""

SLICE_VALUES = 8 << 20
"""Values in one frame of a state: 32 MiB."""

_PURPOSE = b"nbrunner teaching 1\0"
_VERSION = 1

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=60)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**31)]

Lineage = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""Which parameters somebody's go back to: only those of one lineage can be averaged (`new_lineage`)."""

TeacherState = Literal["training", "waiting", "averaging", "paused", "finished", "left"]


class TensorShape(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: Text
    shape: Annotated[list[_Size], msgspec.Meta(max_length=6)]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


_Shapes = Annotated[list[TensorShape], msgspec.Meta(min_length=1, max_length=10_000)]


class Teaching(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What is taught. ``parameters`` are sorted by name."""

    name: Name
    method: Text
    parameters: _Shapes

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(msgspec.msgpack.encode((_VERSION, self))).digest()

    @property
    def values(self) -> int:
        """How many numbers in all."""
        return sum(one.size for one in self.parameters)


class TeachingRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """Somebody who takes part, as announced in the DHT.

    Attributes
    ----------
    name, digest
        Of the teaching.
    method
        In words, for those whose digest differs.
    started
        Unix seconds.
    addresses
        Multiaddresses without their ``/p2p/PEERID`` part; empty for who only connects to others.
    gone
        It has left: a record cannot be taken back, only replaced.
    """

    name: Name
    digest: Digest
    method: Text = ""
    started: float = 0.0
    addresses: Annotated[list[Text], msgspec.Meta(max_length=8)] = []
    gone: bool = False


# -- messages --------------------------------------------------------------------------------------------------


class JoinTeaching(Message, frozen=True):
    """The first words on a stream between two who teach together, by the opener; answered by the other's own.

    The stream then carries `TeachingProgress` both ways and `BeginRound` from whoever calls the round. A peer that
    teaches something else answers with its `TeachingManifest` and closes.
    """

    name: Name
    digest: Digest
    member: Annotated[str, msgspec.Meta(max_length=60)] = ""
    reachable: bool = True


class GetTeaching(Message, frozen=True):
    """Answered by `TeachingManifest`."""


class TeachingManifest(Message, frozen=True):
    teaching: Teaching


class TeachingProgress(Message, frozen=True):
    """How far the sender is; at every change of ``state``, and at least every few seconds.

    Attributes
    ----------
    turn
        Number of the round the sender asks for, counted by itself.
    steps, samples
        In all, its own.
    fresh
        Samples since its last round: its weight in the next.
    round
        Rounds that its parameters went through.
    lineage
        What its parameters go back to.
    finished
        It has no more steps to do, and waits for the others to get there.
    """

    state: TeacherState
    turn: Number
    steps: Number
    samples: Number
    fresh: Number
    round: Number
    lineage: Lineage
    finished: bool = False


class BeginRound(Message, frozen=True):
    """By the peer that coordinates: average now, with these, in this order, with these weights.

    ``turns``: the turn of each that this answers; who has moved on since ignores it. ``last``: all have finished.
    """

    group: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    round: Number
    peers: Annotated[list[Peer], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)]
    weights: Annotated[
        list[Annotated[float, msgspec.Meta(ge=0, le=1e15)]], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)
    ]
    turns: Annotated[list[Number], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)]
    last: bool = False


class GetTeachingState(Message, frozen=True):
    """Answered by `TeachingState` frames, the last of which reaches the end."""

    name: Name
    digest: Digest


class TeachingState(Message, frozen=True):
    """Tensor: ``values`` [n] float32, from ``position`` on."""

    lineage: Lineage
    round: Number
    position: Number


# -- records -----------------------------------------------------------------------------------------------------


def teaching_key(swarm: bytes) -> str:
    """The DHT key under which those who teach in a swarm are found."""
    return f"nbrunner/1/{swarm_name(swarm)}/together"


def sign_teaching(
    record: TeachingRecord, *, identity: Identity, credential: bytes, swarm: bytes, expires: float
) -> bytes:
    """The bytes to store under ``identity.peer_id``, good until ``expires`` (unix seconds)."""
    payload = msgspec.msgpack.encode(record)
    return sign_payload(
        payload, purpose=_PURPOSE, identity=identity, credential=credential, swarm=swarm, expires=expires
    )


def open_teaching(
    data: bytes, *, peer_id: str, swarm: bytes, expires: float, now: float | None = None
) -> TeachingRecord:
    """As `nbrunner.protocol.records.open_record`; an invite to use the swarm is enough.

    Raises
    ------
    BadPeerDataError
    """
    payload = open_payload(
        data, purpose=_PURPOSE, role="use", peer_id=peer_id, swarm=swarm, expires=expires, now=now
    )
    try:
        return msgspec.msgpack.decode(payload, type=TeachingRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadPeerDataError(f"record refused: {error}", peer=peer_id) from None


# -- what differs ------------------------------------------------------------------------------------------------


def difference(ours: Teaching, theirs: Teaching, *, shown: int = 3) -> str:
    """In words, what two teachings of one name do not have in common."""
    parts: list[str] = []
    if ours.method != theirs.method:
        parts.append(f"they use method {theirs.method[:60]!r}, you {ours.method[:60]!r}")
    our, their = ({one.name: one.shape for one in taught.parameters} for taught in (ours, theirs))
    other = [name for name in our if name in their and our[name] != their[name]]
    parts += [f"their {name} is {their[name]}, yours {our[name]}" for name in other[:shown]]
    for have, lack, names in (
        ("they have", "you do not", [name for name in their if name not in our]),
        ("you have", "they do not", [name for name in our if name not in their]),
    ):
        if names:
            parts.append(f"{have} {_some(names, shown)}, which {lack}")
    if len(other) > shown:
        parts.append(f"and {len(other) - shown} more shapes differ")
    return "; ".join(parts) or "they run another version of nbrunner"


def _some(names: Sequence[str], shown: int) -> str:
    listed = ", ".join(name[:80] for name in names[:shown])
    return f"{listed} and {len(names) - shown} more" if len(names) > shown else listed
