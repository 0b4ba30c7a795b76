"""A session's transcript: what left the span for every token held, kept so that it can be sent again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbrunner.blocks.cache import buffer_tokens
from nbrunner.blocks.prefix import Prefix
from nbrunner.protocol.steps import CacheOp

Buffers = dict[str, torch.Tensor]


class Transcript:
    """Tensors [batch, length, ...] by name (``hidden``, ``carry.N``) in memory of the host.

    The buffers grow as those of the caches do, so that a token costs itself and not the session's length. Appending
    never writes before ``length``: a slice on its way to the network stays what it is. The first tokens may be
    those of a prefix, and then the buffers begin behind it.
    """

    def __init__(self) -> None:
        self.length = 0
        # One value, replaced as one: the event loop reads windows while the compute thread may freeze tokens.
        self._held: tuple[Prefix, Buffers] = (Prefix(), {})

    @property
    def nbytes(self) -> int:
        """Of its own buffers, without the prefix."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._held[1].values())

    def append(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Add tokens; every tensor is [batch, tokens, ...]."""
        end = self.length + next(iter(outputs.values())).shape[1]
        prefix, buffers = self._held
        first = self.length - prefix.tokens
        for name, tensor in outputs.items():
            _room(buffers, name, tensor, first, end - prefix.tokens)[:, first : end - prefix.tokens] = tensor
        self.length = end

    def window(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        """Tokens ``[begin, end)``; views, where they do not go over the end of a prefix."""
        prefix, buffers = self._held
        skip = prefix.tokens
        if begin >= skip:
            return {name: buffer[:, begin - skip : end - skip] for name, buffer in buffers.items()}
        found = {}
        for name in prefix.pieces[0].frozen.outputs:
            parts = prefix.outputs(name, begin, end)
            if end > skip:
                parts.append(buffers[name][:, : end - skip])
            found[name] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return found

    def apply(self, op: CacheOp) -> None:
        """Change it as the caches are changed."""
        if op.kind == "crop":
            self._crop(op.count)
        elif op.kind == "reset":
            self._crop(0)
        elif self.length:
            prefix, buffers = self._held
            rows = op.rows if op.kind == "select" else _repeated(_rows(prefix, buffers), op.count)
            index, used = torch.tensor(rows, dtype=torch.long), self.length - prefix.tokens
            chosen = {name: buffer[:, :used].index_select(0, index) for name, buffer in buffers.items()}
            self._held = (prefix.select(rows), chosen if used else {})

    # -- tokens that are shared ----------------------------------------------------------------------------------

    def copied(self, tokens: int) -> Buffers:
        """What is its own of the first ``tokens``, in buffers of exactly that size."""
        prefix, buffers = self._held
        return {name: buffer[:, : tokens - prefix.tokens].clone() for name, buffer in buffers.items()}

    def behind(self, tokens: int) -> Buffers:
        """What comes after the first ``tokens``, in growing buffers."""
        prefix, buffers = self._held
        rest: Buffers = {}
        if self.length > tokens:
            for name, buffer in buffers.items():
                own = buffer[:, tokens - prefix.tokens : self.length - prefix.tokens]
                _room(rest, name, own, 0, own.shape[1])[:, : own.shape[1]] = own
        return rest

    def continue_behind(self, prefix: Prefix, rest: Buffers) -> None:
        """Have a prefix in the place of the first tokens, and `behind` for the others."""
        self._held = (prefix, rest)

    def start_with(self, prefix: Prefix) -> None:
        """Forget everything, and hold the tokens of a prefix."""
        self.length, self._held = prefix.tokens, (prefix, {})

    def _crop(self, count: int) -> None:
        # In place, though slices of what is cut off may still be on their way out: they belong to a step that its
        # client has given up, or it would not have cropped.
        if count < self.length:
            self.length = count
            prefix, buffers = self._held
            self._held = (prefix.first(count), buffers if count else {})


def _rows(prefix: Prefix, buffers: Buffers) -> int:
    return prefix.rows if prefix.pieces else next(iter(buffers.values())).shape[0]


def _repeated(rows: int, times: int) -> list[int]:
    return [row for row in range(rows) for _ in range(times)]


def _room(buffers: Buffers, name: str, like: torch.Tensor, used: int, end: int) -> torch.Tensor:
    """The buffer of a name, with room up to ``end``."""
    old = buffers.get(name)
    if old is not None and old.shape[1] >= end:
        return old
    new = torch.empty((like.shape[0], buffer_tokens(end), *like.shape[2:]), dtype=like.dtype)
    if old is not None and used:
        new[:, :used] = old[:, :used]
    buffers[name] = new
    return new
