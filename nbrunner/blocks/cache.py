"""The caches of one session on one span."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import UserInputError
from .compat import CacheLayerMixin, DummyLayer, DynamicLayer, LinearAttentionCacheLayerMixin
from .prefix import FrozenTokens, Prefix
from .prefix_attention import KeysInPieces

PAGE_TOKENS = 16
"""Buffers are whole pages of so many tokens."""

SPARE_SHARE = 8
"""And have room for one token in so many more than they hold. A token is then copied about eight times as a session
grows, which is nothing beside the attention that reads all of them in every step; buffers that double would be half
empty half the time."""


def buffer_tokens(needed: int) -> int:
    """For how many tokens a buffer is made that has to hold so many."""
    return -(-(needed + needed // SPARE_SHARE) // PAGE_TOKENS) * PAGE_TOKENS


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one full-attention layer in buffers that grow page by page.

    transformers' own layer concatenates, so every decode step copies the whole cache; here a step writes its tokens
    and a rollback changes a number (measured: 0-15 % of a decode step at 512 tokens, growing with the context).
    """

    def __init__(self, **kwargs: Any) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._used = 0
        super().__init__(**kwargs)

    @property
    def keys(self) -> Tensor | None:
        """``[batch, heads, tokens, width]``, a view of what is used of the buffer."""
        return None if self._keys is None else self._keys[:, :, : self._used]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value
        self._used = 0 if value is None else value.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """``[batch, heads, tokens, width]``, a view of what is used of the buffer."""
        return None if self._values is None else self._values[:, :, : self._used]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        needed = self._used + key_states.shape[-2]
        if self._keys is None or self._values is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            capacity = buffer_tokens(needed)
            self._keys, self._values = _resized(key_states, 0, capacity), _resized(value_states, 0, capacity)
        elif needed > self._keys.shape[-2]:
            capacity = buffer_tokens(needed)
            self._keys = _resized(self._keys, self._used, capacity)
            self._values = _resized(self._values, self._used, capacity)
        self._keys[:, :, self._used : needed] = key_states
        self._values[:, :, self._used : needed] = value_states
        self._used = needed
        return self._keys[:, :, :needed], self._values[:, :, :needed]

    def get_seq_length(self) -> int:
        return self._used

    def crop(self, tokens_to_remove: int) -> None:
        self._used = max(self._used - abs(tokens_to_remove), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, beam_idx.to(self._keys.device))
            self._values = self._values.index_select(0, beam_idx.to(self._values.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.repeat_interleave(repeats, dim=0)
            self._values = self._values.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        self._keys = self._values = None
        self._used = 0
        self.is_initialized = False

    def frozen(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens in its buffers, copied into buffers of exactly their size."""
        assert self._keys is not None and self._values is not None  # noqa: S101, PT018 - asked of filled layers only
        return self._keys[:, :, :count].clone(), self._values[:, :, :count].clone()

    def behind(self, slot: int, prefix: Prefix, count: int) -> ForkedLayer:
        """A layer that has a prefix in the place of the first tokens in its buffers, and a copy of the rest."""
        layer = ForkedLayer(slot, prefix)
        rest = self._used - count
        if rest and self._keys is not None and self._values is not None:
            layer._keys, layer._values = (
                _resized(buffer[:, :, count:], rest, buffer_tokens(rest)) for buffer in (self._keys, self._values)
            )
            layer._used = rest
        return layer


class ForkedLayer(GrowingLayer):
    """A layer whose first tokens are those of a prefix; what follows lies in growing buffers of its own.

    `update` puts them together, which copies them. That is right for every model; where attention can take them
    piece by piece, `append` gives them as they are.

    Parameters
    ----------
    slot : int
        Its number in the model.
    prefix : Prefix
        Not empty; may be replaced by another of the same tokens.
    """

    def __init__(self, slot: int, prefix: Prefix) -> None:
        super().__init__()
        self.slot, self.prefix = slot, prefix
        keys, _ = prefix.pieces[0].frozen.layers[slot]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @property
    def keys(self) -> Tensor | None:
        """``[batch, heads, tokens, width]``, put together."""
        return self._whole(0, None if self._keys is None else self._keys[:, :, : self._used])

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys, self._used = value, 0 if value is None else value.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """``[batch, heads, tokens, width]``, put together."""
        return self._whole(1, None if self._values is None else self._values[:, :, : self._used])

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return self._whole(0, keys), self._whole(1, values)

    def append(self, key_states: Tensor, value_states: Tensor) -> KeysInPieces:
        """As `update`, without putting anything together."""
        keys, values = super().update(key_states, value_states)
        parts = []
        for piece in self.prefix.pieces:
            held = piece.frozen.layers[self.slot]
            parts.append((piece.of(held[0], 2), piece.of(held[1], 2), piece.single is not None))
        return KeysInPieces([*parts, (keys, values, False)])

    def get_seq_length(self) -> int:
        return self.prefix.tokens + self._used

    def _whole(self, which: int, own: Tensor | None) -> Tensor:
        parts = [piece.of(piece.frozen.layers[self.slot][which], 2) for piece in self.prefix.pieces]
        if own is not None:
            parts.append(own)
        return torch.cat(parts, 2) if len(parts) != 1 else parts[0]


def _resized(source: Tensor, used: int, capacity: int) -> Tensor:
    """A buffer for `capacity` tokens (axis -2) that starts with the first `used` ones of `source`."""
    buffer = source.new_empty(*source.shape[:-2], capacity, source.shape[-1])
    buffer[:, :, :used] = source[:, :, :used]
    return buffer


class SpanCache(DynamicCache):  # type: ignore[misc]
    """All caches of one session on the blocks ``[start, end)`` of a span.

    Slots keep their ABSOLUTE numbers, because attention modules know theirs; slots that are not held are
    placeholders, which transformers skips when it asks for "the first full-attention layer". The position is
    counted here as well, since a span may hold only layers that do not know how long they are.

    Its tensors are made in inference mode and never enter autograd: training calls have no cache.

    Parameters
    ----------
    config : PretrainedConfig
        Of the language model; decides what each layer's cache is (full, sliding, recurrent, ...).
    slots : collection of int
        Absolute numbers of the held slots.
    start, end : int
        The blocks this cache belongs to.

    Attributes
    ----------
    length : int
        Tokens per row that have passed through the blocks (padding included).
    prefix : Prefix
        The first of them, if they are shared with other sessions or among the rows; empty otherwise.
    """

    def __init__(self, config: Any, slots: Collection[int], *, start: int, end: int) -> None:
        self.layers: list[Any]
        self._config, self._slots = config, frozenset(slots)
        self._placeholder = DummyLayer()
        self.start, self.end = start, end
        self.length = 0
        self.prefix = Prefix()
        self._make_layers()

    def _make_layers(self) -> None:
        super().__init__(config=self._config)
        layers = list(self.layers)
        # More slots than the config describes: families with several attentions per layer (longcat_flash).
        layers += [DynamicLayer() for _ in range(max(self._slots, default=-1) + 1 - len(layers))]
        self.layer_class_to_replicate = None
        self.layers = [
            (GrowingLayer() if type(layer) is DynamicLayer else layer) if slot in self._slots else self._placeholder
            for slot, layer in enumerate(layers)
        ]

    # -- what outer models and attention modules ask -------------------------------------------------------------

    def _attention(self, layer_idx: int) -> Any:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, CacheLayerMixin):
            return layer
        # Asked of a slot that is not held: by an outer model that wants the first layer of full attention.
        held = [layer for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        return next((layer for layer in held if not getattr(layer, "is_sliding", False)), held[0] if held else None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer = self._attention(layer_idx)
        return self.length if layer is None else int(layer.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        layer = self._attention(layer_idx)
        if layer is None:
            return self.length + query_length, 0
        sizes: tuple[int, int] = layer.get_mask_sizes(query_length)
        return sizes

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        recurrent = [layer for layer in layers if is_recurrent(layer)]
        if not recurrent:
            return self.length > 0
        states = recurrent[-1].has_previous_state
        return bool(all(states.values()) if state_idx is None else states[state_idx])

    @contextmanager
    def only(self, slots: Collection[int]) -> Iterator[None]:
        """Show only these slots while a part of the span runs: lengths are then read from layers that run now."""
        layers = self.layers
        self.layers = [layer if slot in slots else self._placeholder for slot, layer in enumerate(layers)]
        try:
            yield
        finally:
            self.layers = layers

    # -- operations between steps --------------------------------------------------------------------------------

    @property
    def croppable(self) -> bool:
        """Whether `crop` can take tokens back now.

        False once a recurrent state holds them, or once a sliding window or a convolution has forgotten older ones
        without `record` having been called first.
        """
        return all(_croppable(layer) for layer in self.layers)

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a recurrent state, which `crop` cannot take back even after `record`."""
        return any(
            is_recurrent(layer) and any(layer.is_recurrent_states_initialized.values()) for layer in self.layers
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row.

        Parameters
        ----------
        tokens_to_remove : int
            How many; transformers writes this number negative, so the sign does not matter. With 0, layers that
            `record` shrink back to what they need.

        Raises
        ------
        UserInputError
            More tokens than there are, or a layer that cannot (see `croppable`).
        """
        count = abs(int(tokens_to_remove))
        if count > self.length:
            raise UserInputError(f"cannot take back {count} tokens of a session that has {self.length}")
        if count and not self.croppable:
            raise UserInputError(
                f"the caches of blocks [{self.start}, {self.end}) cannot be rolled back: a recurrent state or a "
                "sliding window has forgotten older tokens. Replay the session up to the position instead."
            )
        with torch.inference_mode():
            for layer in self.layers:
                if _holds_something(layer) and (count or getattr(layer, "record_past", False)):
                    layer.crop(-count)
        self.length -= count
        if self.length < self.prefix.tokens:
            self._change_prefix(self.prefix.first(self.length))

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Make row ``i`` what row ``rows[i]`` was: beam search, or rows that ended; there may be fewer or more."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.ndim != 1 or (index.numel() and int(index.min()) < 0):
            raise UserInputError("rows to select are a list of row numbers from 0")
        batch = self.batch_rows
        if batch is not None and index.numel() and int(index.max()) >= batch:
            raise UserInputError(f"row {int(index.max())} was selected of a session that has {batch} rows")
        with torch.inference_mode():
            for layer in self.layers:
                layer.reorder_cache(index)
        if self.prefix.pieces:
            self._change_prefix(self.prefix.select(index.tolist()))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, copies next to each other."""
        batch = self.batch_rows
        if times < 1:
            raise UserInputError(f"rows cannot be repeated {times} times")
        if batch is not None and times > 1:
            self.select(torch.arange(batch).repeat_interleave(times))

    def record(self) -> None:
        """From now on keep what sliding windows and convolutions would forget, until the next `crop`."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Forget everything, keep the object. The next step may have another number of rows."""
        recording = any(getattr(layer, "record_past", False) for layer in self.layers)
        # not transformers' reset: recurrent states would be set to zero, and keep their rows
        self._make_layers()
        if recording:
            self.record()
        self.length, self.prefix = 0, Prefix()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    # -- tokens that are shared ----------------------------------------------------------------------------------

    @property
    def shareable(self) -> bool:
        """Whether a token's part of the caches depends on no later one: full attention in every layer."""
        held = [self.layers[slot] for slot in self._slots]
        return bool(held) and all(isinstance(layer, GrowingLayer) for layer in held)

    def freeze(self, tokens: int, outputs: Mapping[str, Tensor]) -> FrozenTokens:
        """Make the first ``tokens`` a prefix, of what is one already and a piece for the rest.

        Parameters
        ----------
        outputs
            ``[rows, new tokens, …]``, what left the span for the tokens that were not in the prefix before.
        """
        count, rows = tokens - self.prefix.tokens, self.batch_rows or 1
        filled = {slot: layer for slot, layer in self._growing() if layer.get_seq_length()}
        with torch.inference_mode():
            layers = {slot: layer.frozen(count) for slot, layer in filled.items()}
            frozen = FrozenTokens(count, rows, layers, outputs)
            prefix = self.prefix.followed_by(frozen)
            forked = {slot: layer.behind(slot, prefix, count) for slot, layer in filled.items()}
        # only now that there was memory for all of it
        self.prefix = prefix
        self.layers = [forked.get(slot, layer) for slot, layer in enumerate(self.layers)]
        return frozen

    def start_with(self, prefix: Prefix) -> None:
        """Forget everything, and hold the tokens of a prefix."""
        self._make_layers()
        self.length, self.prefix = prefix.tokens, prefix
        for slot in prefix.pieces[0].frozen.layers:
            self.layers[slot] = ForkedLayer(slot, prefix)

    def _growing(self) -> Iterator[tuple[int, GrowingLayer]]:
        return ((slot, layer) for slot, layer in enumerate(self.layers) if isinstance(layer, GrowingLayer))

    def _change_prefix(self, prefix: Prefix) -> None:
        self.prefix = prefix
        for layer in self.layers:
            if isinstance(layer, ForkedLayer):
                layer.prefix = prefix

    # -- accounting ----------------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(tensor, Tensor):
                        yield tensor

    @property
    def batch_rows(self) -> int | None:
        """Rows of the session, or None before its first step."""
        if self.prefix.pieces:
            return self.prefix.rows
        return next((tensor.shape[0] for tensor in self._tensors() if tensor.ndim > 1), None)

    def nbytes(self) -> int:
        """Bytes that its own buffers occupy, growth reserve included. Those of a prefix are not only its own."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())


def is_recurrent(layer: Any) -> bool:
    """Whether a layer keeps a recurrent state or the end of a convolution."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DummyLayer)


def _holds_something(layer: Any) -> bool:
    if is_recurrent(layer):
        return any(layer.is_conv_states_initialized.values())
    return not isinstance(layer, DummyLayer) and bool(layer.is_initialized)


def _croppable(layer: Any) -> bool:
    if is_recurrent(layer):
        if any(layer.is_recurrent_states_initialized.values()):
            return False
        if any(layer.is_conv_states_initialized.values()) and not getattr(layer, "record_past", False):
            return False
    window = getattr(layer, "sliding_window", None)
    if isinstance(window, int) and layer.get_seq_length() >= window:
        return bool(getattr(layer, "record_past", False))
    return True
