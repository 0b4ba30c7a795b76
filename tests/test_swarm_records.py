from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from helpers import wait_until

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import MAX_RECORD_BYTES, MAX_RECORD_LIFETIME
from nbrunner.protocol.records import ServerRecord, servers_key, sign_record
from nbrunner.swarm import control
from nbrunner.swarm.daemon import start_p2p
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node

KEY = SwarmKey()


def run(coroutine: Coroutine[Any, Any, Any], timeout: float = 60.0) -> Any:
    return EngineLoop.get().run(coroutine, timeout)


def record(start: int = 0, **fields: Any) -> ServerRecord:
    return ServerRecord("m@1", 8, start, 8, **{"state": "online", **fields})


def signed(
    identity: Identity,
    expires: float,
    *,
    key: SwarmKey = KEY,
    role: Any = "host",
    expires_in: float | None = None,
    what: ServerRecord | None = None,
) -> bytes:
    credential = key.invite([], role=role, expires_in=expires_in).credential(identity.peer_id).encode()
    return sign_record(
        what or record(), identity=identity, credential=credential, swarm=key.public, expires=expires
    )


# -- what a storing node says ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    from nbrunner.swarm.validator import RecordValidator

    return RecordValidator(KEY.public)


def verdict(validator: Any, subkey: Any, value: bytes, expires: float, key: str | None = None) -> bool:
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils import MSGPackSerializer

    key_bytes = DHTID.generate(key or servers_key(KEY.public)).to_bytes()
    return bool(validator.validate(DHTRecord(key_bytes, MSGPackSerializer.dumps(subkey), value, expires)))


def test_a_good_record_is_stored(validator: Any) -> None:
    me, soon = Identity.generate(), time.time() + 60
    assert verdict(validator, me.peer_id, signed(me, soon), soon)


def test_plain_values_and_other_keys_are_not(validator: Any) -> None:
    me, soon = Identity.generate(), time.time() + 60
    good = signed(me, soon)
    assert not verdict(validator, None, good, soon), "a plain value would replace the whole dictionary"
    assert not verdict(validator, me.peer_id, good, soon, key="anything else")
    assert not verdict(validator, me.peer_id, good, soon, key=servers_key(SwarmKey().public))
    for subkey in (7, b"bytes", "", ("a", 1), [me.peer_id], me.peer_id.encode(), me.peer_id[:-1], "x" * 10_000):
        assert not verdict(validator, subkey, good, soon)


def test_a_record_of_somebody_else_is_not_stored(validator: Any) -> None:
    me, other, soon = Identity.generate(), Identity.generate(), time.time() + 60
    assert not verdict(validator, other.peer_id, signed(me, soon), soon)


def test_times(validator: Any) -> None:
    me, now = Identity.generate(), time.time()
    for expires in (now + MAX_RECORD_LIFETIME + 60, now + 1e9, float("inf"), float("nan")):
        assert not verdict(validator, me.peer_id, signed(me, expires), expires)
    soon = now + 60
    assert not verdict(validator, me.peer_id, signed(me, soon), soon + 1), "the time is part of what is signed"
    assert verdict(validator, me.peer_id, signed(me, now + MAX_RECORD_LIFETIME), now + MAX_RECORD_LIFETIME)


def test_an_expired_record_is_not_invalid(validator: Any) -> None:
    """It is not used, but a dictionary that still has it must be believed for its other entries."""
    me, past = Identity.generate(), time.time() - 500
    assert verdict(validator, me.peer_id, signed(me, past), past)


def test_a_record_does_not_outlive_its_invite(validator: Any) -> None:
    """Or it would turn bad while it is stored, and with it the dictionary it is in."""
    me, later = Identity.generate(), time.time() + 170
    assert not verdict(validator, me.peer_id, signed(me, later, expires_in=10), later)
    assert verdict(validator, me.peer_id, signed(me, later, expires_in=300), later)


def test_who_may_announce(validator: Any) -> None:
    me, soon = Identity.generate(), time.time() + 60
    assert not verdict(validator, me.peer_id, signed(me, soon, role="use"), soon)
    assert not verdict(validator, me.peer_id, signed(me, soon, key=SwarmKey()), soon)


