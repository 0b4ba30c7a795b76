"""Sessions of one client that begin alike: computed once, held once, and each with the tokens it has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import wait_until
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.protocol.limits import Limits

pytestmark = pytest.mark.network

SYSTEM = 200
"""Tokens that the sessions have in common."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_plain("llama", folder)


@pytest.fixture(scope="module")
def swarm(folder: Any) -> Iterator[Any]:
    swarm = InProcessSwarm(folder[0])
    swarm.add(0, 2)
    swarm.add(2, 4)
    model = client(swarm)
    yield swarm, folder[1], model
    model.close()
    swarm.close()


def client(swarm: InProcessSwarm) -> Any:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(swarm.model), invite=str(swarm.invite))
    without_end(model)
    swarm.seen_by(model)
    return model


def text(number: int, tokens: int = 7, *, system: int = SYSTEM) -> torch.Tensor:
    """A system prompt, and something of its own."""
    return torch.cat([prompt(1, system, seed=99), prompt(1, tokens, seed=number)], 1)


def used(swarm: InProcessSwarm) -> list[int]:
    return [server.host.quotas.bytes_used for server in swarm.servers]


def frozen(swarm: InProcessSwarm) -> list[int]:
    return [server.host.frozen.nbytes for server in swarm.servers]


def passed(swarm: InProcessSwarm) -> list[int]:
    """Tokens that the servers have computed."""
    return [server.host.batcher.steps for server in swarm.servers]


@pytest.fixture(autouse=True)
def _all_memory_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "swarm" in request.fixturenames:
        servers, _, _ = request.getfixturevalue("swarm")
        wait_until(lambda: used(servers) == [0, 0], 10, what="no session holds anything")


def test_a_common_system_prompt_is_held_and_computed_once(swarm: Any) -> None:
    servers, plain, model = swarm
    sessions = [model.inference_session() for _ in range(8)]
    found = [sessions[0].generate(text(0), **GREEDY)]
    alone = used(servers)
    assert frozen(servers) == [0, 0]  # a session by itself shares nothing, and is as fast as it was
    found += [session.generate(text(number), **GREEDY) for number, session in enumerate(sessions) if number]
    for number, tokens in enumerate(found):
        assert torch.equal(tokens, plain.generate(text(number), **GREEDY))
    for one, all_, shared in zip(alone, used(servers), frozen(servers), strict=True):
        assert shared > 0.5 * one
        assert all_ < 3 * one  # a prompt and eight answers; unshared it would be eight times as much
    for session in sessions:
        session.close()


def test_sessions_that_start_together_compute_it_once_and_run_together(swarm: Any) -> None:
    servers, plain, model = swarm
    ways: list[Callable[[Any], torch.Tensor]] = [
        *(lambda m, number=number: m.generate(text(number, 3 + number), **GREEDY) for number in range(4)),
        lambda m: m.generate(text(5), num_beams=3, **GREEDY),
        lambda m: m.generate(text(6), num_return_sequences=2, **GREEDY | {"num_beams": 2}),
        lambda m: m.generate(text(7), prompt_lookup_num_tokens=3, **GREEDY),
        lambda m: m.generate(torch.cat([text(8), text(9)]), attention_mask=left_padded(2, SYSTEM + 7), **GREEDY),
    ]
    expected = [way(plain) for way in ways]
    found: list[Any] = [None] * len(ways)
    ready = threading.Barrier(len(ways))

    def run(index: int) -> None:
        ready.wait()
        found[index] = ways[index](model)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), number
