"""What layers see as their cache while steps of several sessions run as one. The caches themselves stay apart."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batching_attention import Segment
from .cache import ForkedLayer, SpanCache, is_recurrent
from .compat import Cache, CacheLayerMixin, DummyLayer
from .prefix_attention import KeysInPieces


class _JoinedCache(Cache):  # type: ignore[misc]
    """The part both kinds share: which blocks, and how far the sessions are."""

    layers: Any

    def __init__(self, caches: Sequence[SpanCache]) -> None:
        self._caches = list(caches)
        self.start, self.end = caches[0].start, caches[0].end
        self.length = max(cache.length for cache in caches)
        self.layer_class_to_replicate, self.offloading = None, False

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._caches[0].has_previous_state(layer_idx, state_idx)

    def finish(self, tokens: Sequence[int]) -> None:
        """The pass is over: every session is so many tokens longer."""
        for cache, count in zip(self._caches, tokens, strict=True):
            cache.length += count


class PackedCache(_JoinedCache):
    """Tokens of all sessions lie side by side in one row; attention takes each session's own keys and values.

    Parameters
    ----------
    caches, segments
        Of the sessions, in order.
    implementation
        The model's own attention.
    in_pieces
        Whether attention of single tokens takes keys that lie in several places as they are.
    concatenated
        Whether `update` returns all keys and values one after the other, for models that change them after the
        cache (latent attention projects them up again); else they never leave their session.
    """

    def __init__(
        self,
        caches: Sequence[SpanCache],
        segments: Sequence[Segment],
        implementation: str,
        *,
        concatenated: bool,
        in_pieces: bool = False,
    ) -> None:
        super().__init__(caches)
        self.layers = caches[0].layers
        self.segments, self.implementation = segments, implementation
        self._concatenated, self._in_pieces = concatenated, in_pieces and not concatenated
        self._pairs: dict[int, list[Any]] = {}
        self._asked = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        self._asked = layer_idx
        return query_length, 0

    def sizes(self, index: int) -> tuple[int, int, int]:
        """Length and offset of a session's keys, and offset of its queries, in the layer last asked about."""
        cache, tokens = self._caches[index], self.segments[index].tokens
        length, offset = cache.get_mask_sizes(tokens, self._asked)
        return length, offset, cache.get_query_offset(self._asked)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pairs = self._pairs[layer_idx] = []
        for cache, segment in zip(self._caches, self.segments, strict=True):
            keys, values = segment.cut(key_states, 2), segment.cut(value_states, 2)
            layer = cache.layers[layer_idx]
            # of single tokens that see everything
            if self._in_pieces and isinstance(layer, ForkedLayer) and segment.tokens == 1 and segment.mask is None:
                pairs.append(layer.append(keys, values))
            else:
                pairs.append(cache.update(keys, values, layer_idx, *args, **kwargs))
        if not self._concatenated:
            return key_states, value_states
        return _in_one_row([key for key, _ in pairs]), _in_one_row([value for _, value in pairs])

    def keys_and_values(
        self, layer: int, key: Tensor, value: Tensor
    ) -> Sequence[tuple[Tensor, Tensor] | KeysInPieces]:
        """For each session ``[rows, heads, past + tokens, width]`` twice."""
        pairs = self._pairs.pop(layer)
        if not self._concatenated:
            return pairs
        own: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for segment, (held, _) in zip(self.segments, pairs, strict=True):
            places = Segment(begin, segment.rows, held.shape[2], None)
            own.append((places.cut(key, 2), places.cut(value, 2)))
            begin = places.end
        return own


def _in_one_row(parts: Sequence[Tensor]) -> Tensor:
    """``[rows, heads, length, width]`` of each session to ``[1, heads, all, width]``."""
    return torch.cat([part.transpose(0, 1).flatten(1, 2).unsqueeze(0) for part in parts], 2)


class PaddedCache(_JoinedCache):
    """Rows of all sessions in one batch, the shorter ones padded on the left; steps of equally many tokens.

    Keys and values are gathered layer by layer; recurrent states are joined before the pass and given back by
    `finish`.
    """

    def __init__(self, caches: Sequence[SpanCache], rows: Sequence[int]) -> None:
        super().__init__(caches)
        self._rows, self._cuts = list(rows), _ends(rows)[:-1]
        self.layers = [
            _joined_states(layers) if is_recurrent(layers[0]) else layers[0]
            for layers in zip(*(cache.layers for cache in caches), strict=True)
        ]
        held = [slot for slot, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)]
        full = [slot for slot in held if not getattr(self.layers[slot], "is_sliding", False)]
        self._first = next(iter(full or held), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        slot = (
            layer_idx if isinstance(layer, CacheLayerMixin) and not isinstance(layer, DummyLayer) else self._first
        )
        if slot is None:
            return self.length + query_length, 0
        length = max(cache.layers[slot].get_mask_sizes(query_length)[0] for cache in self._caches)
        return length, self.length + query_length - length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = key_states.tensor_split(self._cuts), value_states.tensor_split(self._cuts)
        parts = zip(self._caches, keys, values, strict=True)
        pairs = [cache.update(key, value, layer_idx, *args, **kwargs) for cache, key, value in parts]
        return _left_padded([key for key, _ in pairs]), _left_padded([value for _, value in pairs])

    def update_indexer(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("layers that choose the keys they read are run session by session")

    def finish(self, tokens: Sequence[int]) -> None:
        for slot, layer in enumerate(self.layers):
            if is_recurrent(layer):
                _give_back(layer, [cache.layers[slot] for cache in self._caches], self._rows)
        super().finish(tokens)


def _left_padded(parts: Sequence[Tensor]) -> Tensor:
    longest = max(part.shape[2] for part in parts)
    return torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])


_STATES = ("conv_states", "recurrent_states")
_MARKS = (
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)


def state_shapes(cache: SpanCache) -> tuple[Any, ...]:
    """Form of the recurrent states of a session; those of equal form can be joined."""
    found: list[Any] = []
    for layer in cache.layers:
        if is_recurrent(layer):
            for name in _STATES:
                states = getattr(layer, name).values()
                found += [None if state is None else tuple(state.shape[1:]) for state in states]
            found += layer.has_previous_state.values()
    return tuple(found)


def _joined_states(layers: Sequence[Any]) -> Any:
    joined = copy.copy(layers[0])
    for name in _STATES:
        states = {
            number: None if state is None else torch.cat([getattr(layer, name)[number] for layer in layers])
            for number, state in getattr(joined, name).items()
        }
        setattr(joined, name, states)
    for name in _MARKS:
        setattr(joined, name, dict(getattr(joined, name)))
    return joined


def _ends(rows: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(rows))


def _give_back(joined: Any, layers: Sequence[Any], rows: Sequence[int]) -> None:
    for name in _STATES:
        for number, state in getattr(joined, name).items():
            if state is not None:
                parts = torch.tensor_split(state, _ends(rows)[:-1])
                for layer, part in zip(layers, parts, strict=True):
                    getattr(layer, name)[number] = part.clone()
    for layer in layers:
        layer.dtype, layer.device = joined.dtype, joined.device
        for name in _MARKS:
            setattr(layer, name, dict(getattr(joined, name)))
