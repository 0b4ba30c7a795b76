"""Who averages, when, and how much each counts: without a network."""

from __future__ import annotations

import contextlib
import io
import statistics
import time

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nbrunner.errors import BadPeerDataError, UserInputError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.records import ServerRecord, open_record, sign_record
from nbrunner.protocol.together import (
    Teaching,
    TeachingRecord,
    TensorShape,
    difference,
    open_teaching,
    sign_teaching,
)
from nbrunner.tuning.together_averaging import movement, root_mean_square
from nbrunner.tuning.together_channel import Done, Note, Outcome, encode, read, reader
from nbrunner.tuning.together_rounds import (
    LEAST_CLAIM,
    WEIGHT_RATIO,
    View,
    better_lineage,
    capped,
    coordinator,
    due,
    is_called,
    new_lineage,
    weights,
)

LINE = b"l" * 16
STATES = ("training", "waiting", "averaging", "paused", "finished", "left")


def view(peer: str, state: str = "training", **facts: object) -> View:
    return View(peer, state, LINE, **facts)  # type: ignore[arg-type]


def begins(*views: View, now: float = 0.0) -> list[str]:
    return [one.peer for one in due(views, now=now, patience=5.0, farewell=30.0).group]


def test_a_round_begins_when_all_who_train_are_there() -> None:
    a, b, c = view("a", "waiting"), view("b", "waiting", since=1.0), view("c")
    assert begins(a, b, c) == []
    assert due([a, b, c], now=1.0, patience=5.0, farewell=30.0).again == 4.0
    assert begins(a, b, view("c", "waiting")) == ["a", "b", "c"]


def test_nobody_waits_longer_than_patience_and_only_once() -> None:
    a, b, dead = view("a", "waiting"), view("b", "waiting", since=2.0), view("dead")
    found = due([a, b, dead], now=5.0, patience=5.0, farewell=30.0)
    assert [one.peer for one in found.group] == ["a", "b"]
    assert found.absent == ["dead"]
    assert begins(a, b, view("dead", overdue=True)) == ["a", "b"]


def test_who_has_paused_or_gone_is_not_waited_for() -> None:
    assert begins(view("a", "waiting"), view("b", "paused"), view("c", "left"), view("d", "finished")) == ["a"]


def test_who_has_finished_does_not_call_but_is_taken_along() -> None:
    done = view("a", "waiting", finished=True)
    assert not is_called([done, view("b")])
    assert begins(done, view("b")) == []
    assert begins(done, view("b", "waiting")) == ["a", "b"]
    found = due([done, view("b", "waiting", finished=True)], now=0.0, patience=5.0, farewell=30.0)
    assert found.last
    assert len(found.group) == 2
    # one that trains on for ever, or hangs, is not waited for for ever
    assert begins(done, view("b"), now=30.0) == ["a"]


@given(
    st.lists(
        st.builds(
            View,
            st.text("abcdef", min_size=1, max_size=3),
            st.sampled_from(STATES),
            st.just(LINE),
            since=st.floats(0, 100),
            finished=st.booleans(),
            overdue=st.booleans(),
        ),
        max_size=8,
        unique_by=lambda one: one.peer,
    ),
    st.floats(0, 200),
)
def test_a_round_is_of_all_who_wait_or_of_nobody_and_never_later_than_the_bound(
    views: list[View], now: float
) -> None:
    found = due(views, now=now, patience=5.0, farewell=30.0)
    waiting = [one for one in views if one.state == "waiting"]
    assert found.group in ([], waiting)
    if waiting and now >= min(one.since for one in waiting) + 30.0:
        assert found.group or any(not one.finished and now < one.since + 5.0 for one in waiting)
    if waiting and not found.group:
        assert found.again is not None
        assert 0 < found.again <= 130.0


def test_all_find_the_same_coordinator() -> None:
    assert coordinator(["c", "a", "b"]) == "a"
    assert coordinator(["c", "a", "b"], ["a"]) == "b"
    assert coordinator([]) == ""


