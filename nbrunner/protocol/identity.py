"""A peer's identity: an Ed25519 key whose libp2p PeerID *is* its public key.

libp2p encodes a short public key into the PeerID itself ("identity" multihash,
https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), so whoever knows a PeerID can check that
peer's signatures with nothing else: records need not carry keys, and no key can be swapped for another.
"""

from __future__ import annotations

import os
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nbrunner.errors import UserInputError

# multihash "identity", 36 bytes long, of the protobuf PublicKey{type: Ed25519, data: 32 bytes}
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
# protobuf PrivateKey{type: Ed25519, data: 64 bytes (seed, then public key)}: what p2pd reads from a file
_KEY_FILE_PREFIX = bytes.fromhex("08011240")


class Identity:
    """An Ed25519 key pair and the PeerID that follows from it."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise UserInputError(f"an identity seed has 32 bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer_id: str = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        return cls(os.urandom(32))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read a libp2p key file; `UserInputError` if it is not an Ed25519 one."""
        data = Path(path).read_bytes()
        if len(data) != len(_KEY_FILE_PREFIX) + 64 or not data.startswith(_KEY_FILE_PREFIX):
            raise UserInputError(
                f"{path} is not an Ed25519 identity file. Remove it to have a new one made, or name another."
            )
        return cls(data[len(_KEY_FILE_PREFIX) : len(_KEY_FILE_PREFIX) + 32])

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        path = Path(path)
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity

    def save(self, path: str | Path) -> None:
        """Write the file that p2pd takes as its identity, readable by its owner only."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_KEY_FILE_PREFIX + self._seed + self.public_key)

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return self._seed

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"<Identity {short_peer(self.peer_id)}>"


def peer_id_of(public_key: bytes) -> str:
    """Base58 PeerID of a raw Ed25519 public key (32 bytes)."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


def public_key_of(peer_id: str) -> bytes:
    """Raw Ed25519 public key inside a PeerID; `UserInputError` if there is none (an RSA peer, a typo)."""
    try:
        # Decoding takes quadratic time: a stranger's megabyte must not get that far.
        raw = base58.b58decode(peer_id) if len(peer_id) <= 100 else b""
    except ValueError:
        raw = b""
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        raise UserInputError(f"{peer_id[:80]!r} is not the PeerID of an Ed25519 key")
    return raw[len(_PEER_ID_PREFIX) :]


def is_peer_id(text: str) -> bool:
    """Whether a text is the PeerID of an Ed25519 key."""
    try:
        public_key_of(text)
    except UserInputError:
        return False
    return True


def signature_is_valid(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature is right; never raises on bytes from strangers."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def short_peer(peer_id: str) -> str:
    """The last six characters, as people see peers named in tables and logs (the first eight never differ)."""
    return "…" + peer_id[-6:]
