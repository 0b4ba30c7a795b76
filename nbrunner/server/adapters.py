"""The adapters a server keeps for its peers: by content, bounded in bytes, the least recently used goes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbrunner.blocks.adapters import BlockAdapter, SpanAdapter, check_adapter
from nbrunner.blocks.adapters_wire import take_adapters
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import BadPeerDataError, PeerRefusedError
from nbrunner.protocol.adapters import AdapterUse, PutAdapter
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import Limits

PEERS = 4
"""How many peers can use all of their `Limits.adapter_bytes` at the same time."""

RETRY_FULL = 5.0


@dataclass
class _Held:
    adapter: BlockAdapter
    owner: str
    pins: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.adapter.nbytes


class AdapterStore:
    """Block adapters by digest. What a session has pinned stays; all methods run in the event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[bytes, _Held] = {}  # in the order of last use

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters of peers."""
        return sum(one.nbytes for one in self._held.values() if one.owner)

    def hold(self, adapters: Mapping[bytes, BlockAdapter]) -> None:
        """Keep adapters of the server's own, which count for nobody. They must be pinned."""
        for digest, one in adapters.items():
            self._held.setdefault(digest, _Held(one, ""))

    def nbytes_of(self, peer: str) -> int:
        """Bytes of the adapters that this peer has put here."""
        return sum(one.nbytes for one in self._held.values() if one.owner == peer)

    def put(self, peer: str, adapters: Mapping[bytes, BlockAdapter]) -> None:
        """Keep adapters for a peer, and forget the oldest that nobody has pinned, its own first.

        Raises
        ------
        PeerRefusedError
            More than the peer may keep, or than there is room for.
        """
        new = {digest: one for digest, one in adapters.items() if digest not in self._held}
        wanted = sum(one.nbytes for one in new.values())
        allowed = self._limits.adapter_bytes
        for digest in adapters:
            self._touch(digest)
        kept = set(adapters)
        if not self._make_room(self.nbytes_of(peer) + wanted - allowed, kept, peer):
            raise PeerRefusedError(
                f"adapters of {wanted} bytes; you may keep {allowed} bytes here, of which "
                f"{self.nbytes_of(peer)} are in use: use a lower rank or fewer target modules",
                code="limit",
            )
        if not self._make_room(self.nbytes + wanted - PEERS * allowed, kept, None):
            raise PeerRefusedError("no room for more adapters now", code="full", retry_after=RETRY_FULL)
        for digest, one in new.items():
            self._held[digest] = _Held(one, peer)

    def use(self, use: AdapterUse | None, start: int, end: int) -> SpanAdapter | None:
        """The adapters that a request for blocks ``[start, end)`` names.

        Raises
        ------
        PeerRefusedError
            ``adapter``: some are not here. ``schema``: not one name a block.
        """
        if use is None:
            return None
        if len(use.blocks) != end - start:
            raise PeerRefusedError(f"{len(use.blocks)} adapters for blocks [{start}, {end})", code="schema")
        named = {start + index: digest for index, digest in enumerate(use.blocks) if digest}
        missing = [str(block) for block, digest in named.items() if digest not in self._held]
        if missing:
            raise PeerRefusedError(
                f"the adapters of blocks {', '.join(missing[:20])} are not here; send them first", code="adapter"
            )
        for digest in named.values():
            self._touch(digest)
        blocks = {block: self._held[digest].adapter for block, digest in named.items()}
        return SpanAdapter(blocks, use.seed, use.first_row) if blocks else None

    def pin(self, use: AdapterUse | None) -> None:
        """Keep what `use` has just found until `unpin`."""
        for digest in use.blocks if use is not None else ():
            if digest:
                self._held[digest].pins += 1

    def unpin(self, use: AdapterUse | None) -> None:
        """The counterpart of `pin`."""
        for digest in use.blocks if use is not None else ():
            if digest:
                self._held[digest].pins -= 1

    def _touch(self, digest: bytes) -> None:
        held = self._held.pop(digest, None)
        if held is not None:
            self._held[digest] = held

    def _make_room(self, nbytes: int, keep: set[bytes], owner: str | None) -> bool:
        """Forget so many bytes, if that can be done at all."""
        chosen = []
        for digest, one in self._held.items():
            if nbytes <= 0:
                break
            if not one.pins and digest not in keep and owner in (None, one.owner):
                chosen.append(digest)
                nbytes -= one.nbytes
        if nbytes > 0:
            return False
        for digest in chosen:
            del self._held[digest]
        return True


def take_checked(
    message: PutAdapter, tensors: Mapping[str, RawTensor], span: BlockSpan, limits: Limits
) -> list[BlockAdapter]:
    """The adapters of a message in the order of its parts, on the span's device, their digests computed.

    Reads every number: not for the event loop.

    Raises
    ------
    PeerRefusedError
        With the code ``limit`` where a limit is exceeded, ``data`` for whatever else does not fit.
    """
    for part in message.parts:
        if not span.start <= part.block < span.end:
            raise PeerRefusedError(
                f"block {part.block} is not here: this server has [{span.start}, {span.end})", code="blocks"
            )
    try:
        found = take_adapters(message.parts, tensors)
        for block, one in found.items():
            if one.rank > limits.adapter_rank:
                raise PeerRefusedError(
                    f"an adapter of rank {one.rank} in block {block}; this server allows {limits.adapter_rank}",
                    code="limit",
                )
            check_adapter(
                one,
                block,
                widths=span.linears(block),
                hidden_shape=span.hidden_shape,
                max_rank=limits.adapter_rank,
                max_prompt=limits.prompt_tokens,
            )
    except BadPeerDataError as error:
        raise PeerRefusedError(str(error), code="data") from None
    return [found[part.block].placed(span.device) for part in message.parts]
