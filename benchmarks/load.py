"""Peak memory and time of loading a part of a model, each in a fresh process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benchmarks.models import checkpoint
from benchmarks.report import Report, Result

ROUNDS = 5
ALLOWED_FACTOR, ALLOWED_MEGABYTES = 1.3, 300

# Memory-mapped weights cost nothing until they are read, so every one of them is, before the peak is.
CODE = """
import json, sys, time
import torch, transformers
torch.set_num_threads(1)
model, part, dtype = sys.argv[1:]
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.skeleton import load_client_model
from nbrunner.blocks.span import BlockSpan

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3

def load():
    if part == "plain":
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    found = resolve_checkpoint(model)
    if part == "client":
        return load_client_model(found, "AutoModelForCausalLM", lambda *_: torch.nn.Identity(), dtype=dtype)
    return BlockSpan.load(found, *map(int, part.split(":")), dtype=dtype).model

transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # imported, so that they are not counted
before, began = memory("VmRSS"), time.perf_counter()
loaded = load()
seconds = time.perf_counter() - began
weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in loaded.parameters()}.values()) / 1e6
with torch.no_grad():
    for parameter in loaded.parameters():
        parameter.sum()
print("RESULT", json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before, "weights": weights}))
"""

CASES = [("0:8", "float32"), ("0:8", "bfloat16"), ("0:16", "float32"), ("client", "float32")]


def run() -> Report:
    """``mid`` (970 MB in float32): spans, the same converted while loading, and a client's half."""
    folder = str(checkpoint("mid"))
    cases = [*CASES, ("plain", "float32")]
    measured: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            measured[case].append(measure(folder, *case))
    plain = measured["plain", "float32"]
    results = []
    for part, dtype in CASES:
        rows = measured[part, dtype]
        weights = rows[0]["weights"]
        name = f"mid, {'the client' if part == 'client' else f'blocks {part}'}, {dtype}"
        results.append(
            Result(
                f"{name}: peak memory ({weights:.0f} MB of weights)",
                statistics.median(row["peak"] for row in rows),
                "MB",
                reach=round(ALLOWED_FACTOR * weights + ALLOWED_MEGABYTES),
                at_most=True,
            )
        )
        results.append(Result(f"{name}: time", statistics.median(row["seconds"] for row in rows), "s"))
    results.append(
        Result("mid, plain transformers: peak memory", statistics.median(row["peak"] for row in plain), "MB")
    )
    results.append(Result("mid, plain transformers: time", statistics.median(row["seconds"] for row in plain), "s"))
    return Report(
        "load",
        results,
        {
            "rounds": ROUNDS,
            "peak": "resident memory above that of the process before loading, after reading every weight",
            "reach": f"{ALLOWED_FACTOR} × weights + {ALLOWED_MEGABYTES} MB",
        },
    )


def measure(*arguments: str) -> dict[str, float]:
    """One load in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            facts: dict[str, float] = json.loads(line[7:])
            return facts
    raise RuntimeError(f"no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
