"""What nbrunner has to know about a model's structure, found by looking at the module tree, never by name.

Conventions of transformers this rests on (engine notes in ``docs/architecture.md``): the decoder layers are one
``nn.ModuleList``; the first positional argument of a layer is the hidden state; a layer returns a tensor or a tuple
that starts with it; attention modules know the cache slot they write as ``layer_idx``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)

from ..errors import UnsupportedModelError

_CLASSES = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModel": MODEL_MAPPING,
}


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model (itself, for a pure language model)."""
    return config.get_text_config(decoder=True)


def model_class(config: Any, task: str = "AutoModelForCausalLM") -> Any:
    """The class transformers builds for this config and task.

    Parameters
    ----------
    config : PretrainedConfig
        Of the whole model.
    task : str
        ``"AutoModelForCausalLM"``, ``"AutoModel"`` or ``"AutoModelForSequenceClassification"``.

    Raises
    ------
    UnsupportedModelError
        When transformers has no such class for this family.
    """
    mapping = _CLASSES.get(task)
    if mapping is None:
        raise ValueError(f"task {task!r} is not one of {', '.join(_CLASSES)}")
    try:
        found: Any = mapping[type(config)]
    except KeyError:
        raise _without_task(config, task) from None
    if isinstance(found, (tuple, list)):  # families with several classes name the one they were saved with
        named = set(getattr(config, "architectures", None) or [])
        return next((cls for cls in found if cls.__name__ in named), found[0])
    return found


def config_for(cls: Any, config: Any) -> Any:
    """A copy of the config that a model class is built from: its text part, for a class that is only a text model.

    What ``AutoModel...from_pretrained`` does with the config of a model of several modalities (qwen3_5, llama4).
    """
    part = (getattr(config, "sub_configs", None) or {}).get("text_config")
    return copy.deepcopy(config.get_text_config() if part is not None and cls.config_class is part else config)


def _without_task(config: Any, task: str) -> UnsupportedModelError:
    """The error for a head that transformers does not have for an architecture."""
    model_type = getattr(config, "model_type", "") or type(config).__name__
    reason = f"transformers has no {task} for {model_type} models"
    if task == "AutoModelForSequenceClassification":
        reason += (
            ": teach labels as texts, {'prompt': …, 'completion': label}, with AutoDistributedModelForCausalLM"
        )
    return UnsupportedModelError(f"{reason}.", model_type=model_type, reason=reason)


def unsupported(config: Any, reason: str) -> UnsupportedModelError:
    """The error for an architecture that cannot be split into blocks, naming it and why."""
    model_type = getattr(config, "model_type", "") or type(config).__name__
    return UnsupportedModelError(
        f"{model_type} models cannot be split into blocks: {reason}. "
        "docs/architectures.md lists the families that can.",
        model_type=model_type,
        reason=reason,
    )


@dataclass(frozen=True)
class LayerList:
    """Where a model keeps its decoder layers.

    Attributes
    ----------
    base : PreTrainedModel
        The innermost transformers model whose ``forward`` runs the layers.
    owner, attribute : nn.Module, str
        ``getattr(owner, attribute)`` is the list.
    path : str
        The list's dotted name from the outermost model, such as ``"model.layers"``.
    layers : nn.ModuleList
        The list itself.
    """

    base: Any
    owner: nn.Module
    attribute: str
    path: str
    layers: nn.ModuleList


def find_layers(model: Any) -> LayerList:
    """Find the decoder layers: the outermost ModuleList of ``num_hidden_layers`` members that are not to be split.

    The members of the list are recognised by their number or, where a config counts differently (longcat_flash
    counts two attentions per layer), by being a class that the model says must stay whole.

    Raises
    ------
    UnsupportedModelError
        When there is no such list.
    """
    expected = getattr(text_config(model.config), "num_hidden_layers", None)
    whole = set(getattr(model, "_no_split_modules", None) or [])
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            by_number = len(module) == expected
            by_class = bool({type(layer).__name__ for layer in module} & whole)
            if by_number or by_class:
                size = sum(parameter.numel() for parameter in module.parameters())
                found.append((not (by_number and by_class), not by_number, path.count("."), -size, path))
    if not found:
        raise unsupported(model.config, "it has no list of decoder layers")
    path = min(found)[-1]
    owner_path, _, attribute = path.rpartition(".")
    base = owner = model
    for part in owner_path.split(".") if owner_path else []:
        owner = getattr(owner, part)
        if isinstance(owner, PreTrainedModel):
            base = owner
    return LayerList(base, owner, attribute, path, getattr(owner, attribute))


def accepted_arguments(module: nn.Module) -> frozenset[str]:
    """Names of the arguments a module's ``forward`` takes."""
    return frozenset(inspect.signature(module.forward).parameters)


def cache_slots(layer: nn.Module, index: int) -> frozenset[int]:
    """Numbers of the cache slots that a layer writes: several, where it has more than one attention."""
    slots: set[Any] = {
        module.layer_idx
        for module in layer.modules()
        if module is not layer and isinstance(getattr(module, "layer_idx", None), int)
    }
    return frozenset(slots) or frozenset({index})


class Opaque:
    """The result of a layer that was not run.

    It survives ``out[0]`` and ``hidden, other = layer(...)`` and remembers whose result it is and which part of it,
    so that the arguments of the first real layer tell which of them the previous layer has to send along.
    """

    __slots__ = ("layer", "part", "parts")

    def __init__(self, layer: int, part: int = 0, parts: int = 2) -> None:
        self.layer, self.part, self.parts = layer, part, parts

    def __getitem__(self, index: int) -> Opaque:
        return Opaque(self.layer, index, self.parts)

    def __iter__(self) -> Iterator[Opaque]:
        return iter([Opaque(self.layer, part, self.parts) for part in range(self.parts)])

    def __len__(self) -> int:
        return self.parts

    def to(self, *_: Any, **__: Any) -> Opaque:
        """Outer models move the hidden state to the next layer's device: of no effect here."""
        return self


class Skip(nn.Module):
    """Stands for a layer that is not held here.

    What outer models read from a layer (``attention_type``, ``block_type``) is read from the unloaded layer it
    replaces, which stays unregistered so that it is neither loaded nor counted.
    """

    def __init__(self, like: nn.Module, index: int, parts: int = 2) -> None:
        super().__init__()
        object.__setattr__(self, "_like", (like,))
        self.index = index
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(self.__dict__["_like"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return Opaque(self.index, 0, self.parts)


class Absent(nn.Module):
    """Stands for a module that is not held here and must not run: the embedding, the head, the final norm."""

    def __init__(self, like: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        for attribute in ("embedding_dim", "num_embeddings", "padding_idx", "in_features", "out_features"):
            if hasattr(like, attribute):
                setattr(self, attribute, getattr(like, attribute))

    def forward(self, *_: Any, **__: Any) -> Any:
        raise AbsentModuleError(f"{self.name} is not held by a span of blocks")


class AbsentModuleError(RuntimeError):
    """An outer forward ran a module that a span does not hold."""


def replace_modules(root: nn.Module, old: Iterable[tuple[str, nn.Module]]) -> None:
    """Put an `Absent` in the place of each of the named modules, everywhere below `root`."""
    absent = {id(module): Absent(module, name) for name, module in old}
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in absent:
                setattr(parent, name, absent[id(child)])
