"""Tiny random models for tests of the client: the plain one, its checkpoint, and ours over spans in here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity.chain import LocalRunner, local_model
from parity.families import VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import resolve_checkpoint


@dataclass(frozen=True)
class Pair:
    """The same weights twice: ``plain`` is transformers' own model, ``ours`` runs its blocks elsewhere."""

    plain: Any
    ours: Any
    folder: Path

    @property
    def runner(self) -> LocalRunner:
        return self.ours.runner

    @property
    def open_sessions(self) -> int:
        return sum(bool(session.caches) for session in self.runner.sessions)


def save_plain(family: str, folder: Path, *, seed: int = 0) -> Any:
    """A plain random model, saved in ``folder``; its weights large enough for every layer to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    without_end(model)
    model.save_pretrained(folder)
    return model


def without_end(model: Any) -> None:
    """Random models must not end early by chance."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


def make_pair(family: str, folder: Path, *, split: int = 1) -> Pair:
    save_plain(family, folder)
    # loaded again: some families change their weights when they are saved
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    without_end(plain)
    ours = local_model(resolve_checkpoint(folder), split)
    without_end(ours)
    return Pair(plain, ours, folder)


def prompt(rows: int = 1, tokens: int = 12, *, seed: int = 1) -> torch.Tensor:
    """[rows, tokens] random ids."""
    return torch.randint(3, VOCABULARY - 6, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int = 2, tokens: int = 12, padding: int = 5) -> torch.Tensor:
    """A mask whose first row is padded on the left."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
