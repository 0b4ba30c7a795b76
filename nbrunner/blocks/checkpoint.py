"""Where a model comes from: the bundled one, a directory, or a repository of a hub.

Only safetensors are ever read: a file that needs pickle can run any code on the machine of whoever loads it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .. import tiny
from ..errors import CheckpointError, UnsupportedModelError
from .building import BUILDING
from .examine import Architecture, examine

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LARGEST_HEADER = 100 * 2**20  # what the safetensors library itself accepts
_SAMPLE_BYTES = 4096
_MOST_SAMPLES = 4096
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


class Checkpoint(ABC):
    """A model's config and weights, of which nothing is read before it is needed.

    Attributes
    ----------
    name : str
        For people: what was asked for.
    uid : str
        For machines: equal exactly when the weights are the same, on every machine. ``owner/repo@<commit>`` for a
        hub repository, ``<family>@<digest>`` for a directory, ``tiny@<digest>`` for the bundled model.
    source : str
        Where transformers' own loaders find what else belongs to it, such as the tokenizer: directory or hub id.
    commit : str or None
        Of a hub repository.
    config : PretrainedConfig
        As transformers reads it.
    weight_map : dict of str to str
        File of each tensor.
    """

    name: str
    uid: str
    source: str
    commit: str | None = None
    config: Any
    weight_map: dict[str, str]

    @abstractmethod
    def fetch(self, tensors: Iterable[str]) -> dict[Path, list[str]]:
        """Make these tensors readable on this machine: for each safetensors file, the ones it holds."""

    @abstractmethod
    def file(self, name: str) -> Path | None:
        """A small file of the model, such as ``generation_config.json``, or None where the model has none."""

    @abstractmethod
    def tensor_bytes(self, tensors: Iterable[str]) -> int:
        """Bytes of these tensors as stored."""

    @cached_property
    def architecture(self) -> Architecture:
        """What `nbrunner.blocks.examine` finds out about the model; raises UnsupportedModelError."""
        with BUILDING:
            return examine(self.config)

    @property
    def num_blocks(self) -> int:
        """How many blocks (decoder layers) the model has."""
        return self.architecture.num_blocks

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uid}>"


def resolve_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Find a model.

    Parameters
    ----------
    model : str or Path
        ``"tiny"`` for the bundled model, a directory that ``save_pretrained`` wrote, or the id of a hub repository.
    revision : str, optional
        Branch, tag or commit of a hub repository (default: ``main``). It is resolved once; every file comes from
        that commit.
    token : str or bool, optional
        For private and gated repositories; default: what ``hf auth login`` stored.
    cache_dir : str or Path, optional
        Instead of huggingface_hub's cache.

    Raises
    ------
    CheckpointError
        When there is no such model, it is not complete, or it has no safetensors.
    """
    text = str(model)
    if text == "tiny":
        return LocalCheckpoint(tiny.path(), name="tiny")
    path = Path(model).expanduser()
    if path.is_dir():
        return LocalCheckpoint(path)
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; give the directory that holds config.json and the weights.", model=text
        )
    if isinstance(model, Path) or not _HUB_ID.match(text):
        raise CheckpointError(
            f"there is no directory {path}: give 'tiny', a directory that save_pretrained() wrote, or the "
            "id of a hub repository (owner/name).",
            model=text,
        )
    from .hub import HubCheckpoint

    return HubCheckpoint(text, revision=revision, token=token, cache_dir=cache_dir)