def test_weights_are_samples_within_a_ratio() -> None:
    assert weights([10, 20, 30]) == [10.0, 20.0, 30.0]
    assert weights([0, 0]) == [1.0, 1.0]
    # who claims a million is believed ten times the median
    assert weights([8, 8, 10**6]) == [8.0, 8.0, 80.0]
    assert weights([8, 10**6]) == [8.0, 80.0]
    assert weights([0, 8])[0] == pytest.approx(0.008)


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=64))
@example([5e-324])
@example([5e-324, 8.0])
def test_weights_of_a_stranger_never_divide_by_nothing(claimed: list[float]) -> None:
    used = capped(claimed)
    assert all(one > 0 for one in used)
    assert max(used) <= 1001 * min(used)
    positive = [one for one in claimed if one >= LEAST_CLAIM]
    if positive:
        assert max(used) <= WEIGHT_RATIO * statistics.median_low(positive)
    else:
        assert set(used) == {1.0}


def test_which_beginning_wins() -> None:
    old, young = b"\0" * 16, b"\1" * 16
    assert old < new_lineage()

    def at(peer: str, lineage: bytes, steps: int = 0, round_: int = 0) -> View:
        return View(peer, "training", lineage, steps=steps, round=round_)

    assert better_lineage(at("a", young), [at("b", old)]) == old
    assert better_lineage(at("a", old), [at("b", young)]) is None
    # a clock that is wrong must not cost the others their work
    assert better_lineage(at("a", old), [at("b", young, steps=9)]) == young
    assert better_lineage(at("a", old, steps=3), [at("b", young, steps=9, round_=2)]) == young
    # nor may a single peer take two others along
    assert better_lineage(at("a", young), [at("b", young), at("c", old, steps=10**9, round_=10**9)]) is None


def test_how_far_a_step_goes() -> None:
    old = torch.zeros(30)
    new = torch.cat([torch.full((10,), 4.0), torch.full((20,), 1.0)])
    assert movement(new, old, [10, 0, 20], 2) == pytest.approx(2.0)
    assert movement(new, old, [10, 20], 0) == 0.0
    assert root_mean_square(torch.full((5,), 1e18)) == pytest.approx(1e18)


# -- what is signed, and what differs -------------------------------------------------------------------------


def teaching(method: str = "lora", **shapes: list[int]) -> Teaching:
    return Teaching("facts", method, [TensorShape(name, shape) for name, shape in sorted(shapes.items())])


def test_the_digest_is_of_everything_that_must_be_the_same() -> None:
    one = teaching(a=[2, 3])
    assert one.digest == teaching(a=[2, 3]).digest
    others = [teaching("prompt", a=[2, 3]), teaching(a=[3, 2]), teaching(b=[2, 3]), teaching(a=[2, 3], b=[1])]
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_the_difference_is_named() -> None:
    ours, theirs = teaching(a=[16, 64], b=[3]), teaching("prompt", a=[8, 64], c=[3])
    said = difference(ours, theirs)
    assert "method 'prompt', you 'lora'" in said
    assert "their a is [8, 64], yours [16, 64]" in said
    assert "they have c, which you do not" in said
    assert "you have b, which they do not" in said
    many = teaching(**{f"layer{index}": [index] for index in range(20)})
    assert len(difference(teaching(z=[1]), many)) < 200


def test_a_record_of_one_kind_does_not_pass_as_another() -> None:
    key, identity = SwarmKey(), Identity.generate()
    credential = key.invite([], role="host").credential(identity.peer_id).encode()
    expires = time.time() + 30
    common = {"identity": identity, "credential": credential, "swarm": key.public, "expires": expires}
    server = sign_record(ServerRecord("tiny", 8, 0, 8, "online"), **common)
    taught = sign_teaching(TeachingRecord("facts", b"d" * 32, "lora"), **common)
    where = {"peer_id": identity.peer_id, "swarm": key.public, "expires": expires}
    assert open_teaching(taught, **where).name == "facts"
    with pytest.raises(BadPeerDataError, match="not signed"):
        open_record(taught, **where)
    with pytest.raises(BadPeerDataError, match="not signed"):
        open_teaching(server, **where)
    with pytest.raises(BadPeerDataError, match="not signed"):
        open_teaching(taught, **{**where, "peer_id": Identity.generate().peer_id})
    other = {**where, "swarm": SwarmKey().public}
    foreign = sign_teaching(TeachingRecord("facts", b"d" * 32), **{**common, "swarm": other["swarm"]})
    with pytest.raises(BadPeerDataError, match="belongs to another"):
        open_teaching(foreign, **other)


