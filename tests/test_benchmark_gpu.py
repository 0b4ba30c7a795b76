"""The benchmark for GPUs, all of it, on a processor with small shapes; and how little it needs installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
import torch
from helpers import ROOT

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.gpu import SHAPES, Setup, copy_bandwidth, run
from benchmarks.gpu_models import blocks_that_fit, make_blocks
from nbrunner.blocks.batching_probe import choose_joining

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HERE = torch.device("cpu")
SETUP = Setup(
    device="cpu",
    dtype=torch.float32,
    shapes={"small": SMALL},
    rows=(1, 3),
    context=8,
    steps=3,
    rounds=1,
    copied=1 << 20,
    backend="eager",
)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_span_and_plain_transformers_run_the_same_blocks(kind: str) -> None:
    torch.manual_seed(0)
    blocks = make_blocks(SMALL, 2, kind, torch.float32, HERE)
    states = torch.randn(2, 5, SMALL["hidden_size"])
    with torch.inference_mode():
        ours = blocks.span.forward(states, cache=blocks.span.new_cache()).hidden
        theirs = blocks.plain(inputs_embeds=states, use_cache=False).last_hidden_state
    assert float((theirs - states).norm()) > 1e-3 * float(states.norm())
    torch.testing.assert_close(ours, theirs)
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    if kind == "none":
        assert weights * 4 < blocks.nbytes < weights * 4.1
    else:
        assert weights * 0.5 < blocks.nbytes < weights * 0.6


def test_the_layouts_it_measures_are_right_for_these_blocks() -> None:
    assert choose_joining(make_blocks(SMALL, 2, "none", torch.float32, HERE).span).layout == "packed"


def test_the_whole_of_it_on_a_processor() -> None:
    told = json.loads(run(SETUP).to_json())
    assert told["name"] == "gpu"
    assert {"device", "copied GB/s", "context", "torch", "left out"} <= told["conditions"].keys()
    assert "nf4" in told["conditions"]["left out"]
    cases = [row["case"].removeprefix("small shape, float32, 3 of 3 blocks, ") for row in told["results"]]
    bound = "a block's part of a step of one session, over reading its weights once"
    compiled = [
        "one session, what is beside attention compiled",
        "plain transformers with static caches, compiled, in CUDA graphs",
    ]
    joined = ["3 sessions joined, packed", "3 sessions joined, padded"]
    assert cases == [
        *(f"1 row: {one}" for one in ["one session", *compiled, bound]),
        *(f"3 rows: {one}" for one in ["one session", *joined, *compiled, bound]),
    ]
    for row in told["results"]:
        assert row["value"] > 0
        assert row["reference"] > 0
        faster = row["value"] / row["reference"] if row["unit"] == "tokens/s" else row["reference"] / row["value"]
        assert row["ratio"] == pytest.approx(faster)
        assert row["met"] is None
    assert copy_bandwidth(HERE, 1 << 20) > 0


def test_as_many_blocks_as_fit() -> None:
    shape, dtype = SHAPES["7B"], torch.bfloat16
    one = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert blocks_that_fit(shape, "none", dtype, 10 * one, cached_tokens=0) == 10
    assert blocks_that_fit(shape, "none", dtype, 10 * one, cached_tokens=4096) < 10
    assert blocks_that_fit(shape, "none", dtype, 1000 * one, cached_tokens=0) == 32
    assert blocks_that_fit(shape, "nf4", dtype, 5 * one, cached_tokens=0) == 14  # one is there in full meanwhile
    assert blocks_that_fit(shape, "none", dtype, one // 2, cached_tokens=0) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", "--json"])
    assert command.main() == command.EXIT_NOT_HERE
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "no CUDA GPU" in said.err
    monkeypatch.setattr(command, "names", lambda: ["gpu"])
    monkeypatch.setattr("sys.argv", ["benchmarks", "all", "--json"])
    assert command.main() == 0
    assert capsys.readouterr().out == ""


BLOCKED = """
import importlib.abc, json, sys

class Without(importlib.abc.MetaPathFinder):
    # as if what is refused were not installed

    def __init__(self, refused, finders):
        self.refused, self.finders = refused, finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            return None
        return next((spec for one in self.finders if (spec := one.find_spec(name, path, target))), None)

    def find_distributions(self, *context):
        for one in self.finders:
            if hasattr(one, "find_distributions"):
                yield from one.find_distributions(*context)

sys.meta_path[:] = [Without(set(json.loads(sys.argv[1])), list(sys.meta_path))]
import torch
from benchmarks.gpu import Setup, run
setup = Setup(**json.loads(sys.argv[2]), dtype=torch.float32)
print(run(setup).to_json())
"""


def test_it_needs_torch_and_transformers_only() -> None:
    """No hivemind, and none of the other packages that are here only because nbrunner needs them."""
    needed = _with_what_they_need("torch", "transformers")
    refused = {
        module
        for module, owners in packages_distributions().items()
        if not needed & {_plain_name(owner) for owner in owners}
    }
    assert {"hivemind", "msgspec", "cryptography", "platformdirs", "bitsandbytes", "plotly"} <= refused
    assert not {"torch", "transformers", "safetensors", "nbrunner"} & (refused - {"nbrunner"})
    refused -= {"nbrunner", "benchmarks"}
    facts = {
        "device": "cpu",
        "shapes": {"small": SMALL},
        "rows": [1, 2],
        "context": 4,
        "steps": 2,
        "rounds": 1,
        "copied": 1 << 20,
        "backend": "eager",
    }
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(sorted(refused)), json.dumps(facts)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["results"]) == 10


def test_a_package_that_is_not_installed_is_left_out_of_the_conditions() -> None:
    assert set(report.versions(["torch", "no-such-package"])) == {"torch"}


def _with_what_they_need(*names: str) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = _plain_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        todo += [re.match(r"[\w.-]+", one)[0] for one in wanted if "extra ==" not in one]
    return found


def _plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
