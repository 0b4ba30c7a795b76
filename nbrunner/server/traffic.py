"""How much a server has done, counted where it happens: tokens in and out, and for whom."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

_MOST_PEERS = 1024
"""Peers remembered: enough to tell how many were served, and no more than a stranger with many keys may fill."""


@dataclass
class Traffic:
    """Counters since the server started; used from its event loop.

    Attributes
    ----------
    tokens_in
        Tokens × rows of prompts and requests: parts of more than one token.
    tokens_out
        Tokens × rows of steps of one token, which is how answers grow.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    _peers: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def note(self, peer: str, tokens: int, rows: int) -> None:
        """Count a part that was computed for a peer."""
        if tokens > 1:
            self.tokens_in += tokens * rows
        else:
            self.tokens_out += tokens * rows
        self.note_peer(peer)

    def note_peer(self, peer: str) -> None:
        """Remember that a peer was served just now."""
        self._peers[peer] = time.monotonic()
        self._peers.move_to_end(peer)
        while len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)

    @property
    def peers(self) -> int:
        """Different peers served so far, as far as they are remembered."""
        return len(self._peers)
