"""Models of which only a part exists: the architecture's own class, minus what is not held.

The class is built whole (on the meta device, so for nothing), and then layers, embedding and head are taken out.
The list of layers keeps the ABSOLUTE names of what is left (an ``nn.ModuleList`` may be sparse), so that every rule
that depends on a layer's number (dense first layers, sliding windows, scaling by depth) and every name in a
checkpoint stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from .architecture import LayerList, find_layers, replace_modules


@dataclass(frozen=True)
class PrunedLayers:
    """What `prune` left behind, kept on the model as ``model.nbrunner_layers``.

    Attributes
    ----------
    found : LayerList
        Where the layers are; ``found.layers`` is sparse now.
    originals : list of nn.Module
        All layers as they were built, those that are not held still on the meta device.
    start, end : int
        The blocks that are held.
    """

    found: LayerList
    originals: list[nn.Module]
    start: int
    end: int

    @property
    def num_blocks(self) -> int:
        return len(self.originals)


def prune(model: Any, start: int, end: int, outside: Collection[str] | None) -> None:
    """Take out all layers but ``[start, end)``, the embedding, the head, and all other weights not in `outside`.

    Parameters
    ----------
    model : PreTrainedModel
        Just built; changed in place.
    outside : collection of str or None
        Names of the modules outside the layers that run before them and so are needed. With None all but the
        embedding and the head stay.
    """
    found = find_layers(model)
    originals = list(found.layers)
    for index in range(len(originals)):
        if not start <= index < end:
            del found.layers._modules[str(index)]
    ends = {"the embedding": model.get_input_embeddings(), "the head": model.get_output_embeddings()}
    replace_modules(model, [(name, module) for name, module in ends.items() if module is not None])
    if outside is not None:
        named = dict(model.named_modules())
        needed = {id(module) for layer in found.layers._modules.values() for module in layer.modules()}
        needed |= {id(named[name]) for name in outside if name in named} | {id(found.base), id(found.layers)}
        replace_modules(model, _unneeded(model, needed, ""))
    model.nbrunner_layers = PrunedLayers(found, originals, start, end)
    keep_present_ties(model)


def _unneeded(parent: nn.Module, needed: set[int], path: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules below `parent` that hold weights and nothing that is needed.

    The largest, because a module whose parts were taken out (a vision tower) could no longer be initialised.
    """
    for name, child in parent.named_children():
        if any(id(module) in needed for module in child.modules()):
            if id(child) not in needed or next(child.children(), None) is not None:
                yield from _unneeded(child, needed, f"{path}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{path}{name}", child


def keep_present_ties(model: Any) -> None:
    """Forget the tied weights of which one side was taken out, or loading would look for it."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        present = model.state_dict().keys()
        model.all_tied_weights_keys = {
            target: source for target, source in tied.items() if target in present and source in present
        }


def changed_class(cls: type, change: Callable[[Any], None], mixins: tuple[type, ...] = ()) -> type:
    """A subclass whose instances are changed right after they are built.

    It keeps the name and the module of the original: transformers keys weight conversions and output recorders on
    them, and treats a class from another module as custom code, to which it applies no conversions.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        change(self)

    body = {"__init__": build, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (*mixins, cls), body)


def pruned_class(
    cls: type,
    start: int,
    end: int,
    outside: Collection[str] | None = None,
    change: Callable[[Any], None] | None = None,
) -> type:
    """A subclass of a transformers model class that only has the blocks ``[start, end)``, changed; see `prune`."""

    def part(model: Any) -> None:
        prune(model, start, end, outside)
        if change is not None:
            change(model)

    return changed_class(cls, part)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports of missing weights and its progress bars.

    A model of which a part was left out on purpose makes transformers report that part at every load; what is
    really missing is checked by `nbrunner.blocks.loading` and raised.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
