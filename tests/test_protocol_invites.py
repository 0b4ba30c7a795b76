from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.errors import InviteError, UserInputError
from nbrunner.protocol.credentials import (
    Credential,
    Invite,
    SwarmKey,
    Terms,
    check_credential,
    swarm_name,
)
from nbrunner.protocol.identity import (
    Identity,
    is_peer_id,
    peer_id_of,
    public_key_of,
    short_peer,
    signature_is_valid,
)

KEY = SwarmKey()
ADDRESS = f"/ip4/10.0.0.1/tcp/31330/p2p/{Identity.generate().peer_id}"


def raw_of(text: str) -> bytes:
    body = text.removeprefix("nbr1-")
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))


def text_of(payload: bytes) -> str:
    return "nbr1-" + base64.urlsafe_b64encode(payload + hashlib.sha256(payload).digest()[:4]).decode().rstrip("=")


def change(text: str, index: int, value: Any) -> str:
    """The invite with one field of its payload replaced, and a checksum that fits."""
    fields = msgspec.msgpack.decode(raw_of(text)[:-4])
    fields[index] = value
    return text_of(msgspec.msgpack.encode(fields))


# -- invites -----------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["use", "host"]),
    st.none() | st.floats(1, 1e9),
    st.integers(0, 100),
    st.floats(0, 1e6),
    st.lists(st.just(ADDRESS), max_size=5),
)
def test_an_invite_is_what_was_put_into_it(
    role: Any, expires_in: float | None, sessions: int, rate: float, addresses: list[str]
) -> None:
    made = KEY.invite(addresses, role=role, expires_in=expires_in, max_sessions=sessions, tokens_per_second=rate)
    read = Invite.parse(str(made))
    assert str(read) == str(made)
    assert read.swarm == KEY.public
    assert read.addresses == addresses
    assert (read.terms.role, read.terms.max_sessions, read.terms.tokens_per_second) == (role, sessions, rate)
    assert (read.terms.expires == 0) == (expires_in is None)
    moved = Invite.parse(str(read.with_addresses(["/ip4/1.1.1.1/tcp/1"])))
    assert moved.addresses == ["/ip4/1.1.1.1/tcp/1"]
    assert moved.terms == read.terms


def test_an_invite_that_was_wrapped_by_a_mail_program() -> None:
    text = str(KEY.invite([ADDRESS]))
    assert Invite.parse(f"  {text[:40]}\n {text[40:90]}\r\n\t{text[90:]} \n").addresses == [ADDRESS]


@pytest.mark.parametrize("text", ["", "hello", "nbr2-abc", "NBR1-abc", "nbr1-", "nbr1-!!!!", "nbr1-aaaa", None, 5])
def test_what_is_no_invite(text: Any) -> None:
    with pytest.raises(InviteError):
        Invite.parse(text)


@given(st.text(max_size=200))
def test_random_text_is_refused_and_nothing_worse(text: str) -> None:
    for candidate in (text, "nbr1-" + text):
        with pytest.raises(InviteError):
            Invite.parse(candidate)


@given(st.binary(max_size=300))
def test_random_payloads_with_a_good_checksum_are_refused(payload: bytes) -> None:
    with pytest.raises(InviteError):
        Invite.parse(text_of(payload))


@given(st.data())
def test_one_wrong_character_is_noticed(data: st.DataObject) -> None:
    text = str(KEY.invite([ADDRESS]))
    index = data.draw(st.integers(5, len(text) - 2))
    letter = data.draw(st.sampled_from("abcXYZ019-_"))
    if text[index] != letter:
        with pytest.raises(InviteError, match="damaged"):
            Invite.parse(text[:index] + letter + text[index + 1 :])


def test_terms_cannot_be_improved() -> None:
    text = str(KEY.invite([ADDRESS], role="use", expires_in=100, max_sessions=1))
    assert Invite.parse(change(text, 4, ["/ip4/9.9.9.9/tcp/9"])).addresses == ["/ip4/9.9.9.9/tcp/9"]
    for terms in (
        ["host", time.time() + 100, 1, 0.0],
        ["use", time.time() + 1e6, 1, 0.0],
        ["use", 0.0, 1, 0.0],
        ["use", time.time() + 100, 0, 0.0],
    ):
        with pytest.raises(InviteError, match="not signed"):
            Invite.parse(change(text, 1, terms))
    with pytest.raises(InviteError, match="not signed"):
        Invite.parse(change(text, 0, SwarmKey().public))
    with pytest.raises(InviteError, match="not signed"):
        Invite.parse(change(text, 2, b"s" * 32))
    with pytest.raises(InviteError):
        Invite.parse(change(text, 2, b"short"))
    with pytest.raises(InviteError, match="too long"):
        Invite.parse(text + "a" * 5000)


