"""Adapters of blocks as they travel: packed into frames, and taken from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import BadPeerDataError
from ..protocol.adapters import AdapterManifest, AdapterPart, LoraPart
from ..protocol.frames import RawTensor
from ..protocol.tensors import pack, take
from .adapters import DTYPES, PROMPT, BlockAdapter, Lora


def pack_adapters(adapters: Mapping[int, BlockAdapter]) -> tuple[list[AdapterPart], list[RawTensor]]:
    """Adapters by block, as they are sent."""
    parts, tensors = [], []
    for block, one in sorted(adapters.items()):
        loras = [LoraPart(name, lora.scaling, lora.dropout) for name, lora in one.loras]
        parts.append(AdapterPart(block, loras, one.prompt is not None))
        tensors += [pack(wire_name(block, name), tensor) for name, tensor in one.tensors.items()]
    return parts, tensors


def wire_name(block: int, name: str) -> str:
    """Name in a frame of a tensor of a block's adapter, or of its gradient."""
    return f"{PROMPT}.{block}" if name == PROMPT else f"lora.{block}.{name}"


def take_adapters(parts: Sequence[AdapterPart], tensors: Mapping[str, RawTensor]) -> dict[int, BlockAdapter]:
    """Adapters from a frame, by block. `BadPeerDataError` unless form, dtypes and numbers are right.

    Whether they fit the blocks is for `nbrunner.blocks.adapters.check_adapter`.
    """
    found: dict[int, BlockAdapter] = {}
    used = set()

    def one(block: int, name: str) -> Tensor:
        used.add(wire_name(block, name))
        # no two dimensions but of a prompt of a model whose states have more than one
        return take(tensors, wire_name(block, name), dtype=DTYPES, shape=[None, None, -1])

    for part in parts:
        if part.block in found:
            raise BadPeerDataError(f"block {part.block} has two adapters in one message")
        modules: dict[str, list[Lora]] = {}
        for index, lora in enumerate(part.loras):
            a, b = one(part.block, f"{index}.a"), one(part.block, f"{index}.b")
            modules.setdefault(lora.module, []).append(Lora(a, b, lora.scaling, lora.dropout))
        prompt = one(part.block, PROMPT) if part.prompt else None
        found[part.block] = BlockAdapter({name: tuple(loras) for name, loras in modules.items()}, prompt)
        if [lora.module for lora in part.loras] != [name for name, _ in found[part.block].loras]:
            raise BadPeerDataError(f"the adapter of block {part.block} is not in the order of its modules' names")
        if not modules and prompt is None:
            raise BadPeerDataError(f"the adapter of block {part.block} changes nothing")
    if set(tensors) - used:
        raise BadPeerDataError(f"tensor {min(set(tensors) - used)!r} belongs to no adapter")
    return found


def manifest_of(
    name: str, model: str, num_blocks: int, blocks: Mapping[int, BlockAdapter], author: str = ""
) -> AdapterManifest:
    """The manifest of an adapter of these blocks."""
    return AdapterManifest(
        name,
        model,
        [blocks[block].digest if block in blocks else b"" for block in range(num_blocks)],
        max(one.rank for one in blocks.values()),
        sorted({module.rpartition(".")[2] for one in blocks.values() for module in one.modules})[:64],
        author,
    )
