"""Round trips to servers, measured over streams that are kept open."""

from __future__ import annotations

import asyncio
import itertools
import time

from nbrunner.errors import BadPeerDataError, PeerError, PeerUnreachableError
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.status import Ping, Pong
from nbrunner.swarm.greeting import refusal
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

_SMOOTHING = 0.3
_MAX_STREAMS = 32


class RoundTrips:
    """Pings peers, and remembers a smoothed round trip of each.

    A kept stream measures what a step pays: the way to the event loop of the server and back. Opening one costs
    several round trips and would measure those.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._streams: dict[str, Stream] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._nonces = itertools.count(1)
        self._smoothed: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def get(self, peer: str) -> float | None:
        """Seconds, or None if never measured."""
        return self._smoothed.get(peer)

    def age(self, peer: str) -> float:
        """Seconds since the last answer; infinite if there was none."""
        return time.monotonic() - self._measured.get(peer, float("-inf"))

    def add(self, peer: str, seconds: float) -> None:
        """Take in a measurement made elsewhere."""
        before = self._smoothed.get(peer)
        self._smoothed[peer] = seconds if before is None else before + _SMOOTHING * (seconds - before)
        self._measured[peer] = time.monotonic()

    def forget(self, peer: str) -> None:
        """Drop the stream and what was measured."""
        self._smoothed.pop(peer, None)
        self._measured.pop(peer, None)
        stream = self._streams.pop(peer, None)
        if stream is not None:
            stream.close()

    async def measure(self, peer: str, timeout: float = 3.0) -> float:
        """Ping once and return the seconds it took.

        Raises
        ------
        PeerUnreachableError, PeerRefusedError, BadPeerDataError
        """
        async with self._locks.setdefault(peer, asyncio.Lock()):
            try:
                async with asyncio.timeout(timeout):
                    return await self._measure(peer)
            except TimeoutError:
                self.forget(peer)
                raise PeerUnreachableError(
                    f"peer {short_peer(peer)} did not answer a ping within {timeout:.1f} s", peer=peer
                ) from None
            except PeerError:
                self.forget(peer)
                raise

    async def _measure(self, peer: str) -> float:
        stream = self._streams.get(peer)
        if stream is None or stream.closed:
            stream = self._streams[peer] = await self._node.open_stream(peer)
            while len(self._streams) > _MAX_STREAMS:
                oldest = next(iter(self._streams))
                self._streams.pop(oldest).close()
        nonce = next(self._nonces)
        started = time.perf_counter()
        await stream.send(Ping(nonce))
        answer, _ = await stream.receive()
        seconds = time.perf_counter() - started
        if isinstance(answer, Refused):
            raise refusal(peer, answer, "a ping")
        if not isinstance(answer, Pong) or answer.nonce != nonce:
            raise BadPeerDataError(f"peer {short_peer(peer)} answered {type(answer).__name__} to a ping", peer=peer)
        self.add(peer, seconds)
        return seconds

    def close(self) -> None:
        for peer in list(self._streams):
            self.forget(peer)
