"""A server whose memory is full: sessions wait with a place, idle ones make room and come back as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from client_models import GREEDY, prompt, save_plain, without_end
from helpers import wait_until
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.errors import NBRunnerError
from nbrunner.protocol.limits import Limits
from nbrunner.server import waiting_room

pytestmark = pytest.mark.network

ROOM = 240_000
"""Bytes. A token costs 1280 here, and a session's buffers are for 16 tokens more than it has, and an eighth."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    plain = save_plain("llama", folder)
    return folder, plain


@pytest.fixture
def swarm(family: Any) -> Iterator[Any]:
    folder, plain = family
    swarm = InProcessSwarm(folder)
    swarm.add(0, 4, limits=Limits(cache_bytes=ROOM, session_tokens=4096, wait_seconds=20.0))
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(folder), invite=str(swarm.invite))
    without_end(model)
    swarm.seen_by(model)
    yield swarm, plain, model
    model.close()
    swarm.close()


def test_idle_sessions_make_room_and_go_on_as_if_nothing_had_been(
    swarm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_room, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(waiting_room, "TELL_SECONDS", 0.05)
    servers, plain, model = swarm
    turns = [prompt(1, tokens) for tokens in (90, 2, 3)]
    sessions = [model.inference_session() for _ in range(3)]
    for turn in turns:
        for number, session in enumerate(sessions):
            session.generate(turn + number, **GREEDY)
    assert any("idle" in why for session in sessions for _, why in session.lost)
    for number, session in enumerate(sessions):
        expected = torch.empty(1, 0, dtype=torch.long)
        for turn in turns:
            expected = plain.generate(torch.cat([expected, turn + number], 1), **GREEDY)
        assert torch.equal(session.tokens, expected)
        session.close()
    host = servers.servers[0].host
    wait_until(lambda: host.quotas.bytes_left == ROOM, 10, what="all memory is free again")


def test_a_session_waits_for_room_and_says_so(swarm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_room, "TELL_SECONDS", 0.05)
    _, plain, model = swarm
    first, second = model.inference_session(), model.inference_session()
    text = prompt(1, 140)
    first.generate(prompt(1, 140, seed=2), **GREEDY)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(second.generate(text, **GREEDY)))
    thread.start()
    wait_until(lambda: "waiting for room on" in second.queued, 15, what="the client says where it waits")
    assert "place 1" in second.queued
    assert not found
    first.close()
    thread.join(30)
    assert torch.equal(found[0], plain.generate(text, **GREEDY))
    assert second.queued == ""
    second.close()


def test_waiting_ends_with_an_error_that_says_why(family: Any) -> None:
    folder, _ = family
    swarm = InProcessSwarm(folder)
    swarm.add(0, 4, limits=Limits(cache_bytes=ROOM, session_tokens=4096, wait_seconds=0.5))
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(folder), invite=str(swarm.invite))
    try:
        without_end(model)
        swarm.seen_by(model)
        first, second = model.inference_session(), model.inference_session()
        first.generate(prompt(1, 140, seed=2), **GREEDY)
        with pytest.raises(NBRunnerError, match="no room for"):
            second.generate(prompt(1, 140), **GREEDY)
        first.close()
        assert second.generate(prompt(1, 140), **GREEDY).shape == (1, 150)
    finally:
        model.close()
        swarm.close()


def test_a_session_that_is_refused_for_room_goes_to_a_server_that_has_some(swarm: Any) -> None:
    servers, plain, model = swarm
    servers.add(0, 4)
    servers.seen_by(model)
    sessions = [model.inference_session() for _ in range(3)]
    for number, session in enumerate(sessions):
        text = prompt(1, 140, seed=number)
        assert torch.equal(session.generate(text, **GREEDY), plain.generate(text, **GREEDY))
        assert session.queued == ""
    for session in sessions:
        session.close()
