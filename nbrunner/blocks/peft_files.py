"""Adapters in PEFT's directories, read for blocks by PEFT itself, around a model without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nbrunner.protocol.finite import all_finite

from ..errors import UserInputError
from .adapters import BlockAdapter
from .architecture import config_for, find_layers, model_class
from .building import BUILDING
from .checkpoint import Checkpoint
from .lora import learned_in
from .shadows import ShadowedLayers

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def find_adapter(source: str, *, token: str | bool | None = None, cache_dir: str | Path | None = None) -> Path:
    """The directory of an adapter; a hub repository's two files are downloaded, and nothing else of it.

    Raises
    ------
    UserInputError
        Neither a directory nor a repository that has both files.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            found = snapshot_download(source, token=token, cache_dir=cache_dir, allow_patterns=[CONFIG, WEIGHTS])
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserInputError(f"there is no adapter {source!r}, here or on the hub: {error}") from None
        folder = Path(found)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserInputError(
            f"{source} has no {missing[0]}: give a directory that PEFT's save_pretrained wrote. Weights in other "
            "forms than safetensors are not loaded, because reading them can run code."
        )
    return folder


def load_peft_adapter(checkpoint: Checkpoint, folder: Path) -> dict[int, BlockAdapter]:
    """The adapters of all blocks from a directory that PEFT wrote, exactly as PEFT would apply them.

    Parameters
    ----------
    checkpoint
        The model it is for; its architecture is built, its weights are not read.
    folder
        From `find_adapter`.

    Raises
    ------
    UserInputError
        Not a LoRA adapter of linear modules inside blocks, or not of this model.
    """
    names = _check_files(folder)
    import peft

    with BUILDING:
        cls = model_class(checkpoint.config, "AutoModelForCausalLM")
        with torch.device("meta"):
            model: Any = cls(config_for(cls, checkpoint.config))
        found = find_layers(model)
        layers = ShadowedLayers(list(found.layers), nn.Identity())
        setattr(found.owner, found.attribute, layers)
        inside = f"base_model.model.{found.path}."
        outside = sorted(name for name in names if not name.startswith(inside))
        if outside:
            raise UserInputError(
                f"{folder} also changes {outside[0]}, which is outside the blocks: servers serve adapters of "
                "blocks only. Load it in the client with peft.PeftModel.from_pretrained."
            )
        try:
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=False)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserInputError(f"PEFT cannot put {folder} around {checkpoint.name}: {str(error)[:500]}") from None
    held = set(peft.get_peft_model_state_dict(adapted))
    if held != names:
        odd = min(held ^ names)
        raise UserInputError(f"{folder} does not fit {checkpoint.name}: {odd} is in only one of the two")
    with torch.no_grad():
        learned = learned_in(layers)
    if learned is None:
        raise UserInputError(f"{folder} changes nothing in the blocks of {checkpoint.name}")
    for block, one in learned.adapter.blocks.items():
        if not all(all_finite(tensor) for tensor in one.tensors.values()):
            raise UserInputError(f"{folder} has NaN or infinity in the adapter of block {block}")
    return dict(learned.adapter.blocks)


def _check_files(folder: Path) -> set[str]:
    """Names of the tensors, of a LoRA adapter; `UserInputError` for anything else."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserInputError(f"{folder / CONFIG} cannot be read: {error}") from None
    if kind != "LORA":
        raise UserInputError(f"{folder} is a {kind} adapter; servers serve LoRA adapters")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserInputError(f"{folder / WEIGHTS} cannot be read as safetensors: {error}") from None
