"""Frames over one libp2p stream.

Between us and p2pd a stream is a unix socket. `FrameProtocol` cuts frames out of it and stops reading when nobody
takes them; a large body is received straight into the memory that its tensors then are. `Stream` is the face of it.

There and back between two processes over both daemons, with uvloop on two busy cores (medians): 4 kB 0.28 ms, 64 kB
0.6 ms, 1 MB 5 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import cast

from nbrunner.errors import BadPeerDataError, PeerUnreachableError
from nbrunner.protocol.credentials import Terms
from nbrunner.protocol.frames import PREFIX, RawTensor, check_prefix, decode_frame, encode_frame
from nbrunner.protocol.greeting import Welcome
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import MAX_FRAME_BYTES
from nbrunner.protocol.messages import AnyMessage
from nbrunner.swarm.control import ControlError, split_delimited

SCRATCH_BYTES = 256 << 10
_DIRECT_BYTES = 64 << 10  # bodies with more than this still missing are received in place
_JOIN_BYTES = 64 << 10  # frames up to this size are written as one buffer: one system call
_QUEUE_BYTES = 16 << 20  # reading stops while this much waits to be taken
_QUEUE_FRAMES = 1024

Frame = tuple[AnyMessage, dict[str, RawTensor]]


class FrameProtocol(asyncio.BufferedProtocol):
    """Bytes of one socket to frames, with back-pressure both ways.

    The first delimited message on the socket is p2pd's (who is there, or whether the stream could be opened), or
    says who comes by a shortcut; everything after it comes from the peer.

    Parameters
    ----------
    scratch
        Where small reads land before they are taken apart, at once; all streams of a loop may share it.
    begun
        There is no such first message.
    """

    def __init__(self, scratch: memoryview, *, begun: bool = False) -> None:
        self.max_body = MAX_FRAME_BYTES
        self.error: Exception | None = None
        self.closed = False
        self.first_only = False
        self._first_came = False
        self._discarding = False
        self._start: bytes | None = b"" if begun else None
        self._transport: asyncio.Transport | None = None
        self._scratch = scratch
        self._direct = False
        self._pending = bytearray()  # received and not yet understood
        self._header: bytes | None = None
        self._body: bytearray | None = None
        self._filled = 0
        self._frames: deque[tuple[bytes, bytearray]] = deque()
        self._queued = 0
        self._reading = True
        self._receiver: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    # -- called by the loop ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        # low=0: when drain returns, everything has left our memory, and the caller's tensors may change again.
        self._transport.set_write_buffer_limits(high=_JOIN_BYTES, low=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        self._direct = self._body is not None and len(self._body) - self._filled > _DIRECT_BYTES
        return memoryview(self._body)[self._filled :] if self._direct and self._body else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._discarding:
            return
        if self._direct:
            self._filled += nbytes
        else:
            self._pending += self._scratch[:nbytes]
        try:
            self._parse()
        except (BadPeerDataError, ControlError) as error:
            self.fail(error)

    def eof_received(self) -> bool:
        return False  # half-closed streams are of no use to us: close

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._wake(self._receiver)
        self._wake(self._writable)

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        self._wake(self._writable)
        self._writable = None

    # -- called by Stream -----------------------------------------------------------------------------------------

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        transport = self._transport
        if transport is None or self.closed or transport.is_closing():
            raise ConnectionResetError("the stream is closed")
        if sum(len(buffer) for buffer in buffers) <= _JOIN_BYTES:
            transport.write(b"".join(buffers))
        else:
            for buffer in buffers:
                transport.write(buffer)

    async def drained(self) -> None:
        """Wait until what was written has left, if there is much of it."""
        while self._writable is not None and not self.closed:
            await asyncio.shield(self._writable)
        if self.closed:
            raise ConnectionResetError("the stream is closed")

    async def next(self) -> tuple[bytes, bytearray]:
        """The next frame's header and body, undecoded."""
        while not self._frames:
            await self._news()
        header, body = self._frames.popleft()
        self._queued -= len(header) + len(body)
        self._steer()
        return header, body

    async def started(self) -> bytes:
        """p2pd's own message about this stream."""
        while self._start is None:
            await self._news()
        return self._start

    async def _news(self) -> None:
        if self.error is not None:
            raise self.error
        if self.closed:
            raise ConnectionResetError("the stream was closed by the other side")
        if self._receiver is not None:
            raise RuntimeError("two tasks read one stream")
        self._receiver = asyncio.get_running_loop().create_future()
        try:
            await self._receiver
        finally:
            self._receiver = None

    def accept_all(self) -> None:
        """Go on after the first frame (see ``first_only``)."""
        self.first_only = False
        self._first_came = False
        self._steer()

    def fail(self, error: Exception) -> None:
        """No more frames: whoever reads gets the error once what came before it has been taken."""
        if self.error is None:
            self.error = error
        self._pause()
        self._wake(self._receiver)

    async def wait_closed_by_peer(self) -> None:
        """Read on, without looking at what comes, until the other side closes."""
        self._discarding = True
        if not self._reading and self._transport is not None and not self.closed:
            self._reading = True
            self._transport.resume_reading()
        while not self.closed:
            self._receiver = asyncio.get_running_loop().create_future()
            await self._receiver

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- cutting --------------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        if self._start is None:
            found = split_delimited(self._pending)
            if found is None:
                return
            self._start, size = found
            del self._pending[:size]
            self._wake(self._receiver)
        while self.error is None and not self._full():
            if self._header is None:
                if len(self._pending) < PREFIX.size:
                    return
                header_size, body_size = check_prefix(bytes(self._pending[: PREFIX.size]), self.max_body)
                if len(self._pending) < PREFIX.size + header_size:
                    return
                self._header = bytes(self._pending[PREFIX.size : PREFIX.size + header_size])
                del self._pending[: PREFIX.size + header_size]
                self._body, self._filled = bytearray(body_size), 0
            body = self._body
            if body is None:
                return
            taken = min(len(body) - self._filled, len(self._pending))
            if taken:
                with memoryview(self._pending) as pending:
                    body[self._filled : self._filled + taken] = pending[:taken]
                del self._pending[:taken]
                self._filled += taken
            if self._filled < len(body):
                return
            self._frames.append((self._header, body))
            self._first_came = True
            self._queued += len(self._header) + len(body)
            self._header = self._body = None
            self._wake(self._receiver)
        self._steer(parse=False)

    def _full(self) -> bool:
        if self.first_only and self._first_came:
            return True
        return self._queued >= _QUEUE_BYTES or len(self._frames) >= _QUEUE_FRAMES

    def _steer(self, *, parse: bool = True) -> None:
        """Read or stop reading, as the queue has room."""
        if self._full() or self.error is not None:
            self._pause()
        elif not self._reading:
            self._reading = True
            if self._transport is not None and not self.closed and not self._transport.is_closing():
                self._transport.resume_reading()
            if parse:
                try:
                    self._parse()
                except (BadPeerDataError, ControlError) as error:
                    self.fail(error)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            if self._transport is not None and not self.closed and not self._transport.is_closing():
                self._transport.pause_reading()

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Stream:
    """A stream of frames to or from one peer.

    Attributes
    ----------
    peer : str
        PeerID of the other end, proved by libp2p.
    terms : Terms or None
        What its credential allows; on streams that it opened.
    welcome : Welcome or None
        Its answer to our `Hello`; on streams that we opened.
    """

    def __init__(self, protocol: FrameProtocol, peer: str) -> None:
        self.peer = peer
        self.terms: Terms | None = None
        self._welcome: Welcome | None = None
        self._protocol = protocol
        self._closed = False

    @property
    def welcome(self) -> Welcome:
        if self._welcome is None:
            raise RuntimeError("only who opened a stream was welcomed on it")
        return self._welcome

    @welcome.setter
    def welcome(self, welcome: Welcome) -> None:
        self._welcome = welcome

    @property
    def closed(self) -> bool:
        """Whether either side has closed it."""
        return self._closed or self._protocol.closed

    async def send(self, message: AnyMessage, tensors: Sequence[RawTensor] = ()) -> None:
        """Send one frame; frames of concurrent senders do not mix.

        Returns at once for small frames, and for large ones when their bytes have left this process: the tensors
        may then be changed.

        Raises
        ------
        PeerUnreachableError
            The stream is closed.
        ValueError
            The frame is larger than any peer accepts.
        """
        buffers = encode_frame(message, tensors)
        try:
            self._protocol.write(buffers)
            await self._protocol.drained()
        except ConnectionResetError:
            raise self._lost() from None

    async def receive(self) -> Frame:
        """The next message and its tensors by name.

        Raises
        ------
        PeerUnreachableError
            The stream ended.
        BadPeerDataError
            What came is not a frame, or is over the limits. Nothing more can be read.
        """
        try:
            header, body = await self._protocol.next()
            return decode_frame(header, body)
        except ConnectionResetError:
            raise self._lost() from None
        except BadPeerDataError as error:
            self._protocol.fail(error)
            raise BadPeerDataError(f"peer {short_peer(self.peer)}: {error}", peer=self.peer) from None
        except ControlError as error:
            raise PeerUnreachableError(str(error), peer=self.peer) from None

    async def close_after_peer(self, seconds: float) -> None:
        """Close when the other side has, or after ``seconds``: the last frame sent surely arrives.

        p2pd resets a stream that we have closed in both directions, and a reset overtakes what is still on its way:
        on a busy machine refusals got lost.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._protocol.wait_closed_by_peer()
        self.close()

    def close(self) -> None:
        """End the stream. What was sent just before may be lost, unless the other side waits for more."""
        self._closed = True
        self._protocol.close()

    def _lost(self) -> PeerUnreachableError:
        what = "this stream was closed here" if self._closed else "closed the stream, or was lost"
        return PeerUnreachableError(f"peer {short_peer(self.peer)}: {what}", peer=self.peer)

    def __repr__(self) -> str:
        return f"<Stream {short_peer(self.peer)}{', closed' if self.closed else ''}>"
