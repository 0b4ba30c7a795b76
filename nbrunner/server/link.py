"""The way from one server to the next: a stream kept open for one session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from nbrunner.errors import PeerError, PeerUnreachableError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.sessions import Attached, AttachSession
from nbrunner.protocol.steps import Hop, Step
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

logger = logging.getLogger(__name__)

OPEN_SECONDS = 5.0
SEND_SECONDS = 30.0
"""A next hop that takes no bytes for this long is given up; its socket buffers are full and it is stopped."""


class Link:
    """Pushes parts into a session on the next hop.

    It opens when it is made, beside the first part's computation. ``on_broken`` is called once if it breaks by
    itself, also long after the last part went out: the next hop may have said no, or died, with parts on the way.
    """

    def __init__(self, node: Node, hop: Hop, on_broken: Callable[[Link, str], None]) -> None:
        self.peer = hop.peer
        self.session = hop.session
        self._node = node
        self._on_broken = on_broken
        self._closed = False
        self._stream: Stream | None = None
        self._opening = asyncio.create_task(self._open(), name=f"link-{hop.session[:8]}")
        self._opening.add_done_callback(_retrieve)
        self._reader: asyncio.Task[None] | None = None

    async def limits(self) -> Limits:
        """What the next hop takes; `PeerError` if it cannot be reached."""
        return (await self._opened()).welcome.limits

    async def features(self) -> Sequence[str]:
        """What the next hop can do; `PeerError` if it cannot be reached."""
        return (await self._opened()).welcome.features

    async def send(self, part: Step, tensors: Sequence[RawTensor]) -> None:
        """Push one part; `PeerError` if that does not work."""
        stream = await self._opened()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await stream.send(part, tensors)
        except TimeoutError:
            raise PeerUnreachableError(f"took no bytes for {SEND_SECONDS:.0f} s", peer=self.peer) from None

    def close(self) -> None:
        """Let go of the stream; nothing is reported any more."""
        self._closed = True
        self._opening.cancel()
        if self._reader is not None:
            self._reader.cancel()
        if self._stream is not None:
            self._stream.close()

    async def _opened(self) -> Stream:
        if self._stream is not None:
            return self._stream
        return await asyncio.shield(self._opening)

    async def _open(self) -> Stream:
        stream = await self._node.open_stream(self.peer, timeout=OPEN_SECONDS)
        try:
            await stream.send(AttachSession(self.session))
        except BaseException:
            stream.close()
            raise
        self._stream = stream
        self._reader = asyncio.create_task(self._watch(stream), name=f"link-watch-{self.session[:8]}")
        return stream

    async def _watch(self, stream: Stream) -> None:
        reason = ""
        try:
            while not reason:
                message, _ = await stream.receive()
                if isinstance(message, Refused):
                    reason = message.reason
                elif not isinstance(message, Attached):
                    reason = f"answered {type(message).__name__} to a push"
        except PeerError as error:
            reason = str(error)
        if not self._closed:
            with contextlib.suppress(RuntimeError):
                self._on_broken(self, reason)


def _retrieve(task: asyncio.Task[Stream]) -> None:
    """Look at the outcome, so that a link nobody used after all is no warning about a lost exception."""
    if not task.cancelled():
        task.exception()
