"""Rotary position tables that depend on how long a sequence is, and what they remember of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class RopeState:
    """What a "dynamic" rotary embedding remembers of the longest sequence it has seen.

    Left alone, a long session changes a later short one (measured: 2e-4 in the output); put back before each
    forward, the tables depend on the step's own positions only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._values = {
            name: value
            for name, value in vars(module).items()
            if name.endswith("max_seq_len_cached") or name == "attention_scaling"
        }

    def restore(self) -> None:
        self._module._buffers.update(self._buffers)
        for name in [name for name in vars(self._module) if name.endswith("max_seq_len_cached")]:
            if name not in self._values:
                delattr(self._module, name)
        for name, value in self._values.items():
            setattr(self._module, name, value)


def remembering_ropes(model: nn.Module) -> list[RopeState]:
    """The state, as it is now, of all modules that remember something."""
    return [
        RopeState(module)
        for module in model.modules()
        if any("dynamic" in str(name) for name in _kinds(module).values())
    ]


def length_dependent_ropes(model: nn.Module) -> list[tuple[int, bool]]:
    """(length up to which tables are fixed, whether beyond it they depend on the exact length) of each such module.

    ``dynamic`` tables stretch with the longest position of a pass, ``longrope`` has one set below and one above its
    limit: joined with a longer session, a shorter one would be computed with other tables than alone.
    """
    found = []
    module: Any
    for module in model.modules():
        for layer_type, name in _kinds(module).items():
            if name == "longrope":
                parameters = module.config.rope_parameters
                own = parameters if layer_type is None else parameters[layer_type]
                found.append((int(own["original_max_position_embeddings"]), False))
            elif "dynamic" in str(name):
                found.append((int(module.original_max_seq_len), True))
    return found


def _kinds(module: nn.Module) -> Mapping[Any, Any]:
    """By type of layer, where there are several."""
    kind: Any = getattr(module, "rope_type", None)
    return kind if isinstance(kind, Mapping) else {None: kind}
