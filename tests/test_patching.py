"""`patch_grid` against the naive way: a full run of the plain model for each cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from client_models import Pair, make_pair, prompt
from parity.chain import local_model
from test_edits import at, surgery

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client import patching
from nbrunner.client.edits import Edit
from nbrunner.errors import UserInputError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = make_pair("llama", tmp_path_factory.mktemp("llama"))
    yield pair
    pair.ours.close()


@torch.no_grad()
def naive(plain: Any, clean: torch.Tensor, corrupted: torch.Tensor, layers: range) -> np.ndarray:
    states = plain(clean, output_hidden_states=True).hidden_states

    def metric(model: Any) -> float:
        logits = model(corrupted).logits[0, -1]
        return float(logits[5] - logits[6])

    best = float(plain(clean).logits[0, -1, 5] - plain(clean).logits[0, -1, 6])
    worst = metric(plain)
    grid = np.zeros((len(layers), clean.shape[1]), np.float32)
    for layer in layers:
        for position in range(clean.shape[1]):
            with surgery(plain, {layer: at([position], lambda _, s=states[layer][:, position]: s)}):
                grid[layer, position] = (metric(plain) - worst) / (best - worst)
    return grid


def test_equal_to_a_full_run_for_each_cell(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, corrupted = prompt(tokens=6), prompt(tokens=6, seed=2)
    wanted = naive(pair.plain, clean, corrupted, range(pair.runner.num_blocks))
    traces = [pair.ours.trace(one) for one in (clean, corrupted)]
    grid = nbrunner.patch_grid(*traces, metric=(5, 6))
    np.testing.assert_allclose(grid.values, wanted, atol=1e-4, rtol=1e-3)
    assert grid.blocks_run < grid.blocks_naive
    monkeypatch.setattr(patching, "BATCH_TOKENS", 13)  # two rows at a time
    kept = [pair.ours.trace(one, keep=("hidden",)) for one in (clean, corrupted)]
    some = nbrunner.patch_grid(
        *kept, metric=lambda logits: logits[:, 5] - logits[:, 6], layers=[1, 3], positions=[0, 2, 5]
    )
    np.testing.assert_allclose(some.values, wanted[[1, 3]][:, [0, 2, 5]], atol=1e-4, rtol=1e-3)


def test_only_the_blocks_after_the_patch_run(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, corrupted = prompt(tokens=6), prompt(tokens=6, seed=2)
    kept = [pair.ours.trace(one, keep=("hidden",)) for one in (clean, corrupted)]
    ran, forward = [], pair.runner.forward

    def note(hidden: torch.Tensor, start: int, end: int, **options: Any) -> Any:
        ran.append((hidden.shape[0], start, end))
        return forward(hidden, start, end, **options)

    monkeypatch.setattr(pair.runner, "forward", note)
    grid = nbrunner.patch_grid(*kept, metric=(5, 6))
    last = pair.runner.num_blocks
    assert ran == [(6, layer, last) for layer in range(last)]
    assert sum(rows * (end - start) for rows, start, end in ran) == grid.blocks_run - 2 * last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": (5,)}, "two tokens"),
        ({"metric": "ab"}, "two tokens"),
        ({"metric": lambda logits: logits}, "one number a row"),
        ({"metric": lambda logits: logits[:, 0] * 0}, "nothing to bring back"),
        ({"metric": (5, 6), "layers": [7]}, "states 0 to 4"),
        ({"metric": (5, 6), "positions": 9}, "positions 0 to 5"),
    ],
)
def test_what_cannot_be_patched(pair: Pair, arguments: dict[str, Any], words: str) -> None:
    traces = [pair.ours.trace(prompt(tokens=6, seed=seed), keep=("norm",)) for seed in (1, 2)]
    with pytest.raises(UserInputError, match=words):
        nbrunner.patch_grid(*traces, **arguments)


def test_texts_that_do_not_match(pair: Pair) -> None:
    traces = [pair.ours.trace(prompt(tokens=tokens), keep=("norm",)) for tokens in (6, 7)]
    with pytest.raises(UserInputError, match="equally many"):
        nbrunner.patch_grid(*traces, metric=(5, 6))
    with pytest.raises(UserInputError, match="model="):
        nbrunner.patch_grid("a", "b", (5, 6))
    edited = pair.ours.trace(prompt(tokens=6), keep=("norm",), edits=[Edit.zero(1)])
    with pytest.raises(UserInputError, match="edits"):
        nbrunner.patch_grid(edited, traces[0], (5, 6))


def test_the_bundled_model_keeps_the_country_on_its_token() -> None:
    model = local_model(resolve_checkpoint("tiny"), 5)
    grid = nbrunner.patch_grid(
        "The capital of France is", "The capital of Spain is", (" Paris", " Madrid"), model=model
    )
    assert grid.tokens[4] == " Spain"
    assert grid.values[2, 4] > 0.9
    assert abs(grid.values[2, 5]) < 0.1
    assert grid.values[7, 5] > 0.9
    assert abs(grid.values[7, 4]) < 0.1
    model.close()