def test_a_node_holds_so_many_records_of_who_teaches_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from hivemind.dht.validation import DHTRecord

    from nbrunner.swarm import validator as module

    monkeypatch.setattr(module, "MAX_TEACHING_RECORDS", 2)
    key = SwarmKey()
    invite = key.invite([])
    checker = module.TeachingValidator(key.public)

    def record(expires: float) -> DHTRecord:
        identity = Identity.generate()
        data = sign_teaching(
            TeachingRecord("facts", b"d" * 32),
            identity=identity,
            credential=invite.credential(identity.peer_id).encode(),
            swarm=key.public,
            expires=expires,
        )
        return DHTRecord(checker.key, msgspec.msgpack.encode(identity.peer_id), data, expires)

    soon, first = time.time() + 0.3, record(time.time() + 60)
    assert checker.validate(first)
    assert checker.validate(record(soon))
    assert not checker.validate(record(time.time() + 60))
    assert checker.validate(first)  # who is in stays in
    while time.time() <= soon:
        time.sleep(0.02)
    assert checker.validate(record(time.time() + 60))


# -- the channel ----------------------------------------------------------------------------------------------


def test_messages_with_a_body_go_through_the_channel_in_pieces_of_any_size() -> None:
    class Trickle(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self._data = data

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            count = min(7, len(buffer), len(self._data))
            buffer[:count] = self._data[:count]
            self._data = self._data[count:]
            return count

    note, done = Note(3, 12, 4), Done(7, Outcome("averaged", 2, LINE, ["p"]))
    sent = b"".join([*encode(note), *encode(done, b"x" * 1000)])
    take = reader(Trickle(sent))
    assert read(take, 1000) == (note, b"")
    assert read(take, 1000) == (done, b"x" * 1000)
    assert read(take, 1000) is None
    assert read(reader(Trickle(sent[:-1])), 1000) == (note, b"")
    take = reader(Trickle(sent))
    read(take, 1000)
    with pytest.raises(ValueError, match="1000 bytes"):
        read(take, 999)


@given(st.binary(max_size=200))
def test_garbage_in_the_channel_is_an_error_or_the_end(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read(reader(io.BytesIO(data)), 1 << 10)


# -- what a caller may pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "nothing to teach"),
        ({"w": torch.zeros(3, dtype=torch.int64)}, "floating-point"),
        ({"w": torch.zeros(3, device="meta")}, "has values"),
        ({"w": torch.zeros([1] * 7)}, "7 dimensions"),
        ({"": torch.zeros(3)}, "1 to 200 characters"),
        (torch.nn.ReLU(), "nothing to teach"),
    ],
)
def test_parameters_that_cannot_be_taught_are_named(parameters: object, words: str) -> None:
    from nbrunner.tuning.together import Together

    invite = str(SwarmKey().invite(["/ip4/127.0.0.1/tcp/1/p2p/" + Identity.generate().peer_id]))
    with pytest.raises(UserInputError, match=words):
        Together(invite, "facts", parameters)  # type: ignore[arg-type]


def test_options_that_make_no_sense_are_named() -> None:
    from nbrunner.tuning.together import Together

    invite = str(SwarmKey().invite(["/ip4/127.0.0.1/tcp/1/p2p/" + Identity.generate().peer_id]))
    for options in (
        {"patience": 0},
        {"exchange_seconds": -1},
        {"clip": 0},
        {"every_steps": 0},
        {"member": "x" * 61},
    ):
        with pytest.raises(UserInputError, match=next(iter(options))):
            Together(invite, "facts", {"w": torch.zeros(3)}, **options)  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match="teach under"):
        Together(invite, "", {"w": torch.zeros(3)})
