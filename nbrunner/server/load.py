"""Getting a span ready: which blocks, on what device, in which dtype, and how much memory is left for caches."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nbrunner.blocks.checkpoint import Checkpoint
from nbrunner.blocks.quantize import bytes_per_weight, check_kind
from nbrunner.errors import UserInputError

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.7
"""Of the free memory, what blocks may take when the server chooses their number: the rest is for caches."""

CACHE_SHARE = 0.5
"""Of the memory that is free once the blocks are loaded, what caches may take."""

_WORTH_A_WORD = 10**9
"""Bytes of blocks from which on halving them is worth a word."""


@dataclass(frozen=True)
class Placement:
    """Where and as what blocks are loaded."""

    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"


def choose_placement(checkpoint: Checkpoint, device: str, dtype: str, quantize: str = "none") -> Placement:
    """``auto`` made concrete; `UserInputError` for a device, dtype or way to quantise that is not there."""
    chosen_device = _device(device)
    check_kind(quantize, chosen_device)
    saved = getattr(checkpoint.config, "dtype", None) or torch.float32
    chosen = _dtype(dtype) if dtype != "auto" else saved
    if chosen is torch.float16 and chosen_device.type == "cpu":
        if dtype != "auto":
            logger.warning("float16 is slow on a CPU; bfloat16 is not")
        else:
            chosen = torch.bfloat16
    return Placement(chosen_device, chosen, quantize)


def dtype_hint(asked: str, placement: Placement, nbytes: int) -> str | None:
    """A word to whoever serves large blocks on a CPU in float32 without having asked for it.

    Parameters
    ----------
    asked
        The dtype as it was given to `choose_placement`.
    nbytes
        Of the blocks as they were loaded.
    """
    by_itself = asked == "auto" and placement.dtype is torch.float32 and placement.device.type == "cpu"
    if not by_itself or placement.quantize != "none" or nbytes < _WORTH_A_WORD:
        return None
    return (
        f"these blocks take {nbytes / 1e9:.1f} GB, in float32 as the model was saved; --dtype bfloat16, on all "
        "servers of the model, takes half of that and rounds more"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = 0
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(match[1]) * 1024 if match else 0
    except OSError:
        logger.debug("no /proc/meminfo here")
    limit = _container_limit()
    candidates = [size for size in (available, limit) if size]
    return min(candidates) if candidates else 4 << 30


def blocks_that_fit(checkpoint: Checkpoint, placement: Placement, most: int | None = None) -> int:
    """How many blocks this machine should serve when it may choose; at least 1 if one fits at all.

    ``most``: bytes that blocks and caches may take together, if that is less than what is free.
    """
    layers = re.escape(checkpoint.architecture.layers_path)
    held = re.compile(rf"(^|\.){layers}\.\d+\.")
    names = [name for name in checkpoint.weight_map if held.search(name)]
    if not names:  # families whose files name layers otherwise than their modules
        names = list(checkpoint.weight_map)
    saved = getattr(checkpoint.config, "dtype", None) or torch.float32
    scale = bytes_per_weight(placement.quantize, placement.dtype) / saved.itemsize
    each = max(1.0, checkpoint.tensor_bytes(names) * scale / checkpoint.num_blocks)
    free = free_bytes(placement.device) if most is None else min(most, free_bytes(placement.device))
    count = int(free * MEMORY_SHARE / each)
    if count < 1:
        raise UserInputError(
            f"one block of {checkpoint.name} needs {each / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free "
            f"for it on {placement.device}; use a smaller model or dtype, or allow more memory"
        )
    return min(count, checkpoint.num_blocks)


def check_blocks(blocks: tuple[int, int], checkpoint: Checkpoint) -> None:
    """`UserInputError` unless these are blocks of the model."""
    start, end = blocks
    if not 0 <= start < end <= checkpoint.num_blocks:
        raise UserInputError(
            f"blocks {start}:{end} are not in {checkpoint.name}, which has {checkpoint.num_blocks}: give 0:1 to "
            f"0:{checkpoint.num_blocks}"
        )


def session_tokens(checkpoint: Checkpoint) -> int:
    """How long a session may grow when nothing else is said: what the model was made for."""
    config = checkpoint.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if isinstance(length, int) and length > 0 else 131072


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserInputError(f"{name!r} is not a device: use cpu, cuda, cuda:1 …") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserInputError(f"{name} is not here: torch finds {count} CUDA devices. Use --device cpu.")
    elif device.type != "cpu":
        raise UserInputError(f"device {name!r} is not supported: use cpu or cuda")
    return device


def _dtype(name: str) -> torch.dtype:
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if name not in names:
        raise UserInputError(f"{name!r} is not a dtype for a server: use auto, float32, bfloat16 or float16")
    return names[name]


def _container_limit() -> int:
    """What a cgroup leaves us; 0 if it sets no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 0
    return max(1, int(limit) - used) if limit.isdecimal() else 0
