"""Loading from a hub: only the needed bytes, the same commit and token for all of them, and nothing twice.

The client is a process of its own with HF_ENDPOINT set, as on a user's machine: huggingface_hub reads most of its
settings when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, Repository
from helpers import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 16
OLD, NEW = "1" * 40, "2" * 40
TOKEN = "hf_for_reading"

CLIENT = """
import json, sys, torch
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import NBRunnerError
for line in sys.stdin:
    job = json.loads(line)
    try:
        checkpoint = resolve_checkpoint(job["model"], **job.get("options", {}))
        answer = {"uid": checkpoint.uid, "blocks": checkpoint.num_blocks}
        if "span" in job:
            span = BlockSpan.load(checkpoint, *job["span"])
            answer["sum"] = sum(p.double().abs().sum().item() for p in span.model.parameters())
        if "file" in job:
            found = checkpoint.file(job["file"])
            answer["file"] = found and found.read_text()
    except NBRunnerError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


def save(folder: Path, seed: int, **options) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    models = {
        "sharded": save(root / "sharded", 0, max_shard_size="3MB"),
        "single": save(root / "single", 1),
        "pickled": root / "pickled",
    }
    models["pickled"].mkdir()
    (models["pickled"] / "config.json").write_text((models["single"] / "config.json").read_text())
    (models["pickled"] / "pytorch_model.bin").write_bytes(b"anything")
    (root / "empty").mkdir()
    models["empty"] = root / "empty"
    return models


@pytest.fixture(scope="module")
def running_hub(models):
    with FakeHub(
        {
            "team/sharded": Repository({OLD: models["single"], NEW: models["sharded"]}, {"main": NEW, "v1": OLD}),
            "team/single": Repository({OLD: models["single"]}, {"main": OLD}),
            "team/private": Repository({OLD: models["sharded"]}, {"main": OLD}, token=TOKEN),
            "team/gated": Repository({OLD: models["sharded"]}, {"main": OLD}, token=TOKEN, gated=True),
            "team/pickled": Repository({OLD: models["pickled"]}, {"main": OLD}),
            "team/empty": Repository({OLD: models["empty"]}, {"main": OLD}),
        }
    ) as hub:
        yield hub


@pytest.fixture
def hub(running_hub):
    running_hub.requests.clear()
    running_hub.serves_ranges, running_hub.break_after = True, None
    return running_hub


