"""Figures say what the trace says, in a few kB, and show a token as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity.chain import local_model

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.figures import plane
from nbrunner.client.trace import TraceHop
from nbrunner.errors import UserInputError

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = local_model(resolve_checkpoint("tiny"), 5)
    yield model
    model.close()


@pytest.fixture(scope="module")
def trace(model: Any) -> Any:
    return model.trace(TEXT, tokens=[" Paris", " Madrid"])


def test_the_lens(trace: Any) -> None:
    hops = [TraceHop("peer-one", 0, 5, 0.1), TraceHop("peer-two", 5, 8, 0.1)]
    figure = replace(trace, hops=hops).figure("lens")
    cells = figure.data[0]
    assert np.allclose(np.array(cells.z), trace.top_probs[..., 0], atol=1e-5)
    assert cells.text[-1][-1] == "Paris"
    assert "‘ Paris’" in cells.hovertext[-1][-1]
    assert "…er-two" in cells.hovertext[6][0]
    assert "peer" not in cells.hovertext[0][0]  # the embeddings are made here
    assert [shape.y0 for shape in figure.layout.shapes] == [0.5, 5.5]  # state 5 is the last of the first server
    assert list(figure.layout.xaxis.ticktext)[-2:] == ["France", "is"]
    assert list(figure.layout.yaxis.ticktext) == [str(one) for one in range(9)]


def test_the_norms(model: Any, trace: Any) -> None:
    figure = trace.figure("norms")
    assert len(figure.data) == len(trace.ids)
    assert np.allclose(figure.data[4].y, trace.norm[:, 4], atol=1e-4)
    assert list(figure.data[4].x) == trace.layers
    long = model.trace(" ".join([TEXT] * 4), keep=("norm",))
    summary = long.figure("norms")
    assert [one.name for one in summary.data] == ["largest", "median", "smallest"]
    assert np.allclose(summary.data[1].y, np.median(long.norm, axis=1), atol=1e-4)


def test_the_trajectory(model: Any, trace: Any) -> None:
    figure = trace.figure("trajectory")
    assert [one.name for one in figure.data] == ["Paris", "Madrid"]
    assert np.allclose(figure.data[0].y, trace.prob(" Paris")[:, -1], atol=1e-5)
    first = trace.figure("trajectory", position=0)
    assert np.allclose(first.data[0].y, trace.prob(" Paris")[:, 0], atol=1e-5)
    assert len({(one.line.color, one.line.dash) for one in figure.data}) == 2
    unasked = model.trace(TEXT, top_k=2).figure("trajectory").data[0]  # gaps where it is not among the best two
    assert unasked.name == "Paris"
    assert unasked.y[0] is None
    assert np.isclose(unasked.y[-1], trace.prob(" Paris")[-1, -1], atol=1e-4)


def test_the_plane_is_that_of_a_full_decomposition() -> None:
    rows = torch.randn(7, 5, 48, generator=torch.Generator().manual_seed(2)) * torch.linspace(9, 0.1, 48)
    points, shares = plane(rows)
    unit = (rows / rows.norm(dim=-1, keepdim=True)).reshape(35, 48)
    _, singular, right = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    wanted = ((unit - unit.mean(0)) @ right[:2].T).abs().reshape(7, 5, 2)
    torch.testing.assert_close(torch.from_numpy(points).abs(), wanted, atol=2e-3, rtol=1e-2)
    assert np.allclose(shares, (singular**2 / (singular**2).sum())[:2], atol=1e-3)
    assert all(points[..., one].flat[np.abs(points[..., one]).argmax()] > 0 for one in (0, 1))
    assert np.isfinite(plane(torch.zeros(1, 1, 48))[0]).all()


def test_the_paths_of_the_tokens(model: Any, trace: Any) -> None:
    figure = trace.figure("pca")  # this trace has kept no states: they are fetched
    points, _ = plane(model.trace(TEXT, keep=("hidden",)).hidden)
    assert len(figure.data) == len(trace.ids)
    assert np.allclose(figure.data[3].x, points[:, 3, 0], atol=1e-4)


def test_a_grid(model: Any) -> None:
    grid = nbrunner.patch_grid(TEXT, "The capital of Spain is", (" Paris", " Madrid"), model=model)
    figure = grid.figure()
    assert np.allclose(np.array(figure.data[0].z), grid.values, atol=1e-5)
    assert -figure.data[0].zmin == figure.data[0].zmax >= np.abs(grid.values).max()
    assert list(figure.layout.xaxis.ticktext)[4] == "France → Spain"
    assert "‘ Spain’ gets the state of ‘ France’" in figure.data[0].text[2][4]


@pytest.mark.parametrize("kind", ["lens", "norms", "trajectory", "pca"])
def test_small_and_readable_on_both_pages(trace: Any, kind: Any) -> None:
    light, dark = trace.figure(kind), trace.figure(kind, dark=True)
    assert len(light.to_json()) < 25_000
    assert light.layout.paper_bgcolor != dark.layout.paper_bgcolor
    assert light.layout.font.color != dark.layout.font.color
    json.loads(light.to_json())


def test_a_token_is_shown_as_it_is_written(trace: Any) -> None:
    class Nasty:
        def decode(self, ids: list[int]) -> str:
            return "<a href='x'>$y$</a>"

    shown = replace(trace, tokenizer=Nasty(), tokens=["<b>$1$\n\u202e"] * len(trace.ids))
    for kind in ("lens", "norms", "trajectory", "pca"):
        found = json.loads(shown.figure(kind).to_json())
        text = json.dumps([found["data"], found["layout"]["title"], found["layout"]["xaxis"]], ensure_ascii=False)
        assert "<a" not in text
        assert "<b>" not in text
        assert "$" not in text
        assert "\u202e" not in text
        assert "&lt;b&gt;&#36;1&#36;↵" in text or kind == "trajectory"


@pytest.mark.parametrize("kind", ["lens", "norms", "trajectory", "pca", "pie"])
def test_what_was_not_kept_is_said(model: Any, trace: Any, kind: Any) -> None:
    keep = ("similarity",)
    bare = replace(model.trace(TEXT, keep=keep), model=None)
    with pytest.raises(UserInputError, match=r"keep=|no figure"):
        bare.figure(kind)
    some = model.trace(TEXT, positions=[1, 2])
    with pytest.raises(UserInputError, match=r"\[1, 2\]"):
        some.figure("trajectory", position=4)
