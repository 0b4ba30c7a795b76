"""Checks of what users pass, before anything is sent. Each error says what is wrong and what would be right."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbrunner.errors import UserInputError
from nbrunner.protocol.finite import all_finite


def check_ids(ids: Any, vocabulary: int, *, name: str = "input_ids") -> torch.Tensor:
    """Token ids [batch, tokens] of an integer dtype, inside the vocabulary, at least one."""
    if not isinstance(ids, torch.Tensor):
        raise UserInputError(
            f"{name} must be a tensor of token ids, not {type(ids).__name__}: "
            "tokenizer(text, return_tensors='pt') makes one"
        )
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserInputError(
            f"{name} must be integer token ids of shape [batch, tokens], not {ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.numel() == 0:
        raise UserInputError("the prompt is empty: give at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UserInputError(
            f"{name} hold token {low if low < 0 else high}, the model's vocabulary is 0 to {vocabulary - 1}. "
            "Is the tokenizer that of another model?"
        )
    return ids


def check_mask(mask: Any, batch: int, tokens: int) -> torch.Tensor | None:
    """A 2D mask as bool [batch, tokens]; None when all true, so that nothing needs to be sent."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UserInputError(
            f"attention_mask must be a tensor of shape [batch, tokens], not {shape}: "
            "servers build what their layers want from it"
        )
    if tuple(mask.shape) != (batch, tokens):
        raise UserInputError(
            f"attention_mask has shape {list(mask.shape)}, it must have [{batch}, {tokens}]: "
            "a column for every token, those in the cache included"
        )
    real = (mask != 0).cpu()
    if bool(real.all()):
        return None
    if not bool(real.any(dim=1).all()):
        raise UserInputError("attention_mask has a row without any token")
    return real


def check_hidden(
    hidden: Any, dtype: torch.dtype, width: int | None, *, name: str = "hidden_states"
) -> torch.Tensor:
    """Hidden states [batch, tokens, ..., width] of the model's dtype, finite, not empty."""
    if not isinstance(hidden, torch.Tensor) or hidden.ndim < 3:
        shape = list(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise UserInputError(f"{name} must be a tensor of shape [batch, tokens, hidden], not {shape}")
    if hidden.dtype != dtype:
        raise UserInputError(f"{name} are {hidden.dtype}, the model runs in {dtype}: use {name}.to({dtype})")
    if hidden.numel() == 0 or (width is not None and hidden.shape[-1] != width):
        raise UserInputError(
            f"{name} have shape {list(hidden.shape)}; [batch, tokens, {width or 'hidden'}] is wanted, "
            "with at least one token"
        )
    if not all_finite(hidden):
        raise UserInputError(f"{name} have NaN or infinity in them; nothing was sent")
    return hidden


def position_limit(model: nn.Module, config: Any) -> tuple[int | None, bool]:
    """How many tokens a model can take, and whether one more is an error rather than only poor.

    Learned position tables end; rotary and linear positions go on past what the model was trained for.
    """
    limit = None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            limit = value
            break
    if limit is None:
        return None, False
    words = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [
        one
        for one in model.modules()
        if isinstance(one, nn.Embedding) and one is not words and limit <= one.num_embeddings <= limit + 8
    ]
    return limit, bool(tables)


def check_length(limit: int | None, hard: bool, prompt: int, total: int) -> None:
    """`UserInputError` for a prompt over the model's limit, or a total over a hard one."""
    if limit is not None and prompt > limit:
        raise UserInputError(f"the prompt has {prompt} tokens, this model takes at most {limit}: shorten it")
    if limit is not None and hard and total > limit:
        raise UserInputError(
            f"{prompt} tokens and {total - prompt} new ones are {total}, but this model has positions for only "
            f"{limit}: shorten the prompt, or lower max_new_tokens"
        )


def planned_length(config: Any, given: Any, kwargs: dict[str, Any], prompt: int) -> int:
    """How long ``generate`` may make a sequence of ``prompt`` tokens, by the rules of transformers.

    Parameters
    ----------
    config, given
        The model's generation config, and the one passed to ``generate``.
    """

    def value(name: str) -> int | None:
        for source in (kwargs.get(name), getattr(given, name, None), getattr(config, name, None)):
            if source is not None:
                return int(source)
        return None

    new = value("max_new_tokens")
    if new is not None:
        return prompt + new
    longest = value("max_length")
    # transformers' default length of 20 counts new tokens
    return prompt + 20 if longest is None else max(prompt, longest)
