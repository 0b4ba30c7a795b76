"""`model.path`: the same embeddings, norm and head around other blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nbrunner.client.path import Entry, check_joints, entries_of, parts_of
from nbrunner.client.path_runner import PathRunner
from nbrunner.client.runner import BlockRunner


def path_of(model: Any, path: Sequence[Any]) -> Any:
    """See `nbrunner.client.model.DistributedModel.path`."""
    entries, inner = entries_of(path, model.runner, model.runner.num_blocks), model.runner
    if isinstance(inner, PathRunner):  # a path through a path is a path through the model
        entries = tuple(inner.entries[one] if isinstance(one, int) else one for one in entries)
        inner = inner.inner
    architecture = model.nbrunner_checkpoint.architecture
    check_joints(parts_of(entries), architecture.carry, architecture.slots)
    return _around(model, inner, entries)


def twin_of(model: Any) -> Any:
    """The model once more: the same weights (not copies) and the same runner, in modules and a config of its own.

    What is put into the twin's modules, an adapter for one, does not change the model. It lives no longer than the
    model does: keep both.
    """
    return _copy(model, share_config=False)


def _copy(model: Any, *, share_config: bool) -> Any:
    """Copying the modules and not the tensors keeps whatever an architecture does around its layers.

    The hooks of its base are bound to the copy.
    """
    shared = [*model.parameters(), *model.buffers(), model.runner, model.nbrunner_checkpoint]
    if share_config:
        shared.append(model.config)
    if hasattr(model, "nbrunner_tokenizer"):
        shared.append(model.nbrunner_tokenizer)
    if model._layers.inserted is not None:  # the model is a path itself
        shared += model._layers.inserted.modules()
    return copy.deepcopy(model, {id(one): one for one in shared})


def _around(model: Any, inner: BlockRunner, entries: tuple[Entry, ...]) -> Any:
    """A model of its own that shares every weight, and whose layers run the path."""
    new = _copy(model, share_config=True)
    inserted = [one for one in entries if isinstance(one, nn.Module)]
    layers = new._layers
    layers.runner = PathRunner(inner, entries, next(new.nbrunner_skeleton.base.parameters()))
    layers.num_blocks = len(entries)
    layers.inserted = nn.ModuleList(dict.fromkeys(inserted))
    new.nbrunner_skeleton = replace(new.nbrunner_skeleton, num_blocks=len(entries))
    return new
