"""What a session holds on this server: caches and transcript, and how two sessions come to hold the same tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from nbrunner.blocks.cache import PAGE_TOKENS, SpanCache
from nbrunner.blocks.outer import PreparedStep
from nbrunner.blocks.prefix import FrozenTokens, Prefix
from nbrunner.protocol.steps import CacheOp
from nbrunner.server.content import Content
from nbrunner.server.transcript import Transcript

SHARED_TOKENS = 2 * PAGE_TOKENS
"""Fewer tokens than these are not worth a piece of their own."""

MOST_PIECES = 8
"""Attention goes through the pieces one by one: rows that are repeated again and again are copied from here on."""


class FrozenBytes:
    """Bytes of all tokens that are frozen on a server, each counted once, for as long as a session has them."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[weakref.ref[FrozenTokens], str]] = {}

    def add(self, frozen: FrozenTokens, peer: str) -> None:
        """Count what has been frozen for a peer."""
        key = id(frozen)
        self._alive[key] = (weakref.ref(frozen, lambda _: self._alive.pop(key, None)), peer)

    def nbytes(self, peer: str = "") -> int:
        """Of one peer, or of all."""
        # a list, because the compute thread may add some meanwhile
        found = [reference() for reference, owner in list(self._alive.values()) if not peer or owner == peer]
        return sum(frozen.nbytes for frozen in found if frozen is not None)


class SessionMemory:
    """Caches and transcript of one session, which every operation changes together.

    Only the compute thread touches it, except to read the transcript, and `content`, which is replaced as a whole.

    Parameters
    ----------
    content
        What the caches hold, as far as others could have the same.
    frozen, peer
        Is told of tokens that are frozen here, and for whom.

    Attributes
    ----------
    prepared
        What could be computed of the next step before it came; nothing here is changed without forgetting it.
    """

    def __init__(self, cache: SpanCache, content: Content, frozen: FrozenBytes, peer: str) -> None:
        self.cache, self.content = cache, content
        self.transcript = Transcript()
        self.prepared: PreparedStep | None = None
        self._frozen, self._peer = frozen, peer

    @property
    def nbytes(self) -> int:
        """Its own; those of its prefix are counted in `FrozenBytes`."""
        return self.cache.nbytes() + self.transcript.nbytes

    def apply(self, op: CacheOp) -> None:
        self.prepared = None
        length = self.transcript.length
        if op.kind == "repeat" and op.count > 1 and self._freezes(length, self.cache.prefix):
            self.freeze(length)
        self.content = self.content.after([op], kept=self.cache.prefix.tokens)
        self.transcript.apply(op)
        if op.kind == "reset" or (op.kind == "crop" and not op.count):
            self.cache.reset()
        elif not length:
            return
        elif op.kind == "crop":
            if op.count < length:
                self.cache.crop(length - op.count)
        elif op.kind == "select":
            self.cache.select(op.rows)
        else:
            self.cache.repeat(op.count)

    def freeze(self, tokens: int) -> None:
        """Make the first ``tokens`` a prefix, which others may have too. `MemoryError`: nothing has changed."""
        self.prepared = None
        outputs, rest = self.transcript.copied(tokens), self.transcript.behind(tokens)
        self._frozen.add(self.cache.freeze(tokens, outputs), self._peer)
        self.transcript.continue_behind(self.cache.prefix, rest)

    def start_like(self, other: SessionMemory, tokens: int) -> None:
        """Hold the first tokens of another session instead of what is held, in the rows they were computed in."""
        if other.cache.prefix.tokens < tokens:
            other.freeze(tokens)
        prefix = other.cache.prefix.first(tokens).original()
        self.prepared = None
        self.cache.start_with(prefix)
        self.transcript.start_with(prefix)

    def expected(self, ops: Sequence[CacheOp]) -> tuple[int, int]:
        """(tokens that will be in the prefix after the ops, tokens × rows that they will freeze)."""
        prefix = self.cache.prefix
        if not ops:
            return prefix.tokens, 0
        length, rows = self.transcript.length, self.cache.batch_rows or 1
        shared, freezing = prefix.tokens, 0
        for op in ops:
            if op.kind == "reset":
                shared = length = 0
            elif op.kind == "crop":
                length = min(length, op.count)
                shared = min(shared, length)
            elif op.kind == "select":
                rows = len(op.rows)
            else:
                if op.count > 1 and self._freezes(length, prefix.first(shared)):
                    freezing += (length - shared) * rows
                    shared = length
                rows *= op.count
        return shared, freezing

    def _freezes(self, length: int, prefix: Prefix) -> bool:
        """Whether rows that are repeated keep their tokens together."""
        new = length - prefix.tokens
        return new >= SHARED_TOKENS and len(prefix.pieces) < MOST_PIECES and self.cache.shareable
