"""Adapters that servers serve by name: finding one, and offering one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from nbrunner.blocks.adapters import BlockAdapter, SpanAdapter
from nbrunner.blocks.adapters_wire import manifest_of
from nbrunner.blocks.lora import Learned
from nbrunner.client.adapters import AdapterSender
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.request_streams import RequestStreams
from nbrunner.errors import BadPeerDataError, PeerError, PeerRefusedError, SwarmError, UserInputError
from nbrunner.protocol.adapters import (
    AdapterInfo,
    AdapterManifest,
    AdapterOffered,
    GetAdapter,
    OfferAdapter,
    WithdrawAdapter,
)
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.manifests import encode_manifest, open_manifest, sign_manifest, uid_of
from nbrunner.swarm.directory import SwarmView

ANNOUNCED_SECONDS = 10.0
"""Until a server's record says what it has begun to serve; they change it a second or two later."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that some servers serve.

    Attributes
    ----------
    name, uid : str
        ``uid`` is the name and a digest of what it is.
    peers : list of str
        PeerIDs of its servers.
    blocks : list of (int, int)
        Ranges of blocks that they hold together.
    """

    name: str
    uid: str
    peers: list[str]
    blocks: list[tuple[int, int]]


@dataclass(frozen=True)
class Offer:
    """What became of an offer.

    Attributes
    ----------
    uid : str
        Under which it is served, and withdrawn.
    accepted : list of str
        PeerIDs of servers that took it.
    refused : dict of str to str
        PeerID → why not.
    missing : list of (int, int)
        Ranges of blocks that nobody who took it holds: while there are any, nobody can use it.
    """

    uid: str
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        words = [f"{self.uid}: taken by {', '.join(map(short_peer, self.accepted)) or 'nobody'}"]
        words += list(self.refused.values())
        if self.missing:
            spans = ", ".join(f"[{start}, {end})" for start, end in self.missing)
            words.append(f"nobody can use it while blocks {spans} are missing")
        return "; ".join(words)

    def __repr__(self) -> str:
        return f"<Offer {self}>"


class NamedAdapters:
    """Asks servers about adapters by name. All coroutines run in the engine's event loop."""

    def __init__(
        self,
        connection: SwarmConnection,
        streams: RequestStreams,
        sender: AdapterSender,
        model: str,
        num_blocks: int,
    ) -> None:
        self._connection = connection
        self._streams = streams
        self._sender = sender
        self._model = model
        self._num_blocks = num_blocks
        self._known: dict[str, AdapterManifest] = {}

    def served(self) -> list[ServedAdapter]:
        """All that servers of this model announce now."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for peer, entry in self._connection.directory.view.servers.items():
            if entry.record.model == self._model:
                for uid in entry.record.adapters:
                    found.setdefault(uid, []).append((peer, entry.record.start, entry.record.end))
        return [
            ServedAdapter(
                uid.partition("@")[0],
                uid,
                sorted(peer for peer, _, _ in holders),
                _joined((start, end) for _, start, end in holders),
            )
            for uid, holders in sorted(found.items())
        ]

    async def find(self, name: str) -> Learned:
        """The adapter of that name or uid, as passes need it.

        Raises
        ------
        UserInputError
            Nobody serves it, or several adapters have this name.
        SwarmError
            None of its servers could say what it is.
        """
        served = self.served()
        chosen = [one for one in served if name in (one.uid, one.name)]
        if not chosen:
            await self._connection.directory.refresh()  # it may have been offered a moment ago
            served = self.served()
            chosen = [one for one in served if name in (one.uid, one.name)]
        if not chosen:
            others = ", ".join(one.uid for one in served) or "none"
            raise UserInputError(
                f"nobody serves an adapter {name!r} for this model; served are: {others}. To serve it: nbrunner "
                f"serve MODEL --adapter {name.partition('@')[0]}=DIRECTORY"
            )
        if len(chosen) > 1:
            raise UserInputError(
                f"several adapters are called {name!r}: name one of {', '.join(one.uid for one in chosen)}"
            )
        (one,) = chosen
        manifest = self._known.get(one.uid) or await self._ask(one)
        self._known[one.uid] = manifest
        blocks = {block: BlockAdapter.named(digest) for block, digest in enumerate(manifest.blocks) if digest}
        return Learned(SpanAdapter(blocks, uid=one.uid), {}, one.uid)

    async def offer(self, name: str, adapter: SpanAdapter) -> Offer:
        """Ask every server of this model to serve an adapter under a name; its tensors must not change.

        Comes back when those who took it have announced it, so that the name can be used at once.
        """
        node = self._connection.node
        manifest = manifest_of(name, self._model, self._num_blocks, adapter.blocks, node.peer_id)
        encoded = encode_manifest(manifest)
        request = OfferAdapter(encoded, sign_manifest(encoded, node.swarm, node.identity))
        offer = Offer(uid_of(encoded, name))
        spans = []
        for peer, entry in sorted(self._connection.directory.view.servers.items()):
            record = entry.record
            if record.model != self._model or record.state != "online":
                continue
            try:
                await self._offer_to(peer, record.start, record.end, adapter, request)
            except PeerError as error:
                offer.refused[peer] = str(error)
            else:
                offer.accepted.append(peer)
                spans.append((record.start, record.end))
        held = _joined(spans)
        ends = [0, *(edge for span in held for edge in span), self._num_blocks]
        offer.missing.extend((low, high) for low, high in zip(ends[::2], ends[1::2], strict=True) if low < high)
        with contextlib.suppress(TimeoutError):
            await self._connection.directory.wait_for(partial(_announced, offer), ANNOUNCED_SECONDS)
        return offer

    async def _offer_to(self, peer: str, start: int, end: int, adapter: SpanAdapter, request: OfferAdapter) -> None:
        for again in (True, False):
            await self._sender.ensure(peer, adapter, start, end)
            try:
                await self._streams.ask(peer, request, (), AdapterOffered)
            except PeerRefusedError as error:
                if error.code != "adapter" or not again:
                    raise
                self._sender.forget(peer)
            else:
                return

    async def withdraw(self, uid: str) -> list[str]:
        """Have an own adapter served no longer; PeerIDs of the servers that no longer serve it."""
        gone = []
        for one in self.served():
            for peer in one.peers if one.uid == uid else ():
                try:
                    await self._streams.ask(peer, WithdrawAdapter(uid), (), AdapterOffered)
                except PeerRefusedError:
                    continue
                gone.append(peer)
        return gone

    async def _ask(self, one: ServedAdapter) -> AdapterManifest:
        problems = []
        for peer in one.peers:
            try:
                info, _ = await self._streams.ask(peer, GetAdapter(one.uid), (), AdapterInfo)
                uid, manifest = open_manifest(info.manifest, info.signature, self._connection.node.swarm)
                if uid != one.uid or manifest.model != self._model or len(manifest.blocks) != self._num_blocks:
                    raise BadPeerDataError("it is another adapter than the one it announced", peer=peer)
            except PeerError as error:
                problems.append(f"{short_peer(peer)}: {error}")
                self._connection.directory.mark_failed(peer, str(error))
            else:
                return manifest
        raise SwarmError(f"none of its servers could say what the adapter {one.uid} is: {'; '.join(problems)}")


def _announced(offer: Offer, view: SwarmView) -> bool | None:
    """True once all who took an offer and are still here say so to everybody; None before."""
    here = [view.servers[peer] for peer in offer.accepted if peer in view.servers]
    return all(offer.uid in entry.record.adapters for entry in here) or None


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
