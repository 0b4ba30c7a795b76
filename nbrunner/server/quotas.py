"""What one peer may use of this server, and how much is used: sessions, bytes of caches, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.credentials import Terms
from nbrunner.protocol.limits import Limits

BURST_SECONDS = 10.0
"""A peer may use at once what its rate gives in this time: a prompt comes in one go, its answer token by token."""

LONGEST_WAIT = 30.0
"""A peer that is over its rate waits; one that would wait longer than this is refused."""

MOST_IDLE_BUCKETS = 256
"""Of peers that have been quiet long enough to be as new; they are forgotten beyond this."""

RETRY_FULL = 5.0
"""Seconds after which a peer that was refused for lack of room may ask again."""


class TokenBucket:
    """Tokens per second of one peer. It may overdraw once, and then waits until the debt is paid."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._balance = rate * BURST_SECONDS
        self._at = clock()

    def wait_seconds(self) -> float:
        """How long the next request must wait; 0 if it may go."""
        self._refill()
        return max(0.0, -self._balance / self.rate)

    def spend(self, tokens: int) -> None:
        self._refill()
        self._balance -= tokens

    @property
    def full(self) -> bool:
        """Whether it is as a new one."""
        self._refill()
        return self._balance >= self.rate * BURST_SECONDS

    def _refill(self) -> None:
        now = self._clock()
        self._balance = min(self.rate * BURST_SECONDS, self._balance + (now - self._at) * self.rate)
        self._at = now


class Quotas:
    """Book-keeping over all peers and sessions of a server.

    Parameters
    ----------
    more
        Bytes of a peer that none of its sessions holds alone; of all peers for an empty one.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        *,
        more: Callable[[str], int] = lambda peer: 0,
    ) -> None:
        self.limits = limits
        self._clock, self._more = clock, more
        self._bytes: dict[Hashable, int] = {}
        self._owners: dict[Hashable, str] = {}
        self._sessions: dict[str, int] = {}
        self._buckets: dict[tuple[str, float], TokenBucket] = {}
        self._sweep_at = MOST_IDLE_BUCKETS

    @property
    def bytes_used(self) -> int:
        return sum(self._bytes.values()) + self._more("")

    @property
    def bytes_left(self) -> int:
        return max(0, self.limits.cache_bytes - self.bytes_used)

    @property
    def sessions(self) -> int:
        return sum(self._sessions.values())

    def open_session(self, peer: str, terms: Terms) -> None:
        """Count a session of a peer; `PeerRefusedError` if it has too many. Its memory is for `WaitingRoom`."""
        allowed = min(self.limits.sessions, terms.max_sessions or self.limits.sessions)
        held = self._sessions.get(peer, 0)
        if held >= allowed:
            raise PeerRefusedError(
                f"you have {held} sessions open here and may have {allowed}; close one first",
                code="limit",
                retry_after=RETRY_FULL,
            )
        self._sessions[peer] = held + 1

    def close_session(self, peer: str) -> None:
        held = self._sessions.get(peer, 0) - 1
        if held > 0:
            self._sessions[peer] = held
        else:
            self._sessions.pop(peer, None)

    def set_bytes(self, holder: Hashable, used: int, *, peer: str = "") -> None:
        """What a holder (a session) has allocated, or is about to; 0 frees it. ``peer``: whose it is, once said."""
        if used:
            self._bytes[holder] = used
            if peer:
                self._owners[holder] = peer
        else:
            self._bytes.pop(holder, None)
            self._owners.pop(holder, None)

    def bytes_of(self, holder: Hashable) -> int:
        """What is counted for a holder."""
        return self._bytes.get(holder, 0)

    def bytes_of_peer(self, peer: str) -> int:
        """What is counted for all holders of a peer, and what they hold together."""
        alone = sum(self._bytes[holder] for holder, owner in self._owners.items() if owner == peer)
        return alone + self._more(peer)

    def peer_may_have(self, peer: str, holder: Hashable, wanted: int) -> bool:
        """Whether a holder could have ``wanted`` bytes in all without its peer having more than one may."""
        allowed = self.limits.peer_cache_bytes
        return not allowed or self.bytes_of_peer(peer) - self._bytes.get(holder, 0) + wanted <= allowed

    def room_for(self, holder: Hashable, wanted: int) -> bool:
        """Whether a holder could have ``wanted`` bytes in all."""
        return self.bytes_used - self._bytes.get(holder, 0) + wanted <= self.limits.cache_bytes

    def wait_seconds(self, peer: str, terms: Terms) -> float:
        """How long a peer must wait before its next tokens.

        Raises
        ------
        PeerRefusedError
            Longer than anybody would.
        """
        bucket = self._bucket(peer, terms)
        seconds = bucket.wait_seconds() if bucket else 0.0
        if seconds > LONGEST_WAIT:
            raise PeerRefusedError(
                f"over your {self.rate(terms):g} tokens per second; try again in {seconds:.0f} s",
                code="limit",
                retry_after=seconds,
            )
        return seconds

    def spend(self, peer: str, terms: Terms, tokens: int) -> None:
        bucket = self._bucket(peer, terms)
        if bucket:
            bucket.spend(tokens)

    def rate(self, terms: Terms) -> float:
        """Tokens per second of a peer with these terms: the lower of the server's and its invite's; 0: no limit."""
        rates = [rate for rate in (self.limits.tokens_per_second, terms.tokens_per_second) if rate > 0]
        return min(rates, default=0.0)

    def _bucket(self, peer: str, terms: Terms) -> TokenBucket | None:
        rate = self.rate(terms)
        if rate <= 0:
            return None
        key = (peer, rate)
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:  # anybody with an invite can come with ever new names
                self._buckets = {key: one for key, one in self._buckets.items() if not one.full}
                self._sweep_at = max(MOST_IDLE_BUCKETS, 2 * len(self._buckets))
            bucket = self._buckets[key] = TokenBucket(rate, self._clock)
        return bucket