class LocalCheckpoint(Checkpoint):
    """A directory with ``config.json`` and safetensors."""

    def __init__(self, path: Path, *, name: str = "") -> None:
        self.path = path.resolve()
        self.source = str(self.path)
        if self.path == tiny.path().resolve():
            name = "tiny"
        self.name = name or str(path)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise CheckpointError(
                f"{path} has no config.json: give the directory that save_pretrained() wrote.", model=self.name
            )
        self.config = read_config(config_file, self.name)
        self.weight_map = self._read_weight_map()
        self._headers = {file: read_header(self.path / file) for file in sorted(set(self.weight_map.values()))}
        for tensor, file in self.weight_map.items():
            if tensor not in self._headers[file]:
                raise CheckpointError(
                    f"{file} of {self.name} lacks {tensor}, which {INDEX_FILE} says it holds: fetch it again.",
                    model=self.name,
                )
        self.uid = f"{'tiny' if name == 'tiny' else config_name(config_file)}@{self._digest(config_file)}"

    def _read_weight_map(self) -> dict[str, str]:
        index = self.path / INDEX_FILE
        if index.is_file():
            return read_index(index, self.name)
        single = self.path / SINGLE_FILE
        if not single.is_file():
            raise no_safetensors(self.name, pickled=any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")))
        return dict.fromkeys(read_header(single), SINGLE_FILE)

    def _digest(self, config_file: Path) -> str:
        """A digest of the config, of every tensor's name, type and place, and of samples of every tensor's bytes.

        Reading a model whole to tell two fine-tunes apart would take minutes; a few kB from the middle of each
        tensor tell them apart as surely as it matters, and the same on every machine. What save_pretrained writes
        differently in each release of transformers is left out.
        """
        config = json.loads(config_file.read_text())
        for volatile in ("transformers_version", "_name_or_path"):
            config.pop(volatile, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        tensors = sum(len(header) for header in self._headers.values())
        stride = max(1, -(-tensors // _MOST_SAMPLES))
        for file, header in self._headers.items():
            path = self.path / file
            digest.update(f"{file} {path.stat().st_size}".encode())
            digest.update(json.dumps({name: entry.as_json() for name, entry in sorted(header.items())}).encode())
            with path.open("rb") as opened:
                for name in sorted(header)[::stride]:
                    entry = header[name]
                    count = min(entry.nbytes, _SAMPLE_BYTES)
                    opened.seek(entry.start + (entry.nbytes - count) // 2)
                    digest.update(opened.read(count))
        return digest.hexdigest()[:16]

    def fetch(self, tensors: Iterable[str]) -> dict[Path, list[str]]:
        return {self.path / file: names for file, names in by_file(self.weight_map, tensors).items()}

    def file(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def tensor_bytes(self, tensors: Iterable[str]) -> int:
        return sum(self._headers[self.weight_map[name]][name].nbytes for name in tensors)


class TensorEntry:
    """One tensor in a safetensors file: type, shape, and where its bytes are, counted from the file's start."""

    __slots__ = ("dtype", "end", "shape", "start")

    def __init__(self, dtype: str, shape: list[int], start: int, end: int) -> None:
        self.dtype, self.shape, self.start, self.end = dtype, shape, start, end

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def as_json(self) -> list[Any]:
        return [self.dtype, self.shape, self.start, self.end]


def header_length(first_bytes: bytes, where: str) -> int:
    """Length of a safetensors header, from the first eight bytes of the file."""
    if len(first_bytes) >= 8:
        length: int = struct.unpack("<Q", first_bytes[:8])[0]
        if length <= _LARGEST_HEADER:
            return length
    raise CheckpointError(f"{where} is not a safetensors file: fetch it again.")


def parse_header(header: bytes, file_size: int, where: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, from its header (the JSON alone), each checked to lie in the file."""
    begin = 8 + len(header)
    try:
        parsed = json.loads(header)
        entries = {
            name: TensorEntry(
                str(entry["dtype"]),
                list(map(int, entry["shape"])),
                *(begin + int(at) for at in entry["data_offsets"]),
            )
            for name, entry in parsed.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a safetensors file ({error}): fetch it again.") from error
    for name, entry in entries.items():
        if not begin <= entry.start <= entry.end <= file_size:
            raise CheckpointError(f"{where} is cut short: {name} ends after it. Fetch it again.")
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file on this machine.

    Raises
    ------
    CheckpointError
        When it is missing, cut short or something else.
    """
    try:
        with path.open("rb") as opened:
            length = header_length(opened.read(8), str(path))
            return parse_header(opened.read(length), path.stat().st_size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): fetch the model again.") from error


def read_config(config_file: Path, name: str) -> Any:
    """The transformers config in this file.

    Raises
    ------
    CheckpointError
        When it is not JSON, or not a model's config.
    UnsupportedModelError
        When this version of transformers has no such family.
    """
    try:
        raw = json.loads(config_file.read_text())
    except ValueError as error:
        raise CheckpointError(f"the config.json of {name} is not valid JSON ({error}).", model=name) from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise CheckpointError(f"the config.json of {name} names no model_type: is it a language model?", model=name)
    try:
        return AutoConfig.from_pretrained(config_file.parent, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code" in str(error) or "does not recognize" in str(error) or isinstance(error, KeyError):
            raise UnsupportedModelError(
                f"{name} is a {model_type} model, which this version of transformers does not have, and code from "
                "a checkpoint is never run. Upgrade transformers, or use a model of a family it has.",
                model_type=model_type,
                reason="not in transformers",
            ) from error
        raise CheckpointError(f"the config.json of {name} is not usable ({error}).", model=name) from error


def config_name(config_file: Path) -> str:
    """What to call a model in a directory, the same on every machine: the name in its config, else its family."""
    raw = json.loads(config_file.read_text())
    name = Path(str(raw.get("_name_or_path") or "")).name
    return re.sub(r"[^\w.-]", "-", name or str(raw["model_type"]))


def read_index(path: Path, name: str) -> dict[str, str]:
    """File of each tensor, from a sharded checkpoint's index."""
    try:
        found = json.loads(path.read_text())["weight_map"]
        weight_map = {str(tensor): str(file) for tensor, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX_FILE} of {name} is damaged: fetch it again.", model=name) from error
    for file in set(weight_map.values()):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise CheckpointError(
                f"{INDEX_FILE} of {name} points to {file!r}, which is not a safetensors file beside it.", model=name
            )
    return weight_map


def by_file(weight_map: Mapping[str, str], tensors: Iterable[str]) -> dict[str, list[str]]:
    """The tensors asked for, grouped by the file that holds them."""
    grouped: dict[str, list[str]] = {}
    for name in tensors:
        grouped.setdefault(weight_map[name], []).append(name)
    return grouped


def no_safetensors(name: str, *, pickled: bool) -> CheckpointError:
    """The error for a model that has no weights this project reads."""
    found = "its weights are pickled, which can run any code when loaded" if pickled else "it holds no weights"
    return CheckpointError(
        f"{name} has no safetensors: {found}. Save it with model.save_pretrained() and use that directory.",
        model=name,
    )