def test_an_expired_invite() -> None:
    with pytest.raises(InviteError, match="expired 2 h ago"):
        Invite.parse(str(KEY.invite([ADDRESS], expires_in=-7200)))
    Invite.parse(str(KEY.invite([ADDRESS], expires_in=-30)))  # clocks differ


# -- credentials -------------------------------------------------------------------------------------------------


def credential(peer: str, key: SwarmKey = KEY, **options: Any) -> bytes:
    return key.invite([], **options).credential(peer).encode()


def test_a_good_credential() -> None:
    me = Identity.generate().peer_id
    assert check_credential(credential(me, max_sessions=3), swarm=KEY.public, peer_id=me).max_sessions == 3
    assert check_credential(credential(me, role="host"), swarm=KEY.public, peer_id=me, role="host").role == "host"
    parsed = Invite.parse(str(KEY.invite([])))
    check_credential(parsed.credential(me).encode(), swarm=KEY.public, peer_id=me)


def test_what_is_refused_and_why() -> None:
    me, other = Identity.generate().peer_id, Identity.generate().peer_id
    for shown, role, words in [
        (b"", "use", "private"),
        (b"\xc1garbage", "use", "cannot be read"),
        (credential(other), "use", "another peer"),
        (credential(me, SwarmKey()), "use", "belongs to another"),
        (credential(me, expires_in=-100), "use", "expired"),
        (credential(me), "host", "not host blocks"),
    ]:
        with pytest.raises(InviteError, match=words):
            check_credential(shown, swarm=KEY.public, peer_id=me, role=role)  # type: ignore[arg-type]


@given(st.sampled_from(["terms", "invite_key", "swarm_signature", "peer_signature"]), st.binary(max_size=70))
def test_no_part_of_a_credential_can_be_replaced(part: str, value: bytes) -> None:
    me = Identity.generate().peer_id
    good = KEY.invite([]).credential(me)
    new: Any = Terms(role="host") if part == "terms" else value
    changed = msgspec.structs.replace(good, **{part: new})
    with pytest.raises(InviteError):
        check_credential(changed.encode(), swarm=KEY.public, peer_id=me)


def test_an_invite_made_with_anothers_key_is_worth_nothing() -> None:
    """Somebody with an invite cannot make invites: the invite key signs PeerIDs, not terms."""
    me = Identity.generate().peer_id
    mine = SwarmKey().invite([], role="host").credential(me)
    theirs = KEY.invite([]).credential(me)
    mixed = Credential(mine.terms, mine.invite_key, theirs.swarm_signature, mine.peer_signature)
    with pytest.raises(InviteError):
        check_credential(mixed.encode(), swarm=KEY.public, peer_id=me)


@given(st.binary(max_size=200))
def test_random_credentials_are_refused_and_nothing_worse(shown: bytes) -> None:
    with pytest.raises(InviteError):
        check_credential(shown, swarm=KEY.public, peer_id=Identity(b"1" * 32).peer_id)


def test_swarm_names_are_short_and_differ() -> None:
    assert swarm_name(KEY.public) == swarm_name(KEY.public)
    assert len({swarm_name(SwarmKey().public) for _ in range(50)}) == 50


# -- identities --------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_key(seed: bytes) -> None:
    identity = Identity(seed)
    assert identity.peer_id.startswith("12D3KooW")
    assert public_key_of(identity.peer_id) == identity.public_key
    assert peer_id_of(identity.public_key) == identity.peer_id
    assert signature_is_valid(identity.public_key, b"data", identity.sign(b"data"))
    assert not signature_is_valid(identity.public_key, b"date", identity.sign(b"data"))
    assert short_peer(identity.peer_id) == "…" + identity.peer_id[-6:]


@given(st.text(max_size=60) | st.just("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"))
def test_what_is_no_peer_id(text: str) -> None:
    assert not is_peer_id(text)
    with pytest.raises(UserInputError):
        public_key_of(text)


def test_a_very_long_peer_id_costs_nothing() -> None:
    began = time.monotonic()
    assert not is_peer_id("1" * 3_000_000 + "z" * 3_000_000)
    assert time.monotonic() - began < 1


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_signatures_of_strangers_never_raise(key: bytes, signature: bytes) -> None:
    assert not signature_is_valid(key, b"data", signature)


def test_identity_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity"
    made = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserInputError, match="not an Ed25519 identity"):
        Identity.load(path)
    with pytest.raises(UserInputError, match="32 bytes"):
        Identity(b"short")
    assert made.seed.hex() not in repr(made)
