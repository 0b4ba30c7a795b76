"""Adapters that a server serves to everybody by name: those it was started with, and those it was offered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbrunner.blocks.adapters import BlockAdapter
from nbrunner.blocks.adapters_wire import manifest_of
from nbrunner.errors import BadPeerDataError, PeerRefusedError, UserInputError
from nbrunner.protocol.adapters import AdapterInfo, AdapterUse, OfferAdapter
from nbrunner.protocol.manifests import encode_manifest, open_manifest, uid_of
from nbrunner.server.adapters import AdapterStore

MOST = 16
"""Names that fit a server's record."""

MOST_OF_ONE = 4
"""Of one author."""


@dataclass(frozen=True)
class _Served:
    info: AdapterInfo
    name: str
    author: str
    use: AdapterUse


class ServedAdapters:
    """Adapters by uid. All methods run in the event loop.

    Parameters
    ----------
    store
        Where their blocks are; what is served is pinned there.
    model, num_blocks
        Uid of the checkpoint, and blocks of the whole model.
    start, end
        Blocks that are here.
    swarm
        In which signatures must be made.
    accept
        Whether offers are taken.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        model: str,
        num_blocks: int,
        start: int,
        end: int,
        swarm: bytes,
        accept: bool,
    ) -> None:
        self._store = store
        self._model, self._num_blocks = model, num_blocks
        self._start, self._end = start, end
        self._swarm, self._accept = swarm, accept
        self._served: dict[str, _Served] = {}

    @property
    def uids(self) -> list[str]:
        """For the server's record."""
        return list(self._served)

    def begin_with(self, name: str, blocks: Mapping[int, BlockAdapter]) -> str:
        """Serve an adapter of the server's own; its uid. ``blocks`` are those of the whole model."""
        if len(self._served) >= MOST:
            raise UserInputError(f"a server serves {MOST} adapters at most")
        encoded = encode_manifest(manifest_of(name, self._model, self._num_blocks, blocks))
        here = {block: one for block, one in blocks.items() if self._start <= block < self._end}
        self._store.hold({one.digest: one for one in here.values()})
        use = AdapterUse([here[block].digest if block in here else b"" for block in range(self._start, self._end)])
        self._store.pin(use)
        uid = uid_of(encoded, name)
        self._served[uid] = _Served(AdapterInfo(encoded), name, "", use)
        return uid

    def info(self, uid: str) -> AdapterInfo:
        """Its manifest. `PeerRefusedError` with ``adapter`` if it is not served here."""
        served = self._served.get(uid)
        if served is None:
            raise PeerRefusedError("no adapter of this name is served here", code="adapter")
        return served.info

    def offer(self, peer: str, message: OfferAdapter) -> str:
        """Serve what a peer offers, in the place of what it offered under the same name before; its uid.

        Raises
        ------
        PeerRefusedError
            ``role``: offers are not taken. ``data``: not signed by the peer. ``model``: for another. ``adapter``:
            its blocks are not here. ``limit``: too many.
        """
        if not self._accept:
            raise PeerRefusedError(
                "this server takes no offers of adapters (nbrunner serve --accept-adapters would)", code="role"
            )
        try:
            uid, manifest = open_manifest(message.manifest, message.signature, self._swarm)
        except BadPeerDataError as error:
            raise PeerRefusedError(str(error), code="data") from None
        if manifest.author != peer:
            raise PeerRefusedError("an adapter is offered by its author", code="data")
        if manifest.model != self._model or len(manifest.blocks) != self._num_blocks:
            raise PeerRefusedError(f"this adapter is for {manifest.model}, not for {self._model}", code="model")
        if uid in self._served:
            return uid
        use = AdapterUse(manifest.blocks[self._start : self._end])
        self._store.use(use, self._start, self._end)  # refuses what is not here
        mine = [one for one, served in self._served.items() if served.author == peer]
        replaced = [one for one in mine if self._served[one].name == manifest.name]
        if len(mine) - len(replaced) >= MOST_OF_ONE or len(self._served) - len(replaced) >= MOST:
            raise PeerRefusedError(
                f"{len(self._served)} adapters are served here, {len(mine)} of them yours; {MOST} and "
                f"{MOST_OF_ONE} are allowed: withdraw one",
                code="limit",
            )
        for one in replaced:
            self._drop(one)
        self._store.pin(use)
        self._served[uid] = _Served(AdapterInfo(message.manifest, message.signature), manifest.name, peer, use)
        return uid

    def withdraw(self, peer: str, uid: str) -> None:
        """Serve an adapter no longer; sessions that use it go on. `PeerRefusedError` unless it is the peer's."""
        served = self._served.get(uid)
        if served is None or served.author != peer:
            raise PeerRefusedError("no adapter of yours is served here under this name", code="adapter")
        self._drop(uid)

    def _drop(self, uid: str) -> None:
        self._store.unpin(self._served.pop(uid).use)
