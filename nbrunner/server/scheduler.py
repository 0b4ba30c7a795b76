"""What the compute thread does next: a decision over what waits, without clock, threads or tensors.

Steps of different sessions run in one pass where the span allows it. Decode steps go first, because somebody waits
for every one of them; then pieces of prompts; then training and other requests, which can wait. Whatever has waited
too long goes before all of that, every other time. Between peers the one that has been served least goes first, by
the virtual clocks of start-time fair queueing (Goyal, Vin and Cheng, 1996).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Urgency(IntEnum):
    """Which work goes first. Somebody waits for every token of a decode; a gradient can wait."""

    DECODE = 0
    PREFILL = 1
    STATELESS = 2


PATIENCE = {Urgency.DECODE: 0.5, Urgency.PREFILL: 1.0, Urgency.STATELESS: 5.0}
"""Seconds after which work goes before what is more urgent, or more deserving."""

BATCH_TOKENS = 256
"""Tokens × rows of one joined pass. Beyond it a pass is bound by arithmetic and no longer by reading weights:
joining more only makes everybody wait longer."""

FORGET_SECONDS = 60.0
"""A peer that has had nothing here for so long starts anew."""


@dataclass(frozen=True)
class Waiting:
    """One piece of work.

    Attributes
    ----------
    number
        Order of arrival; names it.
    urgency, since
        And when it came, in seconds of any clock.
    peer
        Whose it is.
    tokens
        Tokens × rows it has left; what it is charged.
    rows
        A piece of it is a multiple of these.
    divisible
        Whether a part of its tokens can be run and the rest later.
    joins
        Work of equal value can run in one pass; None: it runs alone.
    """

    number: int
    urgency: Urgency
    since: float
    peer: str = ""
    tokens: int = 1
    rows: int = 1
    divisible: bool = False
    joins: Hashable | None = None


@dataclass(frozen=True)
class Chosen:
    """What to run, and how many of its tokens × rows."""

    work: Waiting
    tokens: int


@dataclass
class Scheduler:
    """Chooses the next pass.

    Attributes
    ----------
    piece_tokens
        Tokens × rows of a prompt that are run at once when others wait.
    beside_tokens
        The same when it runs in one pass with decode steps, which it makes longer.
    batch_tokens
        Tokens × rows of one pass at most, but for a single piece of work that is larger.
    """

    piece_tokens: int = 256
    beside_tokens: int = 32
    batch_tokens: int = BATCH_TOKENS
    _clocks: dict[str, float] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    _now: float = 0.0
    _favoured_the_old: bool = False

    def choose(self, waiting: Sequence[Waiting], now: float, *, active: int = 1) -> list[Chosen]:
        """The next pass; empty only if nothing waits. Everything in it has the same `Waiting.joins`.

        Parameters
        ----------
        waiting
            Everything that has not begun, and what is left of what has.
        now
            By the clock of `Waiting.since`.
        active
            Sessions that have had a step lately, or have one waiting: with one, nobody is held up by a long prompt.
        """
        if not waiting:
            return []
        self._forget(waiting, now)
        first = self._first(waiting, now)
        if first.joins is None:
            chosen = [Chosen(first, self._piece(first, len(waiting), active))]
        else:
            chosen = self._pass_with(first, [one for one in waiting if one.joins == first.joins], active)
        self._charge(chosen)
        return chosen

    def _first(self, waiting: Sequence[Waiting], now: float) -> Waiting:
        old = [one for one in waiting if now - one.since > PATIENCE[one.urgency]]
        urgent = min(one.urgency for one in waiting)
        # not twice in a row: a heap of old requests must not hold up every token of everybody
        if old and not (
            self._favoured_the_old and any(one.urgency == urgent and one not in old for one in waiting)
        ):
            self._favoured_the_old = True
            return min(old, key=self._turn)
        self._favoured_the_old = False
        return min((one for one in waiting if one.urgency == urgent), key=self._turn)

    def _pass_with(self, first: Waiting, candidates: Sequence[Waiting], active: int) -> list[Chosen]:
        """Decode steps, peer by peer in turn, and at most one piece of a prompt."""
        chosen: list[Chosen] = []
        room = self.batch_tokens
        steps = [one for one in candidates if one.urgency is Urgency.DECODE]
        if first.urgency is not Urgency.DECODE:
            size = self.beside_tokens if steps else self._piece(first, len(candidates), active)
            chosen.append(Chosen(first, _portion(first, size)))
            room -= chosen[0].tokens
        for one in self._by_turns(steps, first):
            if one.tokens <= room or not chosen:
                chosen.append(Chosen(one, one.tokens))
                room -= one.tokens
        if first.urgency is Urgency.DECODE:
            prompts = [one for one in candidates if one.urgency is Urgency.PREFILL]
            small = [one for one in prompts if _portion(one, self.beside_tokens) <= min(self.beside_tokens, room)]
            if small:
                one = min(small, key=self._turn)
                chosen.append(Chosen(one, _portion(one, self.beside_tokens)))
        return chosen

    def _by_turns(self, steps: Sequence[Waiting], first: Waiting) -> Iterator[Waiting]:
        """One of each peer, those that were served least first, then the second of each, and so on."""
        queues: dict[str, list[Waiting]] = {}
        for one in sorted(steps, key=lambda one: one.number):
            queues.setdefault(one.peer, []).append(one)
        if first in steps:  # it was chosen for its age, perhaps
            queues[first.peer].remove(first)
            queues[first.peer].insert(0, first)
        order = sorted(queues, key=lambda peer: (peer != first.peer, self._clock(peer)))
        for turn in range(max(map(len, queues.values()), default=0)):
            for peer in order:
                if turn < len(queues[peer]):
                    yield queues[peer][turn]

    def _piece(self, work: Waiting, waiting: int, active: int) -> int:
        return work.tokens if waiting == 1 and active <= 1 else _portion(work, self.piece_tokens)

    # -- whose turn it is ------------------------------------------------------------------------------------------

    def _turn(self, one: Waiting) -> tuple[float, float, int]:
        return (self._clock(one.peer), one.since, one.number)

    def _clock(self, peer: str) -> float:
        return self._clocks.get(peer, self._now)

    def _charge(self, chosen: Sequence[Chosen]) -> None:
        # a peer that had nothing to do for a while cannot have saved up for it
        self._now = max(self._now, min(self._clock(one.work.peer) for one in chosen))
        for one in chosen:
            self._clocks[one.work.peer] = max(self._clock(one.work.peer), self._now) + one.tokens

    def _forget(self, waiting: Sequence[Waiting], now: float) -> None:
        for one in waiting:
            self._seen[one.peer] = now
        for peer in [peer for peer, seen in self._seen.items() if now - seen > FORGET_SECONDS]:
            del self._seen[peer]
            self._clocks.pop(peer, None)


def _portion(work: Waiting, tokens: int) -> int:
    """So many of its tokens × rows, in whole tokens and at least one; all of what cannot be divided."""
    if not work.divisible:
        return work.tokens
    return min(work.tokens, max(tokens // work.rows, 1) * work.rows)
