"""What is being learned in blocks that run elsewhere: read from the modules PEFT put into their shadows.

PEFT is looked at, not asked for: a client that does not use it never imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserInputError
from .adapters import DTYPES, PROMPT, BlockAdapter, Lora, SpanAdapter
from .shadows import ShadowedLayers, Slot, is_hollow

PLAIN = (
    "servers know plain LoRA of linear modules: for modules inside blocks use peft.LoraConfig without use_dora, "
    "lora_bias, bias, modules_to_save and initialisations that change the base weights"
)


@dataclass(frozen=True)
class Learned:
    """The adapters that are active in a client's model at one moment.

    Attributes
    ----------
    adapter : SpanAdapter
        What servers are told; its tensors share the memory of the parameters, on the CPU.
    tensors : dict of (int, str) to Tensor
        The parameters, or what was made of them, by block and name (`BlockAdapter.tensors`), for autograd.
    signature : hashable
        The same as long as no optimiser or loading has changed a parameter and the same adapters are active.
    """

    adapter: SpanAdapter
    tensors: dict[tuple[int, str], Tensor]
    signature: Hashable

    @property
    def trains(self) -> bool:
        """Whether gradients of any are wanted."""
        return any(tensor.requires_grad for tensor in self.tensors.values())

    def within(self, start: int, end: int) -> Learned | None:
        """That of blocks ``[start, end)``; None if nothing is learned there."""
        adapter = self.adapter.within(start, end)
        if adapter is None:
            return None
        tensors = {key: tensor for key, tensor in self.tensors.items() if start <= key[0] < end}
        return replace(self, adapter=adapter, tensors=tensors)

    def named(self) -> Learned:
        """Itself, its digests computed: in the thread that asks, because hashing takes its time."""
        for block in self.adapter.blocks.values():
            _ = block.digest
        return self

    def copied(self) -> SpanAdapter:
        """For a session: further training must not change what its caches were computed with."""
        if self.adapter.uid:
            return self.adapter  # on the servers already, and nobody trains it
        blocks = {
            block: one.with_tensors(lambda _, tensor: tensor.clone()) for block, one in self.adapter.blocks.items()
        }
        return SpanAdapter(blocks)


def learned_in(layers: ShadowedLayers, prompts: Tensor | None = None) -> Learned | None:
    """What is active in the shadows now; None if nothing is.

    Parameters
    ----------
    layers
        Of the client's model.
    prompts
        ``[blocks, p, *hidden_shape]``, a prompt of each block (`nbrunner.client.deep_prompts`).

    Raises
    ------
    UserInputError
        Something that only a local model could do, by name.
    """
    if torch.is_grad_enabled():
        _check_frozen(layers)
    modules: dict[int, dict[str, tuple[Lora, ...]]] = {}
    parameters: dict[int, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    training = False
    for slot in layers.slots:
        put = slot.put_there
        if put is None or getattr(put, "disable_adapters", False):
            continue
        found = _loras_of(put, slot)
        if found:
            modules.setdefault(slot.block, {})[slot.name] = tuple(lora for lora, _, _ in found)
            parameters.setdefault(slot.block, {})[slot.name] = [(a, b) for _, a, b in found]
            training = training or any(lora.dropout and drops(put) for lora, _, _ in found)
    if not modules and prompts is None:
        return None
    blocks: dict[int, BlockAdapter] = {}
    tensors: dict[tuple[int, str], Tensor] = {}
    signature: list[Hashable] = []
    each = [] if prompts is None else list(prompts.unbind(0))
    for block in sorted({*modules, *range(len(each))}):
        prompt = each[block] if each else None
        one = BlockAdapter(modules.get(block, {}), None if prompt is None else _plain(prompt))
        pairs = [pair for name in sorted(one.modules) for pair in parameters[block][name]]
        for index, (a, b) in enumerate(pairs):
            tensors[block, f"{index}.a"], tensors[block, f"{index}.b"] = a, b
            signature.append((block, one.loras[index][0], one.loras[index][1].scaling, *_state(a), *_state(b)))
        if prompt is not None:
            tensors[block, PROMPT] = prompt
        blocks[block] = one
    if prompts is not None:
        signature.append(_state(prompts))
    # from torch's own random state, so that a seeded run can be repeated
    seed = int(torch.randint(2**53, ())) if training else None
    return Learned(SpanAdapter(blocks, seed), tensors, tuple(signature))


def differentiable(adapter: SpanAdapter, wanted: bool) -> Learned:
    """An adapter as if it were learned here, for its gradients."""
    tensors = {}
    blocks = {}
    for block, one in adapter.blocks.items():

        def leaf(name: str, tensor: Tensor, block: int = block) -> Tensor:
            tensors[block, name] = tensor.detach().requires_grad_(wanted)
            return tensor

        blocks[block] = one.with_tensors(leaf)
    return Learned(replace(adapter, blocks=blocks), tensors, None)


def _state(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def drops(module: nn.Module) -> bool:
    """Whether a module of PEFT's is in training mode, so that it would drop inputs."""
    return module.training


def _loras_of(module: Any, slot: Slot) -> list[tuple[Lora, Tensor, Tensor]]:
    """The active low-rank changes of a module that PEFT has put into a slot, with their parameters."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    where = f"{slot.name or 'the whole'} of block {slot.block}"
    if lora is None or type(module) is not lora.Linear:
        kind = ".".join([*type(module).__module__.split(".")[-2:-1], type(module).__name__])
        raise UserInputError(f"{kind} in the place of {where} cannot run on servers: {PLAIN}")
    base = module.get_base_layer()
    if module.merged or not is_hollow(base.weight):
        raise UserInputError(
            f"the weights of {where} were changed (merged, or by an initialisation such as PiSSA), but the block's "
            f"weights are on servers and stay as they are: {PLAIN}. To merge, load the adapter onto the full model."
        )
    found = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        variant = module.lora_variant.get(name)
        if variant is not None or module.lora_bias.get(name):
            kind = type(variant).__name__ if variant is not None else "lora_bias"
            raise UserInputError(f"{kind} in adapter {name!r} of {where} cannot run on servers: {PLAIN}")
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise UserInputError(f"adapter {name!r} of {where} is {a.dtype}: use float32, bfloat16 or float16")
        dropout = module.lora_dropout[name]
        share = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
        found.append((Lora(_plain(a), _plain(b), float(module.scaling[name]), share), a, b))
    return found


def _check_frozen(layers: ShadowedLayers) -> None:
    wanted = [name for name, weight in layers.weights if weight.requires_grad]
    if wanted:
        raise UserInputError(
            f"{len(wanted)} weights of blocks are to be trained ({_some(wanted)}), but they are on servers and "
            f"stay as they are. Freeze them (requires_grad_(False)); with peft: bias='none', and {PLAIN}."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
