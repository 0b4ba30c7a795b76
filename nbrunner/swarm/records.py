"""The swarm's records in the hivemind DHT.

`hivemind.dht.DHTNode` joins the nodes, keeps the routing table and answers others. Storing and finding go past its
`store` and `get` to the RPCs below them: `get` believes the expiration that a node claims for its answer, so that a
node which answers an empty dictionary "good for ever" ends the search and hides what the honest ones hold; it can
be hung by a node that sends another type; and it throws away a whole dictionary for one bad entry. Here every entry
of every answer is checked by itself, the latest wins, and the nodes nearest to the key are asked at once; whom
they name as near is asked next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.identity import is_peer_id, short_peer
from nbrunner.swarm.membership import MembershipAuthorizer
from nbrunner.swarm.validator import DirectoryValidator, SignedValidator


class Addressed(Protocol):
    """A record that says where its peer can be reached."""

    @property
    def addresses(self) -> list[str]: ...


T = TypeVar("T")
R = TypeVar("R", bound=Addressed)
logger = logging.getLogger(__name__)

REPLICAS = 8
"""Nodes nearest to the key that hold the records, and that are asked for them."""

_RPC_SECONDS = 3.0
_STRAGGLER_SECONDS = 0.5  # how much longer than the first answer the others may take
_ROUNDS = 3  # of asking nodes that the ones before have named
_NEWCOMERS = 4  # nodes asked each round that have not answered yet; so many can a liar name in vain
_SURE_SECONDS = 60.0  # after its last answer a node counts as a newcomer again
_STALE_SECONDS = 15.0  # after the last round of asking, ask again before storing
_BAN_SECONDS = 5.0  # for a node that does not answer, doubled each time
_MAX_BAN_SECONDS = 60.0
_MAX_FAILURES = 6  # in a row, then it is forgotten until somebody names it again
_MAX_NODES = 64
_DICTIONARY_TYPE = 0x50  # msgpack extension of hivemind's DictionaryDHTValue

_Entry = tuple[str, bytes, float]  # PeerID, signed record, expiration
_dictionary = msgspec.msgpack.Decoder(tuple[Any, Any, list[_Entry]])


class Held(NamedTuple, Generic[R]):
    """A checked record and until when it is good (unix seconds)."""

    record: R
    expires: float


@dataclass
class _Node:
    """A DHT node that somebody told us about."""

    peer: Any  # hivemind's PeerID
    distance: int  # to the key
    answered: float = float("-inf")  # monotonic, as retry_at
    retry_at: float = 0.0
    failures: int = 0

    @property
    def name(self) -> str:
        """Its PeerID in base58."""
        return str(self.peer.to_base58())


class RecordStore(Generic[R]):
    """Reads and writes the records of one kind in one swarm.

    Parameters
    ----------
    dht
        Our `hivemind.dht.DHTNode`.
    validator
        Of this kind of records; one of those that it was created with.
    peer_id
        Ours.
    reach
        Tries to connect to a peer in another way than libp2p's own, and says whether it did.
    client_mode
        If so, nobody asks us, and we hold nothing.

    Attributes
    ----------
    addresses : dict
        PeerID → multiaddresses, as the latest records say.
    """

    def __init__(
        self,
        dht: Any,
        validator: SignedValidator,
        peer_id: str,
        reach: Callable[[str], Awaitable[bool]],
        *,
        client_mode: bool,
    ) -> None:
        self._dht = dht
        self._validator = validator
        self._peer_id = peer_id
        self._reach = reach
        self._client_mode = client_mode
        self._nodes: dict[str, _Node] = {}
        self._asked_at = float("-inf")
        self.addresses: dict[str, list[str]] = {}

    @classmethod
    async def create(
        cls,
        p2p: Any,
        validators: Sequence[SignedValidator],
        authorizer: MembershipAuthorizer,
        bootstrap: Iterable[str],
        reach: Callable[[str], Awaitable[bool]],
        *,
        client_mode: bool,
    ) -> RecordStore[R]:
        """Join the DHT over a P2P that is already connected to ``bootstrap`` (multiaddresses with PeerIDs).

        The store is for the first of ``validators``; `beside` makes those for the others.
        """
        dht = await DHTNode.create(
            p2p=p2p,
            initial_peers=list(bootstrap),
            client_mode=client_mode,
            record_validator=DirectoryValidator(validators),
            authorizer=authorizer,
            num_replicas=REPLICAS,
            wait_timeout=_RPC_SECONDS,
            # Whether others can reach us is the doctor's question; hivemind would also refuse clocks 3 s apart.
            ensure_bootstrap_success=False,
            strict=False,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            reuse_get_requests=False,
        )
        return cls(dht, validators[0], p2p.peer_id.to_base58(), reach, client_mode=client_mode)

    def beside(self, validator: SignedValidator) -> RecordStore[Any]:
        """Another kind of records over the same DHT node, which stays ours to close."""
        return RecordStore(self._dht, validator, self._peer_id, self._reach, client_mode=self._client_mode)

    async def close(self) -> None:
        await self._dht.shutdown()

    @property
    def alone(self) -> bool:
        """Whether no other DHT node is known."""
        return not self._dht.protocol.routing_table.get_nearest_neighbors(self._validator.key_id, 1)

    async def ping(self, peer: str) -> bool:
        """Make a DHT node known to us again, by its PeerID."""
        self._nodes.pop(peer, None)
        return await self._dht.protocol.call_ping(PeerID.from_base58(peer)) is not None

    async def publish(self, data: bytes, expires: float) -> int:
        """Store our own signed record; returns the nodes that took it (ourselves included)."""
        key, peer = self._validator.key_id, self._peer_id
        if time.monotonic() - self._asked_at > _STALE_SECONDS:
            await self.fetch()
        taken = 0
        if not self._client_mode:
            taken += bool(self._dht.protocol.storage.store_subkey(key, peer, data, expires))

        async def store(node: _Node) -> bool:
            async def attempt() -> Any:
                return await self._dht.protocol.call_store(node.peer, [key], [data], [expires], subkeys=[peer])

            answer = await attempt()
            if answer is None and await self._reach(node.name):
                answer = await attempt()
            self._judge(node, answered=answer is not None)
            return bool(answer and answer[0])

        tasks = [asyncio.create_task(store(node)) for node in self._to_ask()]
        for task in await _first_and_stragglers(tasks):
            taken += task.result()
        return taken

    async def fetch(self) -> tuple[dict[str, Held[R]], int]:
        """Every good record that any of the nodes holds, the latest of each peer, and how many nodes answered."""
        found: dict[str, Held[R]] = {}
        if not self._client_mode:
            own = self._dht.protocol.storage.get(self._validator.key_id)
            if own is not None and not isinstance(own.value, bytes):
                self._merge(found, [(peer, item.value, item.expiration_time) for peer, item in own.value.items()])
        self._asked_at = time.monotonic()
        asked: set[str] = set()
        homeless: list[_Node] = []
        answered = 0
        for _ in range(_ROUNDS):
            nodes = [node for node in self._to_ask() if node.name not in asked]
            # Those that did not answer, but whose addresses have just come with the answer of another.
            nodes += [node for node in homeless if self.addresses.get(node.name)]
            if not nodes:
                break
            homeless = [node for node in nodes if not self.addresses.get(node.name)]
            asked.update(node.name for node in nodes)
            tasks = [asyncio.create_task(self._ask(node)) for node in nodes]
            for task in await _first_and_stragglers(tasks):
                if (entries := task.result()) is not None:
                    answered += 1
                    self._merge(found, entries)
            homeless = [node for node in homeless if node.failures]
        self.addresses = {peer: held.record.addresses for peer, held in found.items()}
        return found, answered

    async def _ask(self, node: _Node) -> list[_Entry] | None:
        """The entries one node holds, unchecked; None if it does not answer, or not with a dictionary."""
        result = await self._find(node)
        if result is None and await self._reach(node.name):
            result = await self._find(node)
        self._judge(node, answered=result is not None)
        if result is None:
            return None
        for node_id, peer in list(zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False))[:20]:
            self._learn(node_id, peer)
        return _entries(result)

    def _merge(self, found: dict[str, Held[R]], entries: Iterable[_Entry]) -> None:
        now = time.time()
        for peer, value, expires in entries:
            held = found.get(peer)
            if expires <= now or (held is not None and held.expires >= expires):
                continue
            try:
                record = self._validator.open(peer, value, expires)
            except BadPeerDataError as error:
                logger.debug("record of %s not believed: %s", short_peer(peer), error)
                continue
            found[peer] = Held(record, expires)
            if self.addresses.get(peer) != record.addresses:
                self.addresses[peer] = record.addresses
                if peer in self._nodes:
                    self._nodes[peer].retry_at = 0.0  # it may have failed for want of them

    async def _find(self, node: _Node) -> Any:
        protocol = self._dht.protocol
        request = dht_pb2.FindRequest(keys=[self._validator.key_id.to_bytes()], peer=protocol.node_info)
        try:
            response = await protocol.get_stub(node.peer).rpc_find(request, timeout=_RPC_SECONDS)
        except Exception as error:  # noqa: BLE001 - hivemind raises what p2pd or the other node says, of any type
            logger.debug("node %s did not answer: %r", node.peer, error)
            return None
        return response.results[0] if response is not None and len(response.results) == 1 else None

    # -- which nodes to ask ---------------------------------------------------------------------------------------

    def _learn(self, node_id: bytes, peer: bytes) -> None:
        """Take in what another node says of a third; it may be nonsense."""
        try:
            self._add(DHTID.from_bytes(node_id), PeerID(peer))
        except (ValueError, AssertionError, TypeError):  # what hivemind raises for bytes of a wrong form
            logger.debug("a node was named that cannot be one")

    def _add(self, node_id: Any, peer: Any) -> None:
        name = peer.to_base58()
        if name != self._peer_id and name not in self._nodes and is_peer_id(name):
            self._nodes[name] = _Node(peer, self._validator.key_id.xor_distance(node_id))

    def _to_ask(self) -> list[_Node]:
        """The nodes nearest to the key: those known to answer, and a few that may."""
        table, key = self._dht.protocol.routing_table, self._validator.key_id
        for node_id, peer in table.get_nearest_neighbors(key, REPLICAS, exclude=self._dht.node_id):
            self._add(node_id, peer)
        now = time.monotonic()
        ranked = sorted(self._nodes.values(), key=lambda node: node.distance)
        sure = [node for node in ranked if now - node.answered < _SURE_SECONDS and node.retry_at <= now]
        others = [node for node in ranked if now - node.answered >= _SURE_SECONDS and node.retry_at <= now]
        if len(self._nodes) > _MAX_NODES:
            kept = [*sure, *others][:_MAX_NODES]
            self._nodes = {node.name: node for node in kept}
        return sure[:REPLICAS] + others[:_NEWCOMERS]

    def _judge(self, node: _Node, *, answered: bool) -> None:
        """Leave out nodes that do not answer, for a while: each would cost every refresh a timeout."""
        now = time.monotonic()
        if answered:
            node.answered, node.failures, node.retry_at = now, 0, 0.0
            return
        node.retry_at = now + min(_BAN_SECONDS * 2**node.failures, _MAX_BAN_SECONDS)
        node.failures += 1
        if node.failures >= _MAX_FAILURES:
            self._nodes.pop(node.name, None)
        table = self._dht.protocol.routing_table
        node_id = table.get(peer_id=node.peer)
        if node_id is not None:
            del table[node_id]


def _entries(result: Any) -> list[_Entry] | None:
    """What a node answered, as a dictionary's entries; None if it is something else."""
    if result.type == dht_pb2.NOT_FOUND:
        return []
    try:
        outer = msgspec.msgpack.decode(result.value, type=msgspec.msgpack.Ext)
        if result.type != dht_pb2.FOUND_DICTIONARY or outer.code != _DICTIONARY_TYPE:
            return None
        return _dictionary.decode(outer.data)[2]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def _first_and_stragglers(tasks: Sequence[asyncio.Task[T]]) -> set[asyncio.Task[T]]:
    """Those that are done soon after the first one; the others are cancelled, or end by themselves."""
    if not tasks:
        return set()
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if pending:
            more, pending = await asyncio.wait(pending, timeout=_STRAGGLER_SECONDS)
            done |= more
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
    return done
