"""Sending adapters to servers: once for each content, in frames that they take."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nbrunner.blocks.adapters import BlockAdapter, SpanAdapter
from nbrunner.blocks.adapters_wire import pack_adapters
from nbrunner.client.request_streams import RequestStreams
from nbrunner.errors import BadPeerDataError, PeerRefusedError, SessionError, UserInputError
from nbrunner.protocol.adapters import AdapterStored, AdapterUse, PutAdapter
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import MAX_FRAME_BYTES, Limits
from nbrunner.swarm.routing import PlannedHop

FEATURE = "adapters"

REMEMBERED = 8192
"""Digests remembered of each server. What was forgotten too early is sent once more."""


class AdapterSender:
    """Knows which server has which adapters. All methods run in the engine's event loop.

    Attributes
    ----------
    bytes_sent : int
        Of adapters' tensors, since the beginning.
    """

    def __init__(self, streams: RequestStreams, model: str) -> None:
        self.bytes_sent = 0
        self._streams = streams
        self._model = model
        self._known: defaultdict[str, dict[bytes, None]] = defaultdict(dict)  # in the order of sending
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(
        self, peer: str, adapter: SpanAdapter | None, start: int, end: int, *, row: int = 0
    ) -> AdapterUse | None:
        """See that a server has the adapters of blocks ``[start, end)``, and say how to name them.

        Parameters
        ----------
        row
            Number of the request's first row in the batch.

        Raises
        ------
        PeerUnreachableError, PeerRefusedError, BadPeerDataError
        UserInputError
            A rank over the server's limit, or an adapter that fits no frame; no other server would take it either.
        SessionError
            The adapter was changed since it was first sent, by an optimiser between a forward pass and backward.
        """
        some = adapter.within(start, end) if adapter is not None else None
        if some is None:
            return None
        digests = [some.blocks[block].digest if block in some.blocks else b"" for block in range(start, end)]
        use = AdapterUse(digests, some.seed, some.first_row + row)
        if some.uid:
            return use  # the server has it by itself
        limits = await self._streams.limits(peer)
        async with self._locks[peer]:  # parts of one batch need the same at the same time
            known = self._known[peer]
            missing = {block: one for block, one in some.blocks.items() if one.digest not in known}
            if missing and FEATURE not in self._streams.features(peer):
                raise PeerRefusedError(
                    f"peer {short_peer(peer)} runs an older version that knows no adapters",
                    peer=peer,
                    code="adapter",
                )
            for group in _frames(missing, limits):
                await self._put(peer, group)
        return use

    @contextmanager
    def ahead(self, hops: Sequence[PlannedHop], adapter: SpanAdapter | None) -> Iterator[None]:
        """In here all servers of a chain are sent what they lack, in order, while the first ones compute already.

        What fails is left to `ensure` to say, when it is needed.
        """
        if adapter is None or len(hops) < 2:
            yield
            return

        async def bring() -> None:
            for hop in hops:
                await self.ensure(hop.peer, adapter, hop.start, hop.end)

        bringing = asyncio.ensure_future(bring())
        bringing.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            yield
        finally:
            bringing.cancel()

    def forget(self, peer: str) -> None:
        """A server says that it lacks what it should have: it was restarted, or had no room."""
        self._known.pop(peer, None)

    async def _put(self, peer: str, adapters: dict[int, BlockAdapter]) -> None:
        parts, tensors = pack_adapters(adapters)
        stored, _ = await self._streams.ask(peer, PutAdapter(self._model, parts), tensors, AdapterStored)
        self.bytes_sent += sum(tensor.spec.nbytes for tensor in tensors)
        wanted = [one.digest for _, one in sorted(adapters.items())]
        if stored.digests != wanted:
            changed = any(BlockAdapter(one.modules, one.prompt).digest != one.digest for one in adapters.values())
            if changed:
                raise SessionError(
                    "the adapter was changed after the forward pass began and before its backward pass ended: "
                    "call backward() before the optimiser's step, or run the forward pass again"
                )
            raise BadPeerDataError(f"peer {short_peer(peer)} stored other adapters than it was sent", peer=peer)
        known = self._known[peer]
        known.update(dict.fromkeys(wanted))
        while len(known) > REMEMBERED:
            del known[next(iter(known))]


def _frames(adapters: dict[int, BlockAdapter], limits: Limits) -> Iterator[dict[int, BlockAdapter]]:
    """Adapters in groups that fit a frame. `UserInputError` for what is over a limit by itself."""
    frame = min(limits.frame_bytes, MAX_FRAME_BYTES)
    group: dict[int, BlockAdapter] = {}
    held = 0
    for block, one in sorted(adapters.items()):
        if one.rank > limits.adapter_rank:
            raise UserInputError(
                f"an adapter of rank {one.rank} in block {block}, and the server allows {limits.adapter_rank}: "
                "use a lower rank"
            )
        if one.nbytes > frame:
            raise UserInputError(
                f"the adapter of block {block} has {one.nbytes} bytes, over the {frame} that fit one frame: use a "
                "lower rank or fewer target modules"
            )
        if group and held + one.nbytes > frame:
            yield group
            group, held = {}, 0
        group[block] = one
        held += one.nbytes
    if group:
        yield group