def test_sizes_and_nonsense(validator: Any) -> None:
    me, soon = Identity.generate(), time.time() + 60
    large = record(adapters=["x" * 200] * 16, features=["y" * 200] * 16)
    assert len(signed(me, soon, what=large)) > MAX_RECORD_BYTES
    assert not verdict(validator, me.peer_id, signed(me, soon, what=large), soon)
    assert not verdict(validator, me.peer_id, b"", soon)
    assert not verdict(validator, me.peer_id, b"\xc1" * 100, soon)
    assert not verdict(validator, me.peer_id, signed(me, soon)[:-1], soon)
    for bad in (record(start=9), record(state="up"), record(step_seconds=-1.0)):
        assert not verdict(validator, me.peer_id, signed(me, soon, what=bad), soon)


# -- nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """An honest one that begins the swarm, two more, the second of which the tests turn bad."""

    async def start() -> list[Node]:
        first = await Node.create(swarm_key=KEY)
        invite = KEY.invite(first.addresses, role="host")
        return [first, *await asyncio.gather(Node.create(invite=invite), Node.create(invite=invite))]

    async def stop(running: list[Node]) -> None:
        await asyncio.gather(*(node.close() for node in running))

    running = run(start())
    yield running
    run(stop(running))


@pytest.fixture
def client(nodes: list[Node]) -> Iterator[Node]:
    node = run(Node.create(invite=KEY.invite(nodes[0].addresses), client_mode=True))
    yield node
    run(node.close())


def dht(node: Node) -> Any:
    return node._store()._dht


def key_id() -> Any:
    from hivemind.dht.routing import DHTID

    return DHTID.generate(servers_key(KEY.public))


def held_by(node: Node) -> dict[str, Any]:
    item = dht(node).protocol.storage.get(key_id())
    return dict(item.value.items()) if item is not None else {}


@pytest.mark.network
def test_everyone_sees_the_newest(nodes: list[Node], client: Node) -> None:
    first, second, _ = nodes

    async def rounds() -> None:
        for turn in range(3):
            assert await first.publish(record(queue_seconds=float(turn)), lifetime=60 - turn)
            assert await second.publish(record(start=4, queue_seconds=float(turn)))
            for reader in (*nodes, client):
                seen = await reader.fetch_records()
                assert seen[first.peer_id].queue_seconds == turn, "also when the newer one lives shorter"
                assert seen[second.peer_id].start == 4
        assert await first.publish(record(state="offline"))
        assert (await client.fetch_records())[first.peer_id].state == "offline"

    run(rounds())


@pytest.mark.network
def test_a_record_ends(nodes: list[Node], client: Node) -> None:
    third = nodes[2]
    third._last_expiry = 0.0
    assert run(third.publish(record(), lifetime=1.5))
    assert third.peer_id in run(client.fetch_records())
    wait_until(lambda: third.peer_id not in run(client.fetch_records()), 10, what="the record expires")


@pytest.mark.network
def test_what_a_member_tries_to_store(nodes: list[Node], client: Node) -> None:
    """By the RPCs themselves, which no client of ours would use so."""
    from hivemind.dht.storage import DictionaryDHTValue

    first, second, _ = nodes
    run(first.publish(record(), lifetime=100))
    soon, far = time.time() + 100, time.time() + 1e8
    me = client.identity
    good, forged = signed(me, soon), signed(me, far)
    honest = {one: held_by(second)[one] for one in (first.peer_id,)}

    async def store(value: Any, expires: float, subkey: Any) -> Any:
        from hivemind.p2p import PeerID

        answer = await dht(client).protocol.call_store(
            PeerID.from_base58(second.peer_id), [key_id()], [value], [expires], subkeys=[subkey]
        )
        return answer and list(answer)

    def dictionary(**entries: tuple[bytes, float]) -> Any:
        made = DictionaryDHTValue()
        for peer, (value, expires) in entries.items():
            made.store(peer, value, expires)
        return made

    assert run(store(b"plain", far, None)) == [False]
    assert run(store(b"nonsense", soon, first.peer_id)) == [False]
    assert run(store(good, soon, first.peer_id)) == [False]
    assert run(store(forged, far, me.peer_id)) == [False]
    assert run(store(dictionary(**{me.peer_id: (good, soon), first.peer_id: (b"gone", far)}), far, None)) == [False]
    assert me.peer_id not in held_by(second), "a dictionary with one bad entry is refused whole"
    assert run(store(good, soon, me.peer_id)) == [True], "the same way a good record is stored"
    assert me.peer_id in held_by(second)
    assert {one: held_by(second)[one] for one in (first.peer_id,)} == honest
    assert run(client.fetch_records())[first.peer_id] == record()


