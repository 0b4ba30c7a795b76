"""Many sessions on one server at once: their tokens are those of each alone, and they do run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import at_once
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.blocks.outer import PreparedStep

pytestmark = pytest.mark.network

LAYOUTS = {"llama": "packed", "bloom": "padded", "gemma3_text": "packed"}


@pytest.fixture(scope="module", params=LAYOUTS)
def swarm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    plain = save_plain(request.param, folder)
    without_end(plain)
    swarm = InProcessSwarm(folder)
    swarm.add(0, 2)
    swarm.add(2, 4)
    for server in swarm.servers:
        assert server.host.batcher.layout == LAYOUTS[request.param]
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(folder), invite=str(swarm.invite))
    without_end(model)
    swarm.seen_by(model)
    yield swarm, plain, model
    model.close()
    swarm.close()


def test_sessions_at_once_give_the_tokens_of_each_alone(swarm: Any) -> None:
    servers, plain, model = swarm
    ways: list[Callable[[Any], torch.Tensor]] = [
        *(lambda m, seed=seed: m.generate(prompt(1, seed=seed)[:, : 3 + seed], **GREEDY) for seed in range(4)),
        lambda m: m.generate(prompt(2, seed=2), attention_mask=left_padded(), **GREEDY),
        lambda m: m.generate(prompt(1, seed=5), num_beams=3, **GREEDY),
        lambda m: m.generate(prompt(1, seed=6).repeat(1, 2), prompt_lookup_num_tokens=3, **GREEDY),
        lambda m: m.generate(prompt(1, seed=7), prefill_chunk_size=4, **GREEDY),
    ]
    expected = [way(plain) for way in ways]
    found = at_once([partial(way, model) for way in ways])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for server in servers.servers:
        assert server.host.batcher.joined > 0


def test_a_session_by_itself_is_joined_with_nothing(swarm: Any) -> None:
    servers, plain, model = swarm
    before = [server.host.batcher.joined for server in servers.servers]
    ids = prompt(1)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
    assert [server.host.batcher.joined for server in servers.servers] == before


def test_the_steps_of_a_session_by_itself_are_prepared(swarm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, model = swarm
    found: list[tuple[int, bool]] = []
    fits = PreparedStep.fits

    def noting(prepared: PreparedStep, cache: Any, *step: int) -> bool:
        found.append((prepared.cache.start, fits(prepared, cache, *step)))
        return found[-1][1]

    monkeypatch.setattr(PreparedStep, "fits", noting)
    ids = prompt(1)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
    # the prompt gives the first token, and the step after it is like none before
    steps = GREEDY["max_new_tokens"] - 2
    assert found.count((0, True)) == found.count((2, True)) == steps
    found.clear()
    model.generate(prompt(2), num_beams=2, **GREEDY)
    assert not any(used for _, used in found)  # rows change places before every step


def test_the_layout_is_announced(swarm: Any) -> None:
    servers, _, model = swarm
    layout = servers.servers[0].host.batcher.layout
    for entry in model.swarm.directory.view.servers.values():
        assert f"batch-{layout}" in entry.record.features
