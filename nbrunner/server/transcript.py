"""A session's transcript: what left the span for every token held, kept so that it can be sent again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbrunner.blocks.cache import buffer_tokens
from nbrunner.protocol.messages import CacheOp


class Transcript:
    """Tensors [batch, length, ...] by name (``hidden``, ``carry.N``) in memory of the host.

    The buffers grow as those of the caches do, so that a token costs itself and not the session's length. Appending
    never writes before ``length``: a slice on its way to the network stays what it is.
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def append(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Add tokens; every tensor is [batch, tokens, ...]."""
        end = self.length + next(iter(outputs.values())).shape[1]
        for name, tensor in outputs.items():
            self._room(name, tensor, end)[:, self.length : end] = tensor
        self.length = end

    def window(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        """Views of tokens ``[begin, end)``."""
        return {name: buffer[:, begin:end] for name, buffer in self._buffers.items()}

    def apply(self, op: CacheOp) -> None:
        """Change it as the caches are changed."""
        if op.kind == "crop":
            self._crop(op.count)
        elif op.kind == "reset":
            self._crop(0)
        elif self.length:
            for name, buffer in self._buffers.items():
                held = buffer[:, : self.length]
                self._buffers[name] = (
                    held.index_select(0, torch.tensor(op.rows, dtype=torch.long))
                    if op.kind == "select"
                    else held.repeat_interleave(op.count, dim=0)
                )

    def _crop(self, count: int) -> None:
        # In place, though slices of what is cut off may still be on their way out: they belong to a step that its
        # client has given up, or it would not have cropped.
        if count < self.length:
            self.length = count
            if not count:
                self._buffers = {}

    def _room(self, name: str, like: torch.Tensor, end: int) -> torch.Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape[1] >= end:
            return old
        new = torch.empty((like.shape[0], buffer_tokens(end), *like.shape[2:]), dtype=like.dtype)
        if old is not None and self.length:
            new[:, : self.length] = old[:, : self.length]
        self._buffers[name] = new
        return new
