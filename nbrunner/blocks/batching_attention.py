"""Attention of several sessions whose tokens lie side by side in one row: each over its own keys and values.

All other layers see one long sequence and need not know. Transformers lets attention and masks be replaced by name;
this module registers one of each. Outside a joined pass they do what the model's own implementation does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)
from .prefix_attention import KeysInPieces

NAME = "nbrunner"


@dataclass(frozen=True)
class Segment:
    """Where one session's tokens are in the row.

    Attributes
    ----------
    begin
        Index of its first token.
    rows, tokens
        Of the session's step; row by row they are ``rows × tokens`` places in the joined row.
    mask
        ``[rows, past + tokens]`` bool, or None where nothing is hidden.
    """

    begin: int
    rows: int
    tokens: int
    mask: Tensor | None

    @property
    def end(self) -> int:
        return self.begin + self.rows * self.tokens

    def cut(self, joined: Tensor, axis: int) -> Tensor:
        """``[1, …, all tokens, …]`` to this session's ``[rows, …, tokens, …]``."""
        part = joined.narrow(axis, self.begin, self.rows * self.tokens)
        if self.rows == 1:
            return part
        own: Tensor = torch.unflatten(part.squeeze(0), axis - 1, (self.rows, self.tokens))
        return own.movedim(axis - 1, 0)


class JoinedKeys(Protocol):
    """What attention asks of the cache of a joined pass."""

    segments: Sequence[Segment]
    implementation: str

    def sizes(self, index: int) -> tuple[int, int, int]: ...

    def keys_and_values(
        self, layer: int, key: Tensor, value: Tensor
    ) -> Sequence[tuple[Tensor, Tensor] | KeysInPieces]: ...


class SegmentMasks(list[Any]):
    """One mask for each session, travelling through the outer model in the place of one tensor."""

    ndim = 0
    shape = ()

    def to(self, *_: Any, **__: Any) -> SegmentMasks:
        return self


_state = threading.local()


@contextmanager
def joined_attention(configs: Sequence[Any], keys: JoinedKeys) -> Iterator[None]:
    """In here, and in this thread, models of these configs attend session by session."""
    before = [config._attn_implementation for config in configs]
    _state.keys = keys
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _state.keys = None


def attention_configs(model: nn.Module) -> list[Any]:
    """The configs that modules of a model look their attention implementation up in; each once."""
    found = {
        id(config): config
        for config in (getattr(module, "config", None) for module in model.modules())
        if hasattr(config, "_attn_implementation_internal")
    }
    return list(found.values())


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    keys: JoinedKeys = _state.keys
    attend = _plain_attention(module, keys.implementation)
    pairs = keys.keys_and_values(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    outputs = []
    for index, (segment, own) in enumerate(zip(keys.segments, pairs, strict=True)):
        mask = attention_mask[index] if isinstance(attention_mask, SegmentMasks) else None
        asked = segment.cut(query, 2)
        if isinstance(own, KeysInPieces) and mask is None and kwargs.get("position_bias") is None:
            output = own.attend(asked, kwargs.get("scaling"))
        else:
            own_key, own_value = own.whole() if isinstance(own, KeysInPieces) else own
            output = attend(module, asked, own_key, own_value, mask, **kwargs)[0]
        outputs.append(output.reshape(1, segment.rows * segment.tokens, *output.shape[2:]))
    return torch.cat(outputs, 1), None


def _plain_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    if implementation in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[implementation]
        return found
    eager: Callable[..., tuple[Tensor, Any]] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **kwargs: Any
) -> SegmentMasks:
    """A mask for each session; what was said of lengths and offsets is of the joined row, and means nothing."""
    keys: JoinedKeys = _state.keys
    make = ALL_MASK_ATTENTION_FUNCTIONS[keys.implementation]
    kwargs.pop("attention_mask", None)
    masks = SegmentMasks()
    for index, segment in enumerate(keys.segments):
        length, offset, query_offset = keys.sizes(index)
        masks.append(
            make(
                batch_size=1 if segment.mask is None else segment.rows,
                q_length=segment.tokens,
                kv_length=length,
                q_offset=query_offset,
                kv_offset=offset,
                attention_mask=segment.mask,
                **kwargs,
            )
        )
    return masks


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
