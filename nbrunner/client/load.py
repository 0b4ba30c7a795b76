"""A model over a swarm, from its checkpoint: the part of it that stays here, attached to who runs its blocks."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from nbrunner.blocks.checkpoint import Checkpoint, resolve_checkpoint
from nbrunner.blocks.skeleton import load_client_model
from nbrunner.client.candidates import SessionOptions
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.model import DistributedModel
from nbrunner.client.remote import RemoteLayers
from nbrunner.client.swarm_runner import SwarmRunner
from nbrunner.errors import UserInputError
from nbrunner.protocol.tensors import DTYPES
from nbrunner.swarm.loop import wait_sync

CLASSIFIER = "AutoModelForSequenceClassification"


def load_model(
    task: str,
    model: str | Path,
    joining: Future[SwarmConnection],
    options: SessionOptions,
    *,
    revision: str | None,
    token: str | bool | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    cache_dir: str | Path | None,
    config: Mapping[str, Any],
) -> Any:
    """What `nbrunner.client.auto` returns; its documentation says what these are.

    Parameters
    ----------
    task
        Name of the class of transformers that would load the whole model.
    joining
        The swarm, once it is joined: the architecture is looked at meanwhile.
    config
        Set in the checkpoint's config.
    """
    checkpoint = resolve_checkpoint(model, revision=revision, token=token, cache_dir=cache_dir)
    for name, value in config.items():
        setattr(checkpoint.config, name, value)
    num_blocks = checkpoint.num_blocks
    connection = wait_sync(joining)
    served = wire_dtype(connection, checkpoint)
    loaded = _load(checkpoint, task, dtype=dtype if dtype is not None else served, device=device)
    runner = SwarmRunner(connection, checkpoint.uid, num_blocks, served or loaded.dtype, options)
    loaded.attach(runner)
    weakref.finalize(loaded, runner.release).atexit = False  # then the engine closes all that is open, and waits
    return loaded


def classifier_of(model: Any, **config: Any) -> Any:
    """A model with a new head for labels on the same servers; it lives no longer than the model does.

    Parameters
    ----------
    model
        Any distributed model.
    **config
        As `AutoDistributedModelForSequenceClassification.from_pretrained` takes.
    """
    checkpoint = copy.copy(model.nbrunner_checkpoint)
    checkpoint.config = copy.deepcopy(checkpoint.config)
    for name, value in config.items():
        setattr(checkpoint.config, name, value)
    # a head in bf16 would round most of what an optimiser adds to it away
    made = _load(checkpoint, CLASSIFIER, dtype=torch.float32, device=model.device)
    made.attach(model.runner)
    return made


def _load(checkpoint: Checkpoint, task: str, *, dtype: Any, device: torch.device | str) -> Any:
    """The part of a model that stays here, frozen but for a new head; not attached to who runs its blocks."""
    loaded = load_client_model(
        checkpoint,
        task,
        lambda blocks, _: RemoteLayers(blocks),
        dtype=dtype,
        device=device,
        mixins=(DistributedModel,),
    )
    _freeze(loaded)
    loaded.nbrunner_checkpoint = checkpoint
    return loaded


def wire_dtype(connection: SwarmConnection, checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype in which most servers of a model compute, None if none is there yet.

    Raises
    ------
    UserInputError
        The model is served only in other revisions than ours: their blocks would not fit our embeddings and head.
    """
    records = [entry.record for entry in connection.directory.view.servers.values()]
    ours = [record for record in records if record.model == checkpoint.uid]
    if not ours:
        name = checkpoint.uid.rpartition("@")[0]
        others = sorted({record.model for record in records if record.model.rpartition("@")[0] == name})
        if name and others:
            raise UserInputError(
                f"this is {checkpoint.uid}, but the swarm serves {', '.join(others)}: another revision of the same "
                "model, whose blocks do not fit. Load that one (revision=…, or its directory), or have this one "
                "served."
            )
        return None
    name, _ = Counter(record.dtype for record in ours).most_common(1)[0]
    return DTYPES.get(name)


def _freeze(model: Any) -> None:
    """What comes from the checkpoint does not learn; a classification head, which lies outside the base, does."""
    head_is_new = type(model).__name__.endswith("ForSequenceClassification")
    base = {id(parameter) for parameter in model.nbrunner_skeleton.base.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(head_is_new and id(parameter) not in base)