class Client:
    """A process that loads what it is told to."""

    def __init__(self, home: Path, endpoint: str, **variables: str) -> None:
        environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_ETAG_TIMEOUT": "5", **variables}
        environment.pop("HF_TOKEN", None)
        self.cache: Path | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def __call__(self, model: str, *, options: dict | None = None, **job) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        options = {**(options or {}), "cache_dir": self.cache and str(self.cache)}
        self._process.stdin.write(json.dumps({"model": model, "options": options, **job}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def process(running_hub, tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("home"), running_hub.endpoint)
    yield client
    client.close()


@pytest.fixture
def client(process, tmp_path):
    """One process for all tests (starting it takes seconds), with a cache of its own for each."""
    process.cache = tmp_path / "cache"
    return process


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def expected_sum(folder: Path, start: int, end: int) -> float:
    state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    inside = tuple(f"model.layers.{index}." for index in range(start, end))
    return sum(value.double().abs().sum().item() for name, value in state.items() if name.startswith(inside))


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_a_span_fetches_its_own_bytes_once(kind, hub, client, models) -> None:
    answer = client(f"team/{kind}", span=[6, 8])
    assert answer["blocks"] == LAYERS
    assert answer["sum"] == pytest.approx(expected_sum(models[kind], 6, 8), rel=1e-12)
    sent = hub.sent()
    assert 2 / LAYERS * 0.9 < sent / weight_bytes(models[kind]) < 0.25

    hub.requests.clear()
    assert client(f"team/{kind}", span=[6, 8]) == answer
    assert hub.sent() == 0

    client(f"team/{kind}", span=[7, 10])  # of which block 7 is there
    assert hub.sent() < 0.2 * weight_bytes(models[kind])


def test_a_restart_fetches_nothing_again(hub, client, tmp_path) -> None:
    answer = client("team/sharded", span=[0, 3])
    hub.requests.clear()
    again = Client(tmp_path / "home", hub.endpoint)
    again.cache = client.cache
    assert again("team/sharded", span=[0, 3]) == answer
    again.close()
    assert sum(request.sent for request in hub.requests) == 0
    offline = Client(tmp_path / "home", hub.endpoint, HF_HUB_OFFLINE="1")
    offline.cache = client.cache
    hub.requests.clear()
    assert offline("team/sharded", span=[0, 3]) == answer
    assert "HF_HUB_OFFLINE" in offline("team/sharded", span=[10, 11])["error"]
    assert "HF_HUB_OFFLINE" in offline("team/single")["error"]
    offline.close()
    assert hub.requests == []


def test_most_of_a_shard_is_fetched_into_the_shared_cache(hub, client, tmp_path, models) -> None:
    client("team/single", span=[0, LAYERS])
    shared = list((tmp_path / "cache").glob("models--team--single/snapshots/*/model.safetensors"))
    assert len(shared) == 1
    assert hub.sent() <= weight_bytes(models["single"]) + 20_000
    client("team/single", span=[2, 3])
    assert hub.sent() <= weight_bytes(models["single"]) + 20_000


def test_revision_and_token_go_with_every_request(hub, client) -> None:
    answer = client("team/private", span=[0, 1], options={"token": TOKEN}, file="generation_config.json")
    assert answer["uid"] == f"team/private@{OLD}"
    assert json.loads(answer["file"])["_from_model_config"]
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    # only config.json is asked of the branch; everything after it is of the commit that the branch was at
    assert {request.file for request in hub.requests if request.revision != OLD} == {"config.json"}

    hub.requests.clear()
    answer = client("team/sharded", span=[0, 1], options={"revision": "v1"})
    assert answer["uid"] == f"team/sharded@{OLD}"
    assert {request.revision for request in hub.requests} == {"v1", OLD}
    assert {request.file for request in hub.requests} >= {"config.json", "model.safetensors"}


def test_a_broken_connection_is_continued(hub, client, models) -> None:
    client("team/sharded")
    hub.requests.clear()
    hub.break_after = 100_000
    answer = client("team/sharded", span=[6, 8])
    assert hub.break_after is None
    assert answer["sum"] == pytest.approx(expected_sum(models["sharded"], 6, 8), rel=1e-12)
    assert hub.sent() / weight_bytes(models["sharded"]) < 0.25


def test_a_mirror_without_ranges_sends_whole_shards(hub, client, models) -> None:
    hub.serves_ranges = False
    answer = client("team/sharded", span=[6, 7])
    assert answer["sum"] == pytest.approx(expected_sum(models["sharded"], 6, 7), rel=1e-12)


def test_every_refusal_is_a_sentence(hub, client) -> None:
    cases = {
        ("team/nothing", None, None): "neither a directory nor a hub repository",
        ("team/private", None, "wrong"): "neither a directory nor a hub repository",
        ("team/gated", None, None): "is gated",
        ("team/sharded", "v9", None): "no revision v9",
        ("team/pickled", None, None): "pickled",
        ("team/empty", None, None): "has no config.json",
    }
    for (model, revision, token), says in cases.items():
        error = client(model, options={"revision": revision, "token": token})["error"]
        assert error.startswith("CheckpointError")
        assert says in error
        assert "\n" not in error


@pytest.mark.slow  # huggingface_hub tries five times, for 23 seconds
def test_a_hub_that_is_not_there(tmp_path) -> None:
    """Without `cache_dir` the cache is huggingface_hub's own."""
    client = Client(tmp_path / "home", "http://127.0.0.1:1")
    error = client("team/sharded")["error"]
    client.close()
    assert "not in the local cache and the hub cannot be reached" in error
