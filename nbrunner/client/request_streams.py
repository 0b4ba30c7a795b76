"""Streams for requests without a session, kept open between requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from nbrunner.errors import BadPeerDataError, PeerError, PeerUnreachableError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.schema import Message
from nbrunner.protocol.status import Ping, Pong
from nbrunner.swarm.greeting import refusal
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

IDLE_SECONDS = 60.0
"""An idle stream is closed after this long: it costs the server memory."""

IDLE_STREAMS = 4
"""Idle streams kept for each peer."""

CHECK_SECONDS = 3.0
"""An answer that takes longer makes us ask whether the server is alive. Its compute thread may take any time."""

PING_SECONDS = 3.0

LONGEST_SECONDS = 600.0
"""A request that takes longer is given up even though the server is alive: it has lost it."""

Answer = TypeVar("Answer", bound=Message)


class RequestStreams:
    """Asks peers and waits for their answers. All methods run in the engine's event loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._idle: defaultdict[str, list[tuple[float, Stream]]] = defaultdict(list)
        self._limits: dict[str, Limits] = {}
        self._features: dict[str, frozenset[str]] = {}
        self._nonces = itertools.count(1)
        self._closed = False

    async def limits(self, peer: str) -> Limits:
        """What a peer allows; asks it the first time.

        Raises
        ------
        PeerUnreachableError, PeerRefusedError, BadPeerDataError
        """
        if peer not in self._limits:
            self._put_back(await self._open(peer))
        return self._limits[peer]

    def features(self, peer: str) -> frozenset[str]:
        """Optional abilities of a peer whose `limits` have been asked for."""
        return self._features.get(peer, frozenset())

    async def ask(
        self, peer: str, message: AnyMessage, tensors: Sequence[RawTensor], expected: type[Answer]
    ) -> tuple[Answer, Mapping[str, RawTensor]]:
        """One request and its answer.

        Raises
        ------
        PeerUnreachableError
            No connection, or silence. A stream that was idle may have been closed meanwhile: that is tried again.
        PeerRefusedError
            It said no.
        BadPeerDataError
            It answered something else.
        """
        while True:
            kept = self._take_idle(peer)
            stream = kept or await self._open(peer)
            try:
                await stream.send(message, tensors)
                answer, received = await self._receive(stream)
            except PeerUnreachableError:
                stream.close()
                if kept is None:
                    raise
                continue
            except BaseException:
                stream.close()
                raise
            if isinstance(answer, expected):
                self._put_back(stream)
                return answer, received
            stream.close()
            if isinstance(answer, Refused):
                raise refusal(peer, answer)
            raise BadPeerDataError(f"peer {short_peer(peer)} answered {type(answer).__name__}", peer=peer)

    async def close(self) -> None:
        self._closed = True
        for streams in self._idle.values():
            for _, stream in streams:
                stream.close()
        self._idle.clear()

    async def _receive(self, stream: Stream) -> tuple[AnyMessage, Mapping[str, RawTensor]]:
        """The answer, however long it takes, as long as the server is alive."""
        receiving = asyncio.ensure_future(stream.receive())
        deadline = time.monotonic() + LONGEST_SECONDS
        try:
            while not (await asyncio.wait({receiving}, timeout=CHECK_SECONDS))[0]:
                if time.monotonic() > deadline:
                    raise PeerUnreachableError(
                        f"peer {short_peer(stream.peer)} has not answered for {LONGEST_SECONDS:.0f} s",
                        peer=stream.peer,
                    )
                await self._ping(stream.peer)
            return receiving.result()
        finally:
            if not receiving.done():
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError, PeerError):
                    await receiving

    async def _ping(self, peer: str) -> None:
        # on a stream of its own: requests on one stream are answered in turn
        stream = self._take_idle(peer) or await self._open(peer)
        try:
            async with asyncio.timeout(PING_SECONDS):
                await stream.send(Ping(next(self._nonces)))
                answer, _ = await stream.receive()
        except TimeoutError:
            stream.close()
            raise PeerUnreachableError(f"peer {short_peer(peer)} went silent", peer=peer) from None
        except BaseException:
            stream.close()
            raise
        if not isinstance(answer, Pong):
            stream.close()
            raise BadPeerDataError(f"peer {short_peer(peer)} answered {type(answer).__name__} to a ping", peer=peer)
        self._put_back(stream)

    async def _open(self, peer: str) -> Stream:
        stream = await self._node.open_stream(peer)
        self._limits[peer] = stream.welcome.limits
        self._features[peer] = frozenset(stream.welcome.features)
        return stream

    def _take_idle(self, peer: str) -> Stream | None:
        self._close_old()
        streams = self._idle.get(peer)
        while streams:
            _, stream = streams.pop()
            if not stream.closed:
                return stream
        return None

    def _put_back(self, stream: Stream) -> None:
        streams = self._idle[stream.peer]
        if self._closed or stream.closed or len(streams) >= IDLE_STREAMS:
            stream.close()
        else:
            streams.append((time.monotonic(), stream))

    def _close_old(self) -> None:
        oldest = time.monotonic() - IDLE_SECONDS
        for peer, streams in list(self._idle.items()):
            for since, stream in streams:
                if since < oldest:
                    stream.close()
            self._idle[peer] = [(since, stream) for since, stream in streams if since >= oldest]
