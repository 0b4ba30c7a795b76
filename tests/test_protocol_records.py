from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.errors import BadPeerDataError, InviteError
from nbrunner.protocol.credentials import SwarmKey, check_credential
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import MAX_RECORD_BYTES, MAX_RECORD_LIFETIME
from nbrunner.protocol.records import ServerRecord, SignedRecord, open_record, servers_key, sign_record

KEY = SwarmKey()
ME = Identity(b"m" * 32)
NOW = 1_800_000_000.0
CREDENTIAL = KEY.invite([], role="host").credential(ME.peer_id).encode()


def record(**fields: Any) -> ServerRecord:
    return ServerRecord(**{"model": "m@1", "num_blocks": 8, "start": 2, "end": 5, "state": "online", **fields})


def signed(what: ServerRecord | None = None, *, expires: float = NOW + 60, **options: Any) -> bytes:
    return sign_record(
        what or record(),
        **{"identity": ME, "credential": CREDENTIAL, "swarm": KEY.public, "expires": expires, **options},
    )


def opened(data: bytes, *, expires: float = NOW + 60, **options: Any) -> ServerRecord:
    return open_record(
        data, **{"peer_id": ME.peer_id, "swarm": KEY.public, "expires": expires, "now": NOW, **options}
    )


@given(
    st.builds(
        record,
        name=st.text(max_size=60),
        step_seconds=st.floats(0, 86400),
        prefill_tokens_per_second=st.floats(0, 1e12),
        cache_bytes_left=st.integers(0, 2**53),
        round_trips=st.dictionaries(st.text(max_size=20), st.floats(0, 100), max_size=16),
        adapters=st.lists(st.text(max_size=20), max_size=16),
    )
)
def test_a_record_there_and_back(what: ServerRecord) -> None:
    data = signed(what)
    if len(data) <= MAX_RECORD_BYTES:
        assert opened(data) == what


def test_a_usual_record_is_small() -> None:
    usual = record(name="my server", round_trips={Identity.generate().peer_id: 0.1 for _ in range(4)})
    assert len(signed(usual)) < 1024


def test_only_the_signer_the_swarm_and_the_time_that_were_signed() -> None:
    data = signed()
    for wrong in (
        {"peer_id": Identity.generate().peer_id},
        {"peer_id": "nobody"},
        {"swarm": SwarmKey().public},
        {"expires": NOW + 61},
    ):
        with pytest.raises(BadPeerDataError):
            opened(data, **wrong)
    assert opened(data) == record()


@pytest.mark.parametrize(
    "expires",
    [NOW - 6, NOW - 1e9, NOW + MAX_RECORD_LIFETIME + 6, NOW + 1e9, float("inf"), float("-inf"), float("nan")],
)
def test_times_that_are_refused(expires: float) -> None:
    with pytest.raises(BadPeerDataError, match="expires"):
        opened(signed(expires=expires), expires=expires)


def test_no_record_without_the_right_to_host() -> None:
    for key, options in ((KEY, {"role": "use"}), (SwarmKey(), {"role": "host"})):
        credential = key.invite([], **options).credential(ME.peer_id).encode()  # type: ignore[arg-type]
        with pytest.raises(BadPeerDataError, match="refused"):
            opened(signed(credential=credential))
    late = KEY.invite([], role="host", expires_in=60).credential(ME.peer_id).encode()
    expires = time.time() + 60 + 120
    with pytest.raises(BadPeerDataError, match="expired"):
        opened(signed(credential=late, expires=expires), expires=expires, now=expires)


@pytest.mark.parametrize(
    "fields",
    [
        {"start": 5, "end": 5},
        {"start": 6, "end": 5},
        {"end": 9},
        {"num_blocks": 0},
        {"start": -1},
        {"state": "fine"},
        {"step_seconds": -1.0},
        {"step_seconds": float("nan")},
        {"step_seconds": 1e9},
        {"queue_seconds": float("inf")},
        {"cache_bytes_left": -1},
        {"name": "x" * 61},
        {"model": "x" * 201},
        {"round_trips": {str(i): 0.1 for i in range(17)}},
        {"round_trips": {"peer": float("inf")}},
        {"adapters": ["a"] * 17},
        {"num_blocks": 10**6, "end": 10**6},
    ],
)
def test_claims_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(BadPeerDataError):
        opened(signed(record(**fields)))


def test_a_record_that_is_too_large() -> None:
    large = signed(record(adapters=["x" * 200] * 16, features=["y" * 200] * 16))
    assert len(large) > MAX_RECORD_BYTES
    with pytest.raises(BadPeerDataError, match="bytes"):
        opened(large)


def test_fields_of_later_versions_are_passed_over() -> None:
    class LaterRecord(ServerRecord, frozen=True):
        colour: str = "green"

    later = LaterRecord(model="m@1", num_blocks=8, start=2, end=5, state="online")
    assert opened(signed(later)) == record()


@pytest.mark.parametrize("text", [b"\x80ost", b"ho\xffs"])
def test_text_that_is_no_text(text: bytes) -> None:
    """msgspec raises UnicodeDecodeError for it, which is none of its own errors."""
    credential = CREDENTIAL.replace(b"host", text)
    assert credential != CREDENTIAL
    with pytest.raises(BadPeerDataError):
        opened(signed(credential=credential))
    with pytest.raises(InviteError):
        check_credential(credential, swarm=KEY.public, peer_id=ME.peer_id)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(BadPeerDataError):
        opened(data)


@given(st.data())
def test_one_changed_byte_is_noticed(data: st.DataObject) -> None:
    good = signed()
    index = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255))
    if good[index] != value:
        with pytest.raises(BadPeerDataError):
            opened(good[:index] + bytes([value]) + good[index + 1 :])


def test_a_payload_cannot_be_moved_to_another_peer() -> None:
    mine = msgspec.msgpack.decode(signed(), type=SignedRecord)
    other = Identity.generate()
    theirs = KEY.invite([], role="host").credential(other.peer_id).encode()
    moved = msgspec.msgpack.encode(SignedRecord(mine.payload, theirs, mine.signature))
    with pytest.raises(BadPeerDataError, match="not signed by the peer"):
        opened(moved, peer_id=other.peer_id)


def test_one_key_per_swarm() -> None:
    assert servers_key(KEY.public) == servers_key(KEY.public)
    assert servers_key(KEY.public) != servers_key(SwarmKey().public)
