"""Who may use or host a swarm: swarm keys, invites and the credentials that peers show each other.

The creator of a swarm holds an Ed25519 key. An *invite* is one string: where to find the swarm, its public key,
the terms (role, quotas, expiry), and an invite key with the swarm key's signature over the terms. Whoever holds
the string signs its own PeerID with the invite key; the result is a *credential*, which any peer that knows the
swarm's public key can check offline. libp2p has already proved the PeerID of whoever shows it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from nbrunner.errors import InviteError
from nbrunner.protocol.identity import Identity, public_key_of, signature_is_valid

Role = Literal["use", "host"]
"""``use``: run requests. ``host``: that, and serve blocks and store records."""

_PREFIX = "nbr1-"
_MAX_INVITE_CHARACTERS = 4096
_CLOCK_SKEW = 60.0  # seconds: an invite that expired a moment ago on one clock may be good on another


class Terms(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an invite allows. Signed by the swarm key.

    ``expires`` is unix seconds, 0 for never. ``max_sessions`` and ``tokens_per_second`` bound what one peer may
    use of each server; 0 leaves it to the server.
    """

    role: Role = "use"
    expires: float = 0.0
    max_sessions: int = 0
    tokens_per_second: float = 0.0

    def expired(self, now: float | None = None) -> bool:
        return bool(self.expires) and (time.time() if now is None else now) > self.expires + _CLOCK_SKEW


