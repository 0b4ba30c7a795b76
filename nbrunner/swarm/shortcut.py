"""Streams between two processes of one machine and user: a unix socket, past both daemons.

Through two daemons a small frame costs 0.3 ms of their processor time and four wake-ups, and one of 1 MB takes
2.5 ms to be encrypted and decrypted again, only to arrive where it came from. So a server offers a socket to those
on its machine. Who is who was proved by libp2p when the peer was first welcomed: the offer holds a token that only
this peer can know, and the socket lies in a folder that only this user can read.

Peers of different network namespaces are not taken to be on one machine: there is a network between them, and often
somebody's intention.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from functools import cache
from pathlib import Path

from nbrunner.protocol.greeting import Shortcut
from nbrunner.swarm.control import ControlError, delimited
from nbrunner.swarm.daemon import FOLDER_PREFIX

OFF = "NBRUNNER_SHORTCUTS"
"""Environment variable: with ``0`` no shortcut is offered or taken."""

_SOCKET = "near.sock"
_TOKEN_BYTES = 32
_MARK_BYTES = 16


def allowed() -> bool:
    """Whether this process offers and takes shortcuts."""
    return os.environ.get(OFF) != "0"


def mark(peer: str) -> bytes:
    """What only processes of this machine can say to a peer; empty where machines cannot be told apart.

    Another one for each peer: nobody learns from it who else is on the machine.
    """
    secret = _machine()
    return hmac.digest(secret, peer.encode(), "sha256")[:_MARK_BYTES] if secret else b""


@cache
def _machine() -> bytes:
    """Made anew when the machine starts, and known on it only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        network = Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return b""
    return hashlib.sha256(boot + str(network).encode()).digest()


class Doorkeeper:
    """The offering side: whom the socket of a server lets in.

    Attributes
    ----------
    path
        Of the socket, in the server's own folder.
    """

    def __init__(self, peer: str, folder: Path) -> None:
        self.path = folder / _SOCKET
        self._mark = mark(peer)
        self._secret = secrets.token_bytes(32)

    def offer(self, peer: str, shown: bytes) -> Shortcut | None:
        """For a peer that libp2p has proved, if it showed the mark of our machine."""
        if not self._mark or not hmac.compare_digest(shown, self._mark):
            return None
        return Shortcut(str(self.path), self._token(peer))

    def recognise(self, knock: bytes) -> str:
        """Who knocks; `ControlError` if it was never offered the socket."""
        token, peer = knock[:_TOKEN_BYTES], knock[_TOKEN_BYTES:].decode("ascii", "replace")
        if not hmac.compare_digest(token, self._token(peer)):
            raise ControlError("somebody knocked at our socket with a token that is not ours")
        return peer

    def _token(self, peer: str) -> bytes:
        return hmac.digest(self._secret, peer.encode(), "sha256")


def knock(shortcut: Shortcut, peer: str) -> bytes:
    """The first bytes on the socket, by ``peer`` to whom the shortcut was offered."""
    return delimited(shortcut.token + peer.encode())


def find(shortcut: Shortcut) -> Path | None:
    """The socket that is meant, if it is there and of this user's; never just any path of a peer's choosing."""
    path = Path(shortcut.socket)
    if not path.is_absolute() or path.name != _SOCKET or not path.parent.name.startswith(FOLDER_PREFIX):
        return None
    try:
        folder, socket = path.parent.lstat(), path.lstat()
    except (OSError, ValueError):
        return None
    private = folder.st_uid == os.getuid() and not stat.S_IMODE(folder.st_mode) & 0o077
    return path if private and stat.S_ISDIR(folder.st_mode) and stat.S_ISSOCK(socket.st_mode) else None
