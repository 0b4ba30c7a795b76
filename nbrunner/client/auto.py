"""The classes with which a model is loaded: ``from_pretrained`` as in transformers, and an invite."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nbrunner.client.candidates import SessionOptions
from nbrunner.client.connection import SwarmConnection
from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.imports import importing
from nbrunner.protocol.credentials import Invite
from nbrunner.swarm.loop import EngineLoop, wait_sync

if TYPE_CHECKING:
    import torch


class _Auto:
    """Base of the three; only ``from_pretrained`` makes models."""

    task: ClassVar[str]
    config_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        raise UserInputError(f"use {type(self).__name__}.from_pretrained(model, invite=…)")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        invite: str | Invite | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        allowed_peers: Collection[str] | None = None,
        blocked_peers: Collection[str] | None = None,
        retry_budget: float = 30.0,
        wire: str = "exact",
        **config: Any,
    ) -> Any:
        """Join a swarm and load the small part of a model that stays here: embeddings, final norm and head.

        Parameters
        ----------
        model
            ``"tiny"`` for the bundled model, a directory that ``save_pretrained`` wrote, or a hub repository.
        invite
            Of the swarm that serves the model.
        revision, token, cache_dir
            Of a hub repository, as in transformers.
        dtype
            Of the part that stays here; by default what the servers compute in.
        device
            Of that part.
        allowed_peers, blocked_peers
            PeerIDs to which chains are limited, or which they avoid.
        retry_budget
            Seconds from the first failure of a step until it is given up.
        wire
            ``"exact"``: hidden states travel as they are. ``"int8"``: those of sessions and of ``generate`` travel
            with 8 bits a number, a quarter of float32's bytes, and are off by half a percent after each server;
            gradients and traces stay exact.
        **config
            For classification: ``num_labels``, ``id2label``, ``label2id``, ``problem_type``, ``pad_token_id``.

        Returns
        -------
        PreTrainedModel
            An instance of the architecture's own class in evaluation mode, with ``blocks``,
            ``inference_session()``, ``swarm`` and ``close()`` besides. What comes from the checkpoint is frozen;
            a new classification head is trainable.

        Raises
        ------
        UserInputError
            No invite, or the swarm serves another revision of the model.
        InviteError, BootstrapError
            The invite cannot be used, or nobody in it answered.
        CheckpointError, UnsupportedModelError
            The model cannot be found, is incomplete, or cannot be split into blocks.
        """
        unknown = sorted(config.keys() - cls.config_options)
        if unknown:
            raise UserInputError(f"{cls.__name__}.from_pretrained does not know the argument {unknown[0]!r}")
        if not retry_budget > 0:
            raise UserInputError(f"retry_budget must be a positive number of seconds, not {retry_budget}")
        if wire not in ("exact", "int8"):
            raise UserInputError(f"wire is 'exact' or 'int8', not {wire!r}")
        if not invite:
            raise UserInputError(
                "no swarm to join: pass invite=…. nbrunner.LocalSwarm() or %swarm start begins a swarm on this "
                "machine and gives an invite; a friend's swarm has one too."
            )
        options = SessionOptions(
            allowed_peers=_peers(allowed_peers, "allowed_peers"),
            blocked_peers=_peers(blocked_peers, "blocked_peers"),
            retry_budget=retry_budget,
            in_8bit=wire == "int8",
        )
        parsed = invite if isinstance(invite, Invite) else Invite.parse(invite)
        engine = EngineLoop.get()
        # the p2p daemon comes up while torch and transformers are imported: 0.5 s less until the first token
        joining = engine.submit(SwarmConnection.join(parsed))
        try:
            with importing():
                from nbrunner.client.load import load_model
            return load_model(
                cls.task,
                model,
                joining,
                options,
                revision=revision,
                token=token,
                dtype=dtype,
                device=device,
                cache_dir=cache_dir,
                config=config,
            )
        except BaseException:
            with contextlib.suppress(NBRunnerError, CancelledError):
                wait_sync(engine.submit(wait_sync(joining).leave()))
            raise


class AutoDistributedModelForCausalLM(_Auto):
    """A language model whose blocks run on a swarm; ``generate`` is transformers' own.

    Examples
    --------
    ::

        model = AutoDistributedModelForCausalLM.from_pretrained("tiny", invite=swarm.invite)
        model.generate(**tokenizer(["The capital of France is"], return_tensors="pt"), max_new_tokens=8)
    """

    task = "AutoModelForCausalLM"


class AutoDistributedModel(_Auto):
    """The base model without a head: hidden states in ``last_hidden_state``."""

    task = "AutoModel"


class AutoDistributedModelForSequenceClassification(_Auto):
    """A classifier: the blocks run on a swarm, the head is local and trainable."""

    task = "AutoModelForSequenceClassification"
    config_options = frozenset({"num_labels", "id2label", "label2id", "problem_type", "pad_token_id"})


def _peers(peers: Collection[str] | None, name: str) -> frozenset[str] | None:
    if peers is None:
        return None
    if isinstance(peers, str):
        raise UserInputError(f"{name} is a list of PeerIDs, not one string: [{peers!r}]")
    return frozenset(str(peer) for peer in peers)