class Credential(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer shows to another: the terms, who signed them, and its PeerID signed with the invite key."""

    terms: Terms
    invite_key: bytes
    swarm_signature: bytes
    peer_signature: bytes

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


class _InvitePayload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    swarm: bytes
    terms: Terms
    seed: bytes
    swarm_signature: bytes
    addresses: list[str]


class SwarmKey:
    """The key of a swarm's creator; makes invites."""

    def __init__(self, identity: Identity | None = None) -> None:
        self._identity = identity or Identity.generate()

    @property
    def public(self) -> bytes:
        return self._identity.public_key

    @property
    def identity(self) -> Identity:
        return self._identity

    def invite(
        self,
        addresses: Sequence[str],
        *,
        role: Role = "use",
        expires_in: float | None = None,
        max_sessions: int = 0,
        tokens_per_second: float = 0.0,
    ) -> Invite:
        """A new invite.

        Parameters
        ----------
        addresses
            libp2p multiaddresses of peers that are up, each ending in ``/p2p/PEERID``.
        role
            What holders may do.
        expires_in
            Seconds from now, None for never.
        max_sessions, tokens_per_second
            Quotas for each peer on each server; 0 leaves them to the server.
        """
        invite_key = Identity.generate()
        expires = 0.0 if expires_in is None else time.time() + expires_in
        # signed as it will be read: 200 and 200.0 are different bytes
        terms = Terms(role, expires, max_sessions, float(tokens_per_second))
        signature = self._identity.sign(_terms_message(self.public, invite_key.public_key, terms))
        return Invite(_InvitePayload(self.public, terms, invite_key.seed, signature, list(addresses)))


class Invite:
    """One copy-paste string that lets its holder into a swarm.

    Attributes
    ----------
    swarm : bytes
        The swarm's public key (32 bytes).
    terms : Terms
        Role, expiry and quotas.
    addresses : list of str
        Where to find peers of the swarm.
    """

    def __init__(self, payload: _InvitePayload) -> None:
        self._payload = payload
        self.swarm = payload.swarm
        self.terms = payload.terms
        self.addresses = list(payload.addresses)

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite; `InviteError` says what is wrong with it. Expiry is checked too."""
        compact = re.sub(r"\s+", "", text) if isinstance(text, str) else ""
        if not compact.startswith(_PREFIX):
            raise InviteError(
                f"this is not an invite: invites start with {_PREFIX!r}. Ask the swarm's creator for one."
            )
        if len(compact) > _MAX_INVITE_CHARACTERS:
            raise InviteError("this invite is too long to be one of ours; was something pasted after it?")
        body = compact[len(_PREFIX) :]
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise InviteError("this invite has characters that do not belong in it; copy it again.") from None
        payload_bytes, checksum = raw[:-4], raw[-4:]
        if hashlib.sha256(payload_bytes).digest()[:4] != checksum:
            raise InviteError("this invite is damaged (its checksum is wrong); copy the whole string again.")
        try:
            payload = msgspec.msgpack.decode(payload_bytes, type=_InvitePayload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InviteError(f"this invite cannot be read ({error}); is your nbrunner up to date?") from None
        if len(payload.swarm) != 32 or len(payload.seed) != 32:
            raise InviteError("this invite holds keys of a wrong length; ask for a new one.")
        message = _terms_message(payload.swarm, Identity(payload.seed).public_key, payload.terms)
        if not signature_is_valid(payload.swarm, message, payload.swarm_signature):
            raise InviteError("this invite was not signed by the swarm it names; do not use it.")
        if payload.terms.expired():
            raise InviteError(
                f"this invite expired {_ago(time.time() - payload.terms.expires)} ago; ask for a new one."
            )
        return cls(payload)

    def __str__(self) -> str:
        raw = msgspec.msgpack.encode(self._payload)
        raw += hashlib.sha256(raw).digest()[:4]
        return _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"<Invite to swarm {swarm_name(self.swarm)}, role {self.terms.role}>"

    def with_addresses(self, addresses: Sequence[str]) -> Invite:
        """The same invite pointing at other peers (addresses are not part of what is signed)."""
        return Invite(msgspec.structs.replace(self._payload, addresses=list(addresses)))

    def credential(self, peer_id: str) -> Credential:
        """The credential of the peer with this PeerID, under this invite."""
        key = Identity(self._payload.seed)
        return Credential(
            terms=self.terms,
            invite_key=key.public_key,
            swarm_signature=self._payload.swarm_signature,
            peer_signature=key.sign(_member_message(self.swarm, peer_id)),
        )


def check_credential(
    encoded: bytes, *, swarm: bytes, peer_id: str, role: Role = "use", now: float | None = None
) -> Terms:
    """Check what a stranger shows.

    Parameters
    ----------
    encoded
        `Credential.encode()` as received.
    swarm
        Public key of our swarm.
    peer_id
        The PeerID that libp2p (or a record's signature) has proved.
    role
        What the peer wants to do.

    Raises
    ------
    InviteError
        The reason, in a sentence that may be sent back.
    """
    if not encoded:
        raise InviteError("this swarm is private: no invite was shown. Join with an invite of its creator.")
    try:
        credential = msgspec.msgpack.decode(encoded, type=Credential)
    except (msgspec.DecodeError, UnicodeDecodeError):  # msgspec passes the second on from inside a string
        raise InviteError("the credential cannot be read; is your nbrunner up to date?") from None
    message = _terms_message(swarm, credential.invite_key, credential.terms)
    if not signature_is_valid(swarm, message, credential.swarm_signature):
        raise InviteError("the invite was not signed by this swarm: it belongs to another one.")
    if not signature_is_valid(credential.invite_key, _member_message(swarm, peer_id), credential.peer_signature):
        raise InviteError("the credential was made for another peer.")
    if credential.terms.expired(now):
        raise InviteError("the invite has expired; ask the swarm's creator for a new one.")
    if role == "host" and credential.terms.role != "host":
        raise InviteError("this invite lets you use the swarm, not host blocks; ask for one with role 'host'.")
    return credential.terms


def swarm_name(public_key: bytes) -> str:
    """A short name for a swarm, the same for everyone: eight hex digits of its key's hash."""
    return hashlib.sha256(public_key).hexdigest()[:8]


def _terms_message(swarm: bytes, invite_key: bytes, terms: Terms) -> bytes:
    return b"nbrunner invite 1\0" + msgspec.msgpack.encode((swarm, invite_key, terms))


def _member_message(swarm: bytes, peer_id: str) -> bytes:
    return b"nbrunner member 1\0" + swarm + public_key_of(peer_id)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
