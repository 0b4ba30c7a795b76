"""``output_hidden_states``: bit for bit what the plain model gives in float32, over two unequal servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import left_padded, prompt, save_plain, without_end
from inprocess_swarm import InProcessSwarm

import nbrunner

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]

ONE, TWO, MASK = prompt(1, 12), prompt(2, 12, seed=4), left_padded()
GENERATE: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_hidden_states": True,
    "max_new_tokens": 6,
    "do_sample": False,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    plain = save_plain(request.param, folder)
    swarm = InProcessSwarm(folder)
    swarm.add(0, 1)
    swarm.add(1, 4)
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite)
    without_end(model)
    yield plain, model
    model.close()
    swarm.close()


def assert_equal(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"state {layer} is off by {(one - other).abs().max()}"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "inputs", [{"input_ids": ONE}, {"input_ids": TWO}, {"input_ids": TWO, "attention_mask": MASK}]
)
def test_forward(both: tuple[Any, Any], cached: bool, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, found = (one(**inputs, use_cache=cached, output_hidden_states=True) for one in both)
    assert_equal(found.hidden_states, expected.hidden_states)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    "options",
    [{"inputs": ONE}, {"inputs": TWO, "attention_mask": MASK}, {"inputs": TWO, "num_beams": 3}],
    ids=["greedy", "padded", "beams"],
)
def test_generate(both: tuple[Any, Any], options: dict[str, Any]) -> None:
    expected, found = (one.generate(**GENERATE, **options) for one in both)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_equal(one, other)
