"""The first words on a stream: who opens it introduces itself, and is welcomed or refused."""

from __future__ import annotations

import asyncio
import contextlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from nbrunner.errors import BadPeerDataError, PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.greeting import FEATURES, VERSION, Hello, Welcome
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.refusals import Refused
from nbrunner.swarm import shortcut
from nbrunner.swarm.streams import Stream

_REFUSAL_SECONDS = 1.0
_LINGER_SECONDS = 2.0  # for whoever was refused to read why, and close


async def introduce(stream: Stream, swarm: bytes, credential: bytes) -> None:
    """Say who we are on a stream that we opened, and keep its `Welcome`.

    Raises
    ------
    PeerUnreachableError
        The stream ended.
    PeerRefusedError
        The peer does not take us, and why; or it speaks another version.
    BadPeerDataError
        It answered with something else.
    """
    peer = stream.peer
    machine = shortcut.mark(peer) if shortcut.allowed() else b""
    await stream.send(Hello(VERSION, swarm, credential, software(), list(FEATURES), machine))
    answer, _ = await stream.receive()
    if isinstance(answer, Refused):
        raise refusal(peer, answer)
    if not isinstance(answer, Welcome):
        raise BadPeerDataError(f"peer {short_peer(peer)} answered {type(answer).__name__} to Hello", peer=peer)
    if answer.version != VERSION:
        raise PeerRefusedError(other_version(answer.version, answer.software), peer=peer, code="version")
    stream.welcome = answer


def refusal(peer: str, refused: Refused, what: str = "") -> PeerRefusedError:
    """The error for a peer that said no; ``what`` names what it was asked for."""
    return PeerRefusedError(
        f"peer {short_peer(peer)} refused{what and f' {what}'}: {refused.reason}",
        peer=peer,
        code=refused.code,
        retry_after=refused.retry_after,
    )


async def refuse(stream: Stream, refused: Refused) -> bool:
    """Say no, and wait until that was read. Returns False: the stream is not to be used."""
    with contextlib.suppress(PeerUnreachableError, TimeoutError):
        async with asyncio.timeout(_REFUSAL_SECONDS):
            await stream.send(refused)
        await stream.close_after_peer(_LINGER_SECONDS)
    return False


def software() -> str:
    """Our name and version, for whoever reads a refusal."""
    try:
        return f"nbrunner {installed('nbrunner')}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "nbrunner"


def other_version(number: int, name: str) -> str:
    """Why two versions do not talk, and what to do."""
    return (
        f"it speaks version {number} of the protocol{f' ({name[:60]})' if name else ''} and we speak "
        f"{VERSION}; install the same version of nbrunner on both sides."
    )
