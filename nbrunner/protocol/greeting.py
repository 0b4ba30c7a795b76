"""The first words on every stream: which protocol, which abilities, who asks, and where there is a shorter way."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nbrunner.protocol.limits import Limits
from nbrunner.protocol.schema import Message, Text

VERSION = 1
"""Version of the wire. Peers of another version refuse each other by name."""

STREAM = "nbrunner/1"
"""Name of the libp2p stream protocol: one handler for everything."""

FEATURES: tuple[str, ...] = (
    "chain",
    "capture",
    "carry",
    "parts",
    "edits",
    "measure",
    "adapters",
    "keep",
    "8bit",
    "named adapters",
    "sums",
    "queue",
)
"""Optional abilities of this version, exchanged in `Hello` and `Welcome`."""

EIGHT_BITS = "8bit"
"""The feature of taking and sending hidden states with 8 bits a number (`nbrunner.protocol.tensors.pack_8bit`)."""


class Shortcut(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a server on the same machine can be reached without its daemon (`nbrunner.swarm.shortcut`).

    Attributes
    ----------
    socket
        Path of its unix socket.
    token
        Opens it for the peer that was welcomed.
    """

    socket: Annotated[str, msgspec.Meta(max_length=108)]
    token: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Hello(Message, frozen=True):
    """The first frame on a stream, by whoever opened it.

    Attributes
    ----------
    machine
        Known only to processes of one machine, and another for each peer; empty if that cannot be told.
    """

    version: int
    swarm: bytes
    credential: Annotated[bytes, msgspec.Meta(max_length=1024)]
    software: Text = ""
    features: Annotated[list[Text], msgspec.Meta(max_length=32)] = []
    machine: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class Welcome(Message, frozen=True):
    """The answer to `Hello` when the stream may be used."""

    version: int
    limits: Limits
    software: Text = ""
    features: Annotated[list[Text], msgspec.Meta(max_length=32)] = []
    shortcut: Shortcut | None = None
