"""Manifests of whole adapters: their uid by content, and the signature of who offers one."""

from __future__ import annotations

import hashlib

import msgspec

from nbrunner.errors import BadPeerDataError, UserInputError
from nbrunner.protocol.adapters import AdapterManifest
from nbrunner.protocol.identity import Identity, public_key_of, signature_is_valid


def encode_manifest(manifest: AdapterManifest) -> bytes:
    """The bytes that are hashed and signed."""
    return msgspec.msgpack.encode(manifest)


def uid_of(manifest: bytes, name: str) -> str:
    """``NAME@`` and 16 hexadecimal digits."""
    return f"{name}@{hashlib.sha256(manifest).hexdigest()[:16]}"


def sign_manifest(manifest: bytes, swarm: bytes, identity: Identity) -> bytes:
    """The author's signature; it counts in this swarm only."""
    return identity.sign(_message(manifest, swarm))


def open_manifest(data: bytes, signature: bytes, swarm: bytes) -> tuple[str, AdapterManifest]:
    """(uid, manifest). `BadPeerDataError` unless it is one, signed by its author if it names one."""
    try:
        manifest = msgspec.msgpack.decode(data, type=AdapterManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadPeerDataError(f"not the manifest of an adapter: {str(error)[:300]}") from None
    if encode_manifest(manifest) != data:
        raise BadPeerDataError("this manifest of an adapter is not in the form in which manifests are hashed")
    if any(len(digest) not in (0, 32) for digest in manifest.blocks) or not any(manifest.blocks):
        raise BadPeerDataError("this adapter changes no block")
    if manifest.author:
        try:
            key = public_key_of(manifest.author)
        except UserInputError as error:
            raise BadPeerDataError(f"the author of an adapter is no PeerID: {error}") from None
        if not signature_is_valid(key, _message(data, swarm), signature):
            raise BadPeerDataError("this adapter is not signed by the author it names")
    return uid_of(data, manifest.name), manifest


def _message(manifest: bytes, swarm: bytes) -> bytes:
    return b"nbrunner adapter 1\0" + msgspec.msgpack.encode((swarm, manifest))
