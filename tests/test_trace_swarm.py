"""`model.trace` over real server processes: the numbers of the plain model, and who gave them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from parity.chain import local_model

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.edits import Edit

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]

TEXT, OTHER = "The capital of France is", "The capital of Spain is"
TOKENS = (" Paris", " Madrid")
GRIDS = ("norm", "cos_last", "entropy", "kl", "top_probs", "chosen_probs")


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    """The same model in this process."""
    model = local_model(resolve_checkpoint("tiny"), 4)
    yield model
    model.close()


@pytest.fixture(scope="module")
def swarm() -> Iterator[nbrunner.LocalSwarm]:
    with nbrunner.LocalSwarm("tiny", servers=["0:3", "3:8"], dtype="float32") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: nbrunner.LocalSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
    yield model
    model.close()


def same(one: Any, other: Any) -> None:
    for name in GRIDS:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-4, err_msg=name)


def test_the_same_numbers_and_who_gave_them(model: Any, here: Any) -> None:
    trace = model.trace(TEXT, tokens=TOKENS)
    same(trace, here.trace(TEXT, tokens=TOKENS))
    assert [(hop.start, hop.end) for hop in trace.hops] == [(0, 3), (3, 8)]
    assert {hop.peer for hop in trace.hops} == set(model.swarm.directory.view.servers)
    assert all(0 < hop.seconds < trace.seconds for hop in trace.hops)
    assert [trace.peer_of(layer) for layer in (0, 3, 4, 8)] == [
        None,
        trace.hops[0].peer,
        trace.hops[1].peer,
        trace.hops[1].peer,
    ]
    assert trace.bytes_sent > 0
    assert trace.bytes_received > 0
    assert [shape.y0 for shape in trace.figure("lens").layout.shapes] == [0.5, 3.5]


def test_edits_on_the_way(model: Any, here: Any) -> None:
    found = [
        one.trace(TEXT, tokens=TOKENS, edits=[Edit.patch(5, -2, source=one.trace(OTHER, keep=("norm",)))])
        for one in (model, here)
    ]
    same(*found)
    assert found[0].prob(" Madrid")[-1, -1] > 0.9


def test_a_grid(model: Any, here: Any) -> None:
    remote, local = (nbrunner.patch_grid(TEXT, OTHER, TOKENS, model=one) for one in (model, here))
    np.testing.assert_allclose(remote.values, local.values, atol=1e-4)
    assert remote.best()[1] in (4, 5)


def test_the_example_of_the_documents(model: Any) -> None:
    page = (ROOT / "docs" / "api.md").read_text().partition("## Looking inside")[2]
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {"model": model}
    exec(example[1], names)
    assert names["trace"].prob(" Paris")[[6, 7, 8], -1] == pytest.approx([0.05, 0.32, 0.997], abs=0.01)
    assert names["moved"].prob(" Madrid")[-1, -1] == pytest.approx(0.99, abs=0.01)
    assert names["trace"].token_text(names["steered"][0, -1]) == " Madrid"
    assert names["grid"].values.shape == (8, 6)
