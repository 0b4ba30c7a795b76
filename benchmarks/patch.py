"""Activation patching of every state and token, against a full run of plain transformers for each cell."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.models import checkpoint, local_model, prompt, remote_model
from benchmarks.report import Report, Result, interleaved

TOKENS = 12
ROUNDS = 3


def run() -> Report:
    """``tiny8`` over two servers: 8 states × 12 tokens."""
    import torch

    import nbrunner

    local, clean = local_model("tiny8"), prompt("tiny8", TOKENS)
    corrupted = clean.clone()
    corrupted[0, TOKENS // 2] = 3 + (int(clean[0, TOKENS // 2]) - 2) % 900
    with nbrunner.LocalSwarm(model=str(checkpoint("tiny8")), servers=2) as swarm:
        remote = remote_model("tiny8", swarm.invite)
        traces = [remote.trace(ids, keep=("hidden",)) for ids in (clean, corrupted)]
        grid = nbrunner.patch_grid(traces[0], traces[1], (5, 6))
        with torch.inference_mode():
            wanted = naive(local, clean, corrupted)
            difference = float((torch.from_numpy(grid.values) - wanted).abs().max())
            ours, over_swarm, plain = interleaved(
                [
                    lambda: seconds(lambda: nbrunner.patch_grid(traces[0], traces[1], (5, 6))),
                    lambda: seconds(lambda: one_by_one(remote, traces, clean, corrupted)),
                    lambda: seconds(lambda: naive(local, clean, corrupted)),
                ],
                rounds=ROUNDS,
            )
        remote.close()
    name = f"tiny8, two servers, {grid.values.size} cells"
    return Report(
        "patch",
        [
            Result(f"{name}, against one run of the swarm each", ours, "s", over_swarm, over_swarm / ours),
            Result(f"{name}, against one run of plain transformers each", ours, "s", plain, plain / ours),
            Result("largest difference of a cell to plain transformers", difference, "", reach=1e-3, at_most=True),
        ],
        {
            "tokens": TOKENS,
            "rounds": ROUNDS,
            "states": "of both texts traced before, outside the time",
            "blocks times rows": f"{grid.blocks_run}, one by one {grid.blocks_naive}",
            "dtype": "float32",
            "threads": 1,
        },
    )


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def metric(logits: Any) -> float:
    return float(logits[0, -1, 5] - logits[0, -1, 6])


def naive(model: Any, clean: Any, corrupted: Any) -> Any:
    """[layers, tokens] of what each state brings back: a full run for each, with a hook."""
    import torch

    source = model(clean, output_hidden_states=True, use_cache=False)
    best, worst = metric(source.logits), metric(model(corrupted, use_cache=False).logits)
    grid = torch.zeros(len(model.model.layers), TOKENS)
    for layer in range(grid.shape[0]):
        for position in range(TOKENS):

            def put(_: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                hidden = args[0].clone()
                hidden[:, position] = source.hidden_states[layer][:, position]
                return (hidden, *args[1:])

            hook = model.model.layers[layer].register_forward_pre_hook(put)
            try:
                found = metric(model(corrupted, use_cache=False).logits)
            finally:
                hook.remove()
            grid[layer, position] = (found - worst) / (best - worst)
    return grid


def one_by_one(model: Any, traces: Any, clean: Any, corrupted: Any) -> None:
    """The same cells over the swarm, without what `patch_grid` does: a whole run with one edit for each."""
    from nbrunner import Edit

    for ids in (clean, corrupted):
        metric(model(ids, use_cache=False).logits)
    for layer in range(model.runner.num_blocks):
        for position in range(TOKENS):
            edit = Edit.patch(layer, position, source=traces[0])
            metric(model(corrupted, use_cache=False, edits=[edit]).logits)
