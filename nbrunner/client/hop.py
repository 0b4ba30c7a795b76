"""One server of a chain, as the client talks to it: a stream that belongs to one session."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nbrunner.errors import BadPeerDataError, PeerError, PeerRefusedError, PeerUnreachableError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.sessions import CloseSession, OpenSession, Queued, Relink, Relinked, SessionOpened
from nbrunner.protocol.status import Ping, Pong
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream


class Arrival(NamedTuple):
    """Something a hop sent, or the error that ended its stream."""

    hop: HopStream
    message: AnyMessage | PeerError
    tensors: Mapping[str, RawTensor]


Inbox = asyncio.Queue[Arrival | None]
"""Where the hops of a session put what they hear; None is its alarm clock."""


class HopStream:
    """The session's stream to one server.

    What the server says about steps goes to the session's inbox as it comes; answers to pings and relinks go to
    whoever waits for them.
    """

    def __init__(self, stream: Stream, opened: SessionOpened, upstream: str | None, inbox: Inbox):
        self.peer = stream.peer
        self.session = opened.session
        self.croppable = opened.croppable
        self.limits = stream.welcome.limits
        self.features = frozenset(stream.welcome.features)
        self.upstream = upstream
        self.draining = False
        self._stream = stream
        self._inbox = inbox
        self._pongs: dict[int, asyncio.Future[Pong]] = {}
        self._nonces = itertools.count(1)
        self._relinked: asyncio.Future[None] | None = None
        self._closed = False
        self._reader = asyncio.create_task(self._read(), name=f"hop-{self.session[:8]}")

    @classmethod
    async def open(
        cls,
        node: Node,
        peer: str,
        request: OpenSession,
        inbox: Inbox,
        tensors: Sequence[RawTensor] = (),
        on_queued: Callable[[str, Queued], None] = lambda _peer, _place: None,
    ) -> HopStream:
        """Open a session on a server; ``tensors`` are those of its edits.

        If the request says that it waits, it may wait for room as long as the server allows; ``on_queued`` is then
        called with the place, again and again.

        Raises
        ------
        PeerUnreachableError, PeerRefusedError, BadPeerDataError
        """
        stream = await node.open_stream(peer)
        try:
            await stream.send(request, tensors)
            while True:
                async with asyncio.timeout(10):
                    answer, _ = await stream.receive()
                if not (isinstance(answer, Queued) and request.wait):
                    break
                on_queued(peer, answer)
            if isinstance(answer, Refused):
                raise PeerRefusedError(answer.reason, peer=peer, code=answer.code, retry_after=answer.retry_after)
            if not isinstance(answer, SessionOpened) or answer.session != request.session:
                raise BadPeerDataError(f"answered {type(answer).__name__} to OpenSession", peer=peer)
        except TimeoutError:
            stream.close()
            raise PeerUnreachableError("did not open a session within 10 s", peer=peer) from None
        except BaseException:
            stream.close()
            raise
        return cls(stream, answer, request.upstream, inbox)

    async def send(self, message: AnyMessage, tensors: Sequence[RawTensor] = ()) -> None:
        await self._stream.send(message, tensors)

    async def ping(self, seconds: float) -> Pong:
        """The server's event loop answers; `PeerUnreachableError` if it does not within ``seconds``."""
        nonce = next(self._nonces)
        answer: asyncio.Future[Pong] = asyncio.get_running_loop().create_future()
        self._pongs[nonce] = answer
        try:
            async with asyncio.timeout(seconds):
                await self._stream.send(Ping(nonce))
                return await answer
        except TimeoutError:
            raise PeerUnreachableError(f"did not answer a ping for {seconds:.1f} s", peer=self.peer) from None
        finally:
            self._pongs.pop(nonce, None)

    async def relink(self, upstream: str | None, seconds: float = 5.0) -> None:
        """Tell the server who pushes to it from now on, and wait until it knows."""
        self._relinked = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._stream.send(Relink(upstream))
                await self._relinked
        except TimeoutError:
            raise PeerUnreachableError(f"did not answer a relink for {seconds:.1f} s", peer=self.peer) from None
        finally:
            self._relinked = None
        self.upstream = upstream

    async def close(self, *, politely: bool = True) -> None:
        """End the session on this server; it frees the caches when the stream ends, polite or not."""
        if self._closed:
            return
        self._closed = True
        if politely:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._stream.send(CloseSession())
        self._stream.close()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        try:
            while True:
                message, tensors = await self._stream.receive()
                if isinstance(message, Pong):
                    waiter = self._pongs.get(message.nonce)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(message)
                elif isinstance(message, Relinked):
                    if self._relinked is not None and not self._relinked.done():
                        self._relinked.set_result(None)
                else:
                    self._inbox.put_nowait(Arrival(self, message, tensors))
        except PeerError as error:
            waiters: list[asyncio.Future[Any]] = [*self._pongs.values()]
            if self._relinked is not None:
                waiters.append(self._relinked)
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
                    waiter.exception()  # somebody may have stopped waiting; that is not worth a warning
            if not self._closed:
                self._inbox.put_nowait(Arrival(self, error, {}))

    def __repr__(self) -> str:
        return f"<HopStream {self.peer[-6:]} session {self.session[:8]}>"
