"""Deep prompts: learned vectors added to the states of the first positions that enter every block.

"Prefix-Tuning: Optimizing Continuous Prompts for Generation", Li and Liang 2021, in the form that adds to the
hidden states and needs no change inside attention. To have positions of their own, combine them with PEFT's prompt
tuning of as many virtual tokens: those come first in every row, before any padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nbrunner.client.remote import RemoteLayers
from nbrunner.errors import UserInputError
from nbrunner.protocol.finite import all_finite

FILE = "deep_prompts.safetensors"
_KEY = "weight"


class DeepPrompts(nn.Module):
    """A prompt for each block of a model.

    Attributes
    ----------
    weight : nn.Parameter
        ``[blocks, tokens, *hidden_shape]``, float32. It begins at zero, as a model without prompts.
    enabled : bool
        Whether they are used.
    """

    def __init__(self, blocks: int, tokens: int, hidden_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, tokens, *hidden_shape))
        self.enabled = True

    @property
    def tokens(self) -> int:
        """How many positions they are added to."""
        return self.weight.shape[1]

    def save(self, folder: str | Path) -> None:
        """Write ``deep_prompts.safetensors`` into a folder, such as that of a PEFT adapter."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({_KEY: self.weight.detach().cpu().contiguous()}, Path(folder) / FILE)


def add_deep_prompts(model: Any, tokens: int) -> DeepPrompts:
    """Give a distributed model a prompt for every block, which can be trained and generated with at once.

    Parameters
    ----------
    model
        From ``from_pretrained``, or PEFT's around it. PEFT freezes what it finds: wrap first, then add prompts.
    tokens
        Positions that the prompts are added to.

    Returns
    -------
    DeepPrompts
        Now among the model's parameters. Called again, new ones take the place of the old.

    Raises
    ------
    UserInputError
        Not a distributed model, or a number of tokens that cannot be.
    """
    layers, blocks, shape = _layers_of(model)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UserInputError(f"prompts of {tokens!r} tokens: give a positive number of tokens")
    layers.prompts = DeepPrompts(blocks, tokens, shape)
    return layers.prompts


def load_deep_prompts(model: Any, folder: str | Path, *, is_trainable: bool = False) -> DeepPrompts:
    """Give a distributed model the prompts that `DeepPrompts.save` wrote.

    Raises
    ------
    UserInputError
        No such file, or prompts of another model.
    """
    path = Path(folder) / FILE
    try:
        weight = load_file(path)[_KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserInputError(f"no deep prompts could be read from {path}: {error}") from None
    _, blocks, shape = _layers_of(model)
    if weight.ndim < 2 or (weight.shape[0], *weight.shape[2:]) != (blocks, *shape) or not weight.shape[1]:
        raise UserInputError(
            f"the prompts in {path} have the shape {list(weight.shape)}; this model takes [{blocks}, tokens, "
            f"{', '.join(map(str, shape))}]"
        )
    if not weight.is_floating_point() or not all_finite(weight):
        raise UserInputError(f"the prompts in {path} are not finite numbers of floating point")
    prompts = add_deep_prompts(model, weight.shape[1])
    with torch.no_grad():
        prompts.weight.copy_(weight)
    prompts.weight.requires_grad_(is_trainable)
    return prompts


def remove_deep_prompts(model: Any) -> None:
    """Take them away again."""
    _layers_of(model)[0].prompts = None


def _layers_of(model: Any) -> tuple[RemoteLayers, int, tuple[int, ...]]:
    skeleton = getattr(model, "nbrunner_skeleton", None)
    if skeleton is None or not isinstance(skeleton.remote, RemoteLayers):
        raise UserInputError(
            f"{type(model).__name__} is not a distributed model; load one with "
            "nbrunner.AutoDistributedModelForCausalLM.from_pretrained"
        )
    return skeleton.remote, len(skeleton.layers.shadows), skeleton.hidden_shape
