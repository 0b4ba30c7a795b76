"""A server left a chain in the middle of a text: who, why, and who took over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.sessions import Queued

_WHY_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Reroute:
    """One loss.

    Attributes
    ----------
    peer, start, end
        Who failed, and the blocks it ran; ``start == end`` if it failed before it ran any.
    why
        What it did or did not do.
    replaced_by
        (PeerID, start, end) of those who run these blocks now; empty while another is looked for.
    token
        How many tokens had come before.
    """

    peer: str
    start: int
    end: int
    why: str
    replaced_by: tuple[tuple[str, int, int], ...] = ()
    token: int = 0

    def __str__(self) -> str:
        blocks = f" [{self.start}, {self.end})" if self.start < self.end else ""
        why = self.why if len(self.why) <= _WHY_CHARACTERS else self.why[: _WHY_CHARACTERS - 1] + "…"
        lost = f"↷ {short_peer(self.peer)}{blocks} failed after token {self.token}: {why.rstrip('.')}"
        if not self.replaced_by:
            return f"{lost}; looking for another" if blocks else lost
        others = ", ".join(f"{short_peer(peer)} [{start}, {end})" for peer, start, end in self.replaced_by)
        return f"{lost}; {others} took over"


def queued_in_words(places: Mapping[str, tuple[Queued, float]], now: float) -> str:
    """Where a session waits for room.

    Parameters
    ----------
    places
        By PeerID, what the server said last, and when.
    now
        By the same clock.
    """
    told = []
    for peer, (queued, at) in places.items():
        line = f"waiting for room on {short_peer(peer)}, place {queued.place}"
        left = None if queued.seconds is None else queued.seconds - (now - at)
        told.append(line if left is None else f"{line}, about {max(left, 1):.0f} s")
    return " · ".join(told)


def reroutes(
    before: Sequence[tuple[str, int, int]],
    lost: Sequence[tuple[str, str]],
    now: Sequence[tuple[str, int, int]],
    *,
    token: int,
) -> tuple[Reroute, ...]:
    """What was lost from a chain, and who took over.

    Parameters
    ----------
    before
        The chain of the last finished step.
    lost
        (PeerID, why) of what failed since, oldest first.
    now
        The chain of now; blocks nobody runs yet are in none of its hops.
    token
        Tokens that had come when it happened.
    """
    held = {peer: (start, end) for peer, start, end in before}
    told = []
    for peer, why in dict(lost).items():
        start, end = held.get(peer, (0, 0))
        others = tuple(
            (other, max(low, start), min(high, end))
            for other, low, high in now
            if (other, low, high) not in before and low < end and high > start
        )
        told.append(Reroute(peer, start, end, why, others, token))
    return tuple(told)
