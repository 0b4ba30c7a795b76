"""Adapters of blocks: low-rank changes of their linear modules, and prompts added to what enters them.

The unit is the adapter of one block, named by a digest of its content, so that it travels once per change and not
once per call. "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. 2021; the arithmetic, its order and
its dtypes are those of `peft.tuners.lora.Linear`, so that results are equal to the last bit. Prompts of every
block: "Prefix-Tuning", Li and Liang 2021, in the form in which they are added to the states of the first positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadPeerDataError, UserInputError
from .compat import Conv1D
from .quant_linear import QuantLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROMPT = "prompt"

Width = tuple[int, int]
"""Input and output features of a linear module."""


@dataclass(frozen=True)
class Lora:
    """One low-rank change of one module: ``scaling · B(A(x))`` is added to its output.

    Attributes
    ----------
    a, b : Tensor
        ``[rank, inputs]`` and ``[outputs, rank]``.
    scaling : float
    dropout : float
        Share of the inputs that are dropped while training; of no effect without a seed (`SpanAdapter`).
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True)
class BlockAdapter:
    """What is changed in one block.

    Attributes
    ----------
    modules : mapping of str to tuple of Lora
        By the module's name inside the block. Several of one module add up, in this order.
    prompt : Tensor, optional
        ``[p, *hidden_shape]``, added to the states of positions ``0`` to ``p - 1`` that enter the block, after
        edits and after what is captured.
    """

    modules: Mapping[str, tuple[Lora, ...]] = field(default_factory=dict)
    prompt: Tensor | None = None

    @classmethod
    def named(cls, digest: bytes) -> BlockAdapter:
        """An adapter of which only the name is known."""
        one = cls()
        vars(one)["digest"] = digest
        return one

    @property
    def loras(self) -> list[tuple[str, Lora]]:
        """All of them with their module's name, in the order of the wire."""
        return [(name, lora) for name in sorted(self.modules) for lora in self.modules[name]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """``K.a`` and ``K.b`` of the K-th of `loras`, and ``prompt``."""
        named = {}
        for index, (_, lora) in enumerate(self.loras):
            named[f"{index}.a"], named[f"{index}.b"] = lora.a, lora.b
        if self.prompt is not None:
            named[PROMPT] = self.prompt
        return named

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def rank(self) -> int:
        return max((lora.a.shape[0] for _, lora in self.loras), default=0)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of names, scalings, dtypes, shapes and content. The tensors must not change any more."""
        import msgspec

        from ..protocol.tensors import DTYPE_NAMES, pack

        form = [(name, lora.scaling, lora.dropout) for name, lora in self.loras]
        shapes = [(name, DTYPE_NAMES[one.dtype], list(one.shape)) for name, one in self.tensors.items()]
        found = hashlib.sha256(msgspec.msgpack.encode((form, shapes)))
        for name, tensor in self.tensors.items():
            found.update(pack(name, tensor).data)
        return found.digest()

    def placed(self, device: torch.device) -> BlockAdapter:
        """The same on a device, its digest computed before: not read back from there."""
        digest = self.digest
        moved = self.with_tensors(lambda _, tensor: tensor.to(device))
        vars(moved)["digest"] = digest
        return moved

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> BlockAdapter:
        """The same with every tensor changed, such as moved or made differentiable."""
        modules: dict[str, list[Lora]] = {}
        for index, (name, lora) in enumerate(self.loras):
            changed = replace(lora, a=change(f"{index}.a", lora.a), b=change(f"{index}.b", lora.b))
            modules.setdefault(name, []).append(changed)
        prompt = None if self.prompt is None else change(PROMPT, self.prompt)
        return BlockAdapter({name: tuple(loras) for name, loras in modules.items()}, prompt)


@dataclass(frozen=True)
class SpanAdapter:
    """Adapters for a pass through some blocks.

    Attributes
    ----------
    blocks : mapping of int to BlockAdapter
        By the block's number. A block that is not here runs as it is.
    seed : int, optional
        While training with dropout: what is dropped depends on it and on block, module and row alone, so that a
        pass that is run again, in other pieces or by other servers, drops the same.
    first_row : int
        Number of the first row in the batch it was cut from.
    uid : str
        Of an adapter that servers have by themselves: what is in ``blocks`` then has digests and no content.
    """

    blocks: Mapping[int, BlockAdapter]
    seed: int | None = None
    first_row: int = 0
    uid: str = ""

    def within(self, start: int, end: int) -> SpanAdapter | None:
        """That of blocks ``[start, end)``; None if nothing is changed there."""
        some = {block: one for block, one in self.blocks.items() if start <= block < end}
        return replace(self, blocks=some) if some else None


RowAdapters = SpanAdapter | Sequence[SpanAdapter | None] | None
"""One adapter for all rows, or one for each row, None for a row without."""


@dataclass(frozen=True)
class _Group:
    """Rows ``[begin, end)`` of a batch that share an adapter."""

    begin: int
    end: int
    adapter: SpanAdapter


def _groups(adapters: RowAdapters, batch: int) -> list[_Group]:
    if adapters is None:
        return []
    if isinstance(adapters, SpanAdapter):
        return [_Group(0, batch, adapters)]
    if len(adapters) != batch:
        raise UserInputError(
            f"{len(adapters)} adapters for {batch} rows; one for each row is wanted, or one for all"
        )
    groups: list[_Group] = []
    for row, one in enumerate(adapters):
        if groups and groups[-1].adapter is one and groups[-1].end == row:
            groups[-1] = replace(groups[-1], end=row + 1)
        elif one is not None:
            groups.append(_Group(row, row + 1, one))
    return groups


class Adapting:
    """Adapters at work in a forward pass.

    `within` puts them into the modules; `add_prompts` is for whoever runs the blocks.

    Parameters
    ----------
    adapters
        For the rows of the pass.
    batch
        How many rows those are.
    axis
        Where the rows are in what enters a module: -2 where tokens of several sessions lie side by side in one row,
        and each of them counts as a row here.
    """

    def __init__(self, adapters: RowAdapters, batch: int, axis: int = 0) -> None:
        self._groups = _groups(adapters, batch)
        self._batch = batch
        self._axis = axis

    @contextmanager
    def within(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """In here the modules of these blocks give what the adapters make of their output."""
        with ExitStack() as stack:
            for block, layer in layers.items():
                names = {name for group in self._groups for name in self._of(group, block).modules}
                modules = dict(layer.named_modules()) if names else {}
                for name in names:
                    hook = modules[name].register_forward_hook(self._hook(block, name))
                    stack.callback(hook.remove)
            yield

    def add_prompts(self, hidden: Tensor, block: int, position: int) -> Tensor:
        """What enters a block with the prompts in it; ``position`` is that of the first token of ``hidden``."""
        for group in self._groups:
            prompt = self._of(group, block).prompt
            if prompt is None or position >= prompt.shape[0]:
                continue
            added = prompt[position : position + hidden.shape[1]].to(hidden.device, hidden.dtype)
            rows = hidden[group.begin : group.end]
            rows = torch.cat([rows[:, : added.shape[0]] + added, rows[:, added.shape[0] :]], dim=1)
            hidden = self._put(hidden, group, rows)
        return hidden

    def _of(self, group: _Group, block: int) -> BlockAdapter:
        return group.adapter.blocks.get(block, _NOTHING)

    def _hook(self, block: int, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs: Tensor = args[0]
            for group in self._groups:
                loras = self._of(group, block).modules.get(name)
                if loras is None:
                    continue
                drops = group.adapter.seed is not None and any(lora.dropout for lora in loras)
                whole = (group.begin, group.end) == (0, self._batch)
                if (drops or not whole) and not self._has_rows(inputs):
                    raise UserInputError(
                        f"{name} of block {block} is given its tokens without their rows "
                        f"({list(inputs.shape)}), so neither dropout nor several adapters in one batch are possible"
                    )
                if whole:
                    output = _adapted(inputs, output, loras, group.adapter, (block, name), 0)
                else:
                    rows = (self._axis, group.begin, group.end - group.begin)
                    changed = _adapted(
                        inputs.narrow(*rows), output.narrow(*rows), loras, group.adapter, (block, name), 0
                    )
                    output = self._put(output, group, changed)
            return output

        return hook

    def _has_rows(self, inputs: Tensor) -> bool:
        least = 3 if self._axis == 0 else 2
        return inputs.ndim >= least and inputs.shape[self._axis] == self._batch

    def _put(self, whole: Tensor, group: _Group, rows: Tensor) -> Tensor:
        if (group.begin, group.end) == (0, self._batch):
            return rows
        before = whole.narrow(self._axis, 0, group.begin)
        after = whole.narrow(self._axis, group.end, self._batch - group.end)
        return torch.cat([before, rows, after], dim=self._axis)


_NOTHING = BlockAdapter()


def _adapted(
    inputs: Tensor,
    output: Tensor,
    loras: Sequence[Lora],
    adapter: SpanAdapter,
    where: tuple[int, str],
    first: int,
) -> Tensor:
    """As `peft.tuners.lora.Linear.forward`, to the order in which dtypes are changed."""
    result = output
    for index, lora in enumerate(loras, first):
        a, b = lora.a.to(inputs.device), lora.b.to(inputs.device)
        inputs = inputs.to(a.dtype)
        seen = inputs
        if adapter.seed is not None and lora.dropout:
            seen = inputs * _kept(inputs, lora.dropout, adapter, (*where, index))
        added = nn.functional.linear(nn.functional.linear(seen, a), b)
        # PEFT multiplies by 1 too, which takes 2 % of a training pass and changes nothing
        result = result + (added if lora.scaling == 1 else added * lora.scaling)
    return result.to(output.dtype)


def _kept(inputs: Tensor, dropout: float, adapter: SpanAdapter, where: tuple[int, str, int]) -> Tensor:
    """0 where an input is dropped, else what makes up for those: each row by a generator of its own, on the CPU."""
    import msgspec

    rows = []
    for row in range(adapter.first_row, adapter.first_row + inputs.shape[0]):
        name = msgspec.msgpack.encode((adapter.seed, *where, row))
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
        random = torch.rand(inputs.shape[1:], generator=torch.Generator().manual_seed(seed))
        rows.append(random >= dropout)
    return torch.stack(rows).to(inputs.device, inputs.dtype) / (1.0 - dropout)


# -- modules that can be adapted -----------------------------------------------------------------------------------


def linear_widths(layer: nn.Module) -> dict[str, Width]:
    """The linear modules inside a block by name, and their input and output features."""
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear)):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def check_adapter(
    adapter: BlockAdapter,
    block: int,
    *,
    widths: Mapping[str, Width],
    hidden_shape: Sequence[int],
    max_rank: int,
    max_prompt: int,
) -> None:
    """`BadPeerDataError` unless the adapter fits a block with these linear modules.

    Parameters
    ----------
    widths
        From `linear_widths`.
    hidden_shape
        What follows ``[batch, tokens]`` in a hidden state.
    max_rank, max_prompt
        Highest rank, longest prompt.
    """
    for name, lora in adapter.loras:
        where = f"the adapter of {name} in block {block}"
        if name not in widths:
            known = ", ".join(sorted(widths)) or "none"
            raise BadPeerDataError(f"{where}: this block has no such linear module; it has {known}")
        inputs, outputs = widths[name]
        rank = lora.a.shape[0] if lora.a.ndim == 2 else 0
        if not rank or tuple(lora.a.shape) != (rank, inputs) or tuple(lora.b.shape) != (outputs, rank):
            raise BadPeerDataError(
                f"{where} has the shapes {list(lora.a.shape)} and {list(lora.b.shape)}; [rank, {inputs}] and "
                f"[{outputs}, rank] fit"
            )
        if rank > max_rank:
            raise BadPeerDataError(f"{where} has rank {rank}; up to {max_rank} is allowed here")
        if not math.isfinite(lora.scaling) or not 0 <= lora.dropout < 1:
            raise BadPeerDataError(f"{where} has the scaling {lora.scaling} and the dropout {lora.dropout}")
    prompt = adapter.prompt
    if prompt is not None:
        shape = list(prompt.shape)
        if shape[1:] != list(hidden_shape) or not 0 < shape[0] <= max_prompt:
            raise BadPeerDataError(
                f"the prompt of block {block} has the shape {shape}; [1 to {max_prompt}, "
                f"{', '.join(map(str, hidden_shape))}] fits"
            )
