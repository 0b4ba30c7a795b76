"""Finding a model on disk: what it is called, and one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from parity.families import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import INDEX_FILE, parse_header, read_header, resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import CheckpointError, UnsupportedModelError


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


@pytest.fixture
def model(tmp_path) -> Path:
    return save(tmp_path / "model")


def save(folder: Path, name: str = "llama", **options) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(folder, **options)
    return folder


def change(folder: Path, edit) -> None:
    """Apply `edit` to the tensors of a model in one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_bundled_model(tiny_path) -> None:
    by_name, by_path = resolve_checkpoint("tiny"), resolve_checkpoint(tiny_path)
    assert by_name.uid == by_path.uid
    assert by_name.uid.startswith("tiny@")
    assert by_name.num_blocks == by_name.config.num_hidden_layers


def test_a_span_reads_the_files_of_its_blocks_only(sharded, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    checkpoint = resolve_checkpoint(copy)
    needed = {file for tensor, file in checkpoint.weight_map.items() if ".layers.2." in tensor}
    others = set(checkpoint.weight_map.values()) - needed
    assert others
    for file in others:
        (copy / file).unlink()
    span = BlockSpan.load(checkpoint, 2, 3)
    assert torch.equal(
        span.model.state_dict()["model.layers.2.mlp.up_proj.weight"],
        AutoModelForCausalLM.from_pretrained(sharded).state_dict()["model.layers.2.mlp.up_proj.weight"],
    )
    with pytest.raises(CheckpointError, match="cannot be read"):
        BlockSpan.load(checkpoint, 0, 1)


def test_the_uid_is_the_same_everywhere_and_different_for_another_fine_tune(model, tmp_path) -> None:
    original = resolve_checkpoint(model).uid
    elsewhere = tmp_path / "somewhere" / "else"
    shutil.copytree(model, elsewhere)
    (elsewhere / "README.md").write_text("the same model")
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}, indent=1))
    assert resolve_checkpoint(elsewhere).uid == original
    for name in ("model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        tuned = tmp_path / name
        shutil.copytree(model, tuned)
        change(tuned, lambda tensors, name=name: tensors[name].mul_(1.001))
        assert resolve_checkpoint(tuned).uid != original
    longer = tmp_path / "longer"
    shutil.copytree(model, longer)
    (longer / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert resolve_checkpoint(longer).uid != original


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_config_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64}')


def break_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_pickle(folder: Path) -> None:
    break_no_weights(folder)
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def break_half_a_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def break_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a model at all" * 20)


def break_index_elsewhere(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def break_index_pickle(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))


def break_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("[]")


def break_index_names_nothing(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_nothing_there, "there is no directory"),
        (break_no_config, "has no config.json"),
        (break_config, "not valid JSON"),
        (break_config_type, "names no model_type"),
        (break_no_weights, "it holds no weights"),
        (break_pickle, "pickled"),
        (break_half_a_file, "cut short"),
        (break_garbage, "not a safetensors file"),
        (break_index_elsewhere, "not a safetensors file beside it"),
        (break_index_pickle, "not a safetensors file beside it"),
        (break_index, "damaged"),
        (break_index_names_nothing, "lacks a"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_model_is_described_in_a_sentence(model, damage, says) -> None:
    damage(model)
    with pytest.raises(CheckpointError, match=says) as error:
        resolve_checkpoint(model)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_a_family_that_transformers_lacks(model) -> None:
    (model / "config.json").write_text(
        json.dumps({"model_type": "mind", "auto_map": {"AutoConfig": "configuration_mind.MindConfig"}})
    )
    (model / "configuration_mind.py").write_text("raise SystemExit('code from a checkpoint was run')")
    with pytest.raises(UnsupportedModelError, match="mind model, which this version of transformers does not have"):
        resolve_checkpoint(model)


def test_a_file_instead_of_a_directory(model) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(model / "config.json")


def test_names_that_are_neither_directory_nor_repository() -> None:
    for name in ("/nowhere/at/all", "./nowhere", "a/b/c", "no spaces please", "../" * 30 + "x"):
        with pytest.raises(CheckpointError, match="there is no directory"):
            resolve_checkpoint(name)


def test_a_missing_tensor_is_named(model) -> None:
    change(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    checkpoint = resolve_checkpoint(model)
    BlockSpan.load(checkpoint, 2, 4)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        BlockSpan.load(checkpoint, 0, 2)


def test_a_tensor_of_the_wrong_shape_is_named(model) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(model, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match=r"wrong shape for .*up_proj"):
        BlockSpan.load(resolve_checkpoint(model), 0, 2)


def test_merged_experts_are_read_only_for_the_span(tmp_path) -> None:
    checkpoint = resolve_checkpoint(save(tmp_path, "mixtral"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    span = BlockSpan.load(checkpoint, 1, 2)
    mine = span.model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in mine.items())
    assert any("experts" in name for name in mine)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        [],
    ],
)
def test_headers_that_lie_are_refused(header) -> None:
    raw = json.dumps(header).encode()
    with pytest.raises(CheckpointError):
        parse_header(raw, 8 + len(raw) + 100, "a file")


def test_a_header_of_terabytes_is_not_allocated(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)