@pytest.mark.network
@pytest.mark.parametrize(
    "lie", ["empty for ever", "forged", "plain", "not a dictionary", "strange dictionary", "nothing", "silent"]
)
def test_a_lying_node_hides_nobody(
    nodes: list[Node], client: Node, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.proto import dht_pb2
    from hivemind.utils import MSGPackSerializer

    first, _, bad = nodes
    expires = run(_publish(first))
    asked = []
    made = DictionaryDHTValue()
    made.latest_expiration_time = float("inf")
    if lie == "forged":
        made.store(first.peer_id, signed(bad.identity, time.time() + 100), time.time() + 100)
        made.store(bad.peer_id, signed(bad.identity, expires), expires)
    if lie == "strange dictionary":
        made.maxsize = "abc"  # type: ignore[assignment]
    value = {"plain": b"plain", "not a dictionary": MSGPackSerializer.dumps([1, 2, 3])}.get(
        lie, MSGPackSerializer.dumps(made)
    )
    kind = dht_pb2.FOUND_REGULAR if lie == "plain" else dht_pb2.FOUND_DICTIONARY

    async def answer(data: bytes, _: Any) -> bytes:
        asked.append(lie)
        if lie == "silent":
            await asyncio.sleep(30)
        request, response = dht_pb2.FindRequest.FromString(data), dht_pb2.FindResponse()
        response.peer.CopyFrom(dht(bad).protocol.node_info)
        if lie != "nothing":
            response.results.append(dht_pb2.FindResult(type=kind, value=value, expiration_time=float("inf")))
        await dht(bad).protocol.authorizer.sign_response(response, request)
        return bytes(response.SerializeToString())

    run(client.fetch_records())
    assert bad.peer_id in client._store()._nodes
    handlers = bad._daemon.p2p._client.control.unary_handlers
    monkeypatch.setitem(handlers, next(name for name in handlers if name.endswith("rpc_find")), answer)
    began = time.monotonic()
    seen = run(client.fetch_records())
    assert time.monotonic() - began < 2.5
    assert asked, "the liar was not asked: this test shows nothing"
    assert seen[first.peer_id] == record(queue_seconds=0.25)
    if lie == "forged":
        assert bad.peer_id in seen, "its good entry beside the forged one counts"


async def _publish(node: Node) -> float:
    assert await node.publish(record(queue_seconds=0.25), lifetime=100)
    return node._last_expiry


@pytest.mark.network
def test_an_expired_entry_that_a_node_still_holds(
    nodes: list[Node], client: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node whose clock is slow, say. Its dictionary holds an expired record beside the good one."""
    first, second, bad = nodes
    good = run(_publish(first))
    past = time.time() - 30
    storage = dht(second).protocol.storage
    dictionary = storage.get(key_id()).value
    monkeypatch.setattr(dictionary, "frozen", True, raising=False)
    dictionary.store(bad.peer_id, signed(bad.identity, past), past)
    assert bad.peer_id in dictionary.data
    run(client.fetch_records())
    only_second = client._store()._nodes[second.peer_id]
    monkeypatch.setattr(client._store(), "_to_ask", lambda: [only_second])
    held, heard = run(client.fetch_held())
    assert heard == 1
    assert held[first.peer_id].expires == good
    assert bad.peer_id not in held
    # hivemind's own way of asking believes it too
    found = run(dht(client).protocol.call_find(only_second.peer, [key_id()]))
    assert first.peer_id in dict(found[key_id()][0].value.data)
    del dictionary.data[bad.peer_id]


@pytest.mark.network
def test_clocks_may_differ(nodes: list[Node], client: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    expires = run(_publish(nodes[0]))
    store = client._store()
    data = signed(nodes[0].identity, expires)
    real = time.time

    def believes(ahead: float) -> bool:
        monkeypatch.setattr(time, "time", lambda: real() + ahead)
        try:
            store._validator.open(nodes[0].peer_id, data, expires)
        except BadPeerDataError:
            return False
        finally:
            monkeypatch.setattr(time, "time", real)
        return True

    assert believes(0)
    assert believes(-60)
    assert believes(80)


@pytest.mark.network
def test_strangers_take_no_part(nodes: list[Node], client: Node) -> None:
    """Without an invite: not stored, not answered, not asked."""
    first = nodes[0]
    run(_publish(first))

    async def stranger() -> tuple[Any, Any, Any]:
        from hivemind.dht import DHTNode
        from hivemind.p2p import PeerID

        identity = Identity.generate()
        daemon = await start_p2p(identity)
        try:
            await control.connect(daemon.socket, first.peer_id, [first.addresses[0].rpartition("/p2p/")[0]])
            node = await DHTNode.create(
                p2p=daemon.p2p, initial_peers=first.addresses[:1], ensure_bootstrap_success=False, strict=False
            )
            peer, soon = PeerID.from_base58(first.peer_id), time.time() + 60
            mine = signed(identity, soon)  # even with a record that would be good
            answers = (
                await node.protocol.call_ping(peer),
                await node.protocol.call_store(peer, [key_id()], [mine], [soon], subkeys=[identity.peer_id]),
                await node.protocol.call_find(peer, [key_id()]),
            )
            known = dht(first).protocol.routing_table.get(peer_id=daemon.p2p.peer_id)
            await node.shutdown()
            return *answers, known
        finally:
            await daemon.close()

    assert run(stranger()) == (None, None, None, None)
    assert first.peer_id in run(client.fetch_records())


@pytest.mark.network
def test_an_answer_for_another_request_is_not_believed(nodes: list[Node]) -> None:
    from hivemind.proto import dht_pb2

    first, second, _ = nodes
    one, other = dht(first).protocol.authorizer, dht(second).protocol.authorizer

    async def exchange(change: Any) -> tuple[bool, bool]:
        request = dht_pb2.FindRequest(keys=[b"key"])
        await one.sign_request(request, None)
        received = dht_pb2.FindRequest.FromString(request.SerializeToString())
        change(received)
        accepted = await other.validate_request(received)
        response = dht_pb2.FindResponse(results=[dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)])
        await other.sign_response(response, request)
        answer = dht_pb2.FindResponse.FromString(response.SerializeToString())
        change(answer)
        return accepted, await one.validate_response(answer, request)

    assert run(exchange(lambda message: None)) == (True, True)
    assert run(exchange(lambda message: setattr(message.auth, "nonce", b"12345678"))) == (False, False)
    assert run(exchange(lambda message: setattr(message.auth, "signature", b"\0" * 64))) == (False, False)
    assert run(exchange(lambda message: message.ClearField("auth"))) == (False, False)
    assert run(exchange(lambda message: message.ClearField("keys" if hasattr(message, "keys") else "results"))) == (
        False,
        False,
    )


@pytest.mark.network
def test_names_of_nodes_that_are_none(nodes: list[Node], client: Node) -> None:
    from hivemind.p2p import PeerID

    store = client._store()
    run(client.fetch_records())
    known = dict(store._nodes)
    for node_id, peer in [
        (b"", b""),
        (b"x" * 20, b"nonsense"),
        (b"x" * 500, PeerID.from_base58(Identity.generate().peer_id).to_bytes()),
        (b"x" * 20, PeerID.from_base58(client.peer_id).to_bytes()),
        (b"x" * 20, b"\x12" * 3000),
    ]:
        store._learn(node_id, peer)
    assert store._nodes == known
    # Endless good names push nobody out who answers.
    run(_publish(nodes[0]))
    for _ in range(300):
        store._learn(key_id().to_bytes(), PeerID.from_base58(Identity.generate().peer_id).to_bytes())
    for _ in range(5):
        held, heard = run(client.fetch_held())
        assert heard == 3
        assert nodes[0].peer_id in held
    assert len(store._nodes) <= 64
