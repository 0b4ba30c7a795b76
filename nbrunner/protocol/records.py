"""What a server says about itself in the DHT, signed so that only it can say it.

One DHT key per swarm holds a dictionary PeerID → signed record (why one key: ``docs/decisions``). A record is
stored and believed only if its signature is by the PeerID it is filed under, its signer may host in this swarm,
its schema and size are right, and it does not claim to live longer than `MAX_RECORD_LIFETIME`.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec

from nbrunner.errors import BadPeerDataError, InviteError, UserInputError
from nbrunner.protocol.credentials import Role, check_credential, swarm_name
from nbrunner.protocol.identity import Identity, public_key_of, signature_is_valid
from nbrunner.protocol.limits import MAX_RECORD_BYTES, MAX_RECORD_LIFETIME

ServerState = Literal["joining", "online", "draining", "offline"]

QUANTIZATIONS = ("none", "int8", "int4", "nf4")
"""How a server can keep the weights of its linear layers."""

_PURPOSE = b"nbrunner record 1\0"

_Text = Annotated[str, msgspec.Meta(max_length=200)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Block = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class ServerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One server as it announces itself.

    Attributes
    ----------
    model
        Uid of the checkpoint: name and revision or content digest. Servers and clients must agree on it.
    num_blocks
        Blocks of the whole model.
    start, end
        The span served: blocks ``[start, end)``.
    state
        ``online`` means that its handlers answer.
    name
        A name its owner chose, shown to people (escaped); may be empty.
    dtype, quantization
        Of the weights; the wire carries ``dtype``.
    version
        nbrunner's version.
    step_seconds
        Measured time of one decode step of one row through the whole span, without waiting.
    prefill_tokens_per_second
        Measured, through the whole span.
    queue_seconds
        Time the last steps waited before they ran.
    cache_bytes_left, cache_bytes_per_token
        Room for caches; cost of one token of one row over the span.
    sessions
        Open now.
    round_trips
        PeerID → seconds, as measured to peers that serve the blocks after ours.
    adapters, features
        Names of adapters served; optional abilities.
    started
        Unix seconds.
    addresses
        Multiaddresses where the server can be reached, without their ``/p2p/PEERID`` part.
    """

    model: _Text
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    start: _Block
    end: _Block
    state: ServerState
    name: Annotated[str, msgspec.Meta(max_length=60)] = ""
    dtype: Annotated[str, msgspec.Meta(max_length=20)] = "float32"
    quantization: Annotated[str, msgspec.Meta(max_length=20)] = "none"
    version: Annotated[str, msgspec.Meta(max_length=40)] = ""
    step_seconds: _Seconds = 0.0
    prefill_tokens_per_second: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    queue_seconds: _Seconds = 0.0
    cache_bytes_left: _Count = 0
    cache_bytes_per_token: _Count = 0
    sessions: _Count = 0
    round_trips: Annotated[dict[_Text, _Seconds], msgspec.Meta(max_length=16)] = {}
    adapters: Annotated[list[_Text], msgspec.Meta(max_length=16)] = []
    features: Annotated[list[_Text], msgspec.Meta(max_length=16)] = []
    started: float = 0.0
    addresses: Annotated[list[_Text], msgspec.Meta(max_length=8)] = []


class SignedRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The bytes under a PeerID in the DHT."""

    payload: bytes
    credential: bytes
    signature: bytes


def servers_key(swarm: bytes) -> str:
    """The DHT key under which the servers of a swarm announce themselves."""
    return f"nbrunner/1/{swarm_name(swarm)}/servers"


def sign_record(
    record: ServerRecord, *, identity: Identity, credential: bytes, swarm: bytes, expires: float
) -> bytes:
    """The bytes to store under ``identity.peer_id``, good until ``expires`` (unix seconds)."""
    return sign_payload(
        msgspec.msgpack.encode(record),
        purpose=_PURPOSE,
        identity=identity,
        credential=credential,
        swarm=swarm,
        expires=expires,
    )


def sign_payload(
    payload: bytes, *, purpose: bytes, identity: Identity, credential: bytes, swarm: bytes, expires: float
) -> bytes:
    """A `SignedRecord` of any kind; ``purpose`` keeps one kind from passing as another."""
    signature = identity.sign(_message(purpose, swarm, identity.peer_id, payload, expires))
    return msgspec.msgpack.encode(SignedRecord(payload, credential, signature))


def open_record(
    data: bytes, *, peer_id: str, swarm: bytes, expires: float, now: float | None = None
) -> ServerRecord:
    """Check a record from the DHT and read it.

    Parameters
    ----------
    data
        The stored bytes.
    peer_id
        The subkey it is filed under.
    expires
        The expiration the DHT keeps with it, unix seconds. It is part of what is signed.

    Raises
    ------
    BadPeerDataError
        With the reason; the record must be neither stored nor believed.
    """
    payload = open_payload(
        data, purpose=_PURPOSE, role="host", peer_id=peer_id, swarm=swarm, expires=expires, now=now
    )
    try:
        record = msgspec.msgpack.decode(payload, type=ServerRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadPeerDataError(f"record refused: {error}", peer=peer_id) from None
    if not record.start < record.end <= record.num_blocks:
        raise BadPeerDataError(
            f"record claims blocks [{record.start}, {record.end}) of {record.num_blocks}", peer=peer_id
        )
    return record


def open_payload(
    data: bytes,
    *,
    purpose: bytes,
    role: Role,
    peer_id: str,
    swarm: bytes,
    expires: float,
    now: float | None = None,
) -> bytes:
    """Check who signed a record of any kind, and return what is in it, not yet read; see `open_record`."""
    now = time.time() if now is None else now
    if len(data) > MAX_RECORD_BYTES:
        raise BadPeerDataError(f"record of {len(data)} bytes, {MAX_RECORD_BYTES} allowed", peer=peer_id)
    if not now - 5 <= expires <= now + MAX_RECORD_LIFETIME + 5:
        raise BadPeerDataError(
            f"record expires {expires - now:.0f} s from now, at most {MAX_RECORD_LIFETIME:.0f} s are allowed",
            peer=peer_id,
        )
    try:
        signed = msgspec.msgpack.decode(data, type=SignedRecord)
        key = public_key_of(peer_id)
    except (msgspec.DecodeError, UnicodeDecodeError, UserInputError) as error:
        raise BadPeerDataError(f"record cannot be read: {error}", peer=peer_id) from None
    if not signature_is_valid(key, _message(purpose, swarm, peer_id, signed.payload, expires), signed.signature):
        raise BadPeerDataError("record is not signed by the peer it is filed under", peer=peer_id)
    try:
        check_credential(signed.credential, swarm=swarm, peer_id=peer_id, role=role, now=now)
    except InviteError as error:
        raise BadPeerDataError(f"record refused: {error}", peer=peer_id) from None
    return signed.payload


def _message(purpose: bytes, swarm: bytes, peer_id: str, payload: bytes, expires: float) -> bytes:
    return purpose + msgspec.msgpack.encode((swarm, peer_id, expires, payload))
