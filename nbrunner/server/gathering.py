"""How long the compute thread waits for more decode steps before it runs those that it has.

A pass of a few rows takes little longer than one of a single row, because both read all weights. So sessions should
come in step; and they come again and again, each after about the same time: its client's head, and the servers
behind us. What is decided here is decided from that alone, without a thread, a lock or a clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

GATHER_SECONDS = 0.001
"""How long at least it waits for active sessions of which nothing is known."""

ACTIVE_SECONDS = 0.25
"""A session counts as active for so long after its last step, and longer if it is known to be away for longer."""

GATHERS_FOR_THOSE_EXPECTED = 6
"""So many times as long it waits for sessions that are known to be back by then."""

PATIENCE = 1.3
"""So many times as long as a session is away as a rule it is waited for; then it is late."""

FORGET_SECONDS = 60.0
"""A session that is away for longer is not coming back."""

_SMOOTHING = 0.5
_REMEMBERED = 4096


@dataclass(eq=False)
class _Round:
    """Of one session: when it came last, how long it is away as a rule, and since when it is if it is now."""

    came: float
    away: float | None = None
    went: float | None = None

    @property
    def due(self) -> float:
        """When it should be back; never, if that is not known."""
        return math.inf if self.went is None or self.away is None else self.went + self.away

    @property
    def late(self) -> float:
        """From when on it is not waited for; always, if it is not known when it is due."""
        return -math.inf if self.went is None or self.away is None else self.went + PATIENCE * self.away


class Gathering:
    """The sessions of a server in their rounds.

    Attributes
    ----------
    seconds
        How long it is worth while to wait for somebody who may not come; six times as long for who will.
    """

    def __init__(self) -> None:
        self.seconds = GATHER_SECONDS
        self._rounds: dict[str, _Round] = {}
        self._pass_seconds = 0.0

    def came(self, session: str, now: float) -> None:
        """It has a step to be computed."""
        found = self._rounds.get(session)
        if found is None:
            if len(self._rounds) >= _REMEMBERED:
                self._rounds.clear()  # of sessions that have ended, as a rule; it is learned again in two steps
            found = self._rounds[session] = _Round(now)
        elif found.went is not None:
            away = now - found.went
            found.away = away if found.away is None else found.away + _SMOOTHING * (away - found.away)
            found.went = None
        found.came = now

    def went(self, sessions: Collection[str], now: float, seconds: float | None = None) -> None:
        """Their steps have been computed; ``seconds``: how long that took, if nothing else was in the pass."""
        for session in sessions:
            if session in self._rounds:
                self._rounds[session].went = now
        if seconds is not None:
            before = self._pass_seconds or seconds
            self._pass_seconds = before + _SMOOTHING * (seconds - before)

    def due(self, session: str) -> float:
        """When a session that is away should be back; infinite if that is not known."""
        found = self._rounds.get(session)
        return math.inf if found is None else found.due

    def late(self, session: str) -> float:
        """Until when a session that is away is expected back; infinite if that is not known."""
        found = self._rounds.get(session)
        return math.inf if found is None or found.away is None else found.late

    def forget(self, session: str) -> None:
        """It has ended."""
        self._rounds.pop(session, None)

    def active(self, now: float) -> int:
        """How many sessions have had a step lately, or are expected back."""
        return sum(now - one.came < ACTIVE_SECONDS or now < one.late for one in self._rounds.values())

    def until(self, here: Collection[str], begin: float, now: float) -> float:
        """When the steps of the sessions that are here should be run; at once if that is not later than now.

        Parameters
        ----------
        here
            Sessions of which something waits: a decode step of one of them at least.
        begin
            When the compute thread had nothing else to do.
        now
            By the clock of all these.
        """
        for name in [name for name, one in self._rounds.items() if now - one.came > FORGET_SECONDS]:
            del self._rounds[name]
        others = [one for name, one in self._rounds.items() if name not in here]
        expected = [one for one in others if now < one.late]
        limit = begin + GATHERS_FOR_THOSE_EXPECTED * self.seconds
        soon = sorted((one for one in expected if one.due <= limit), key=lambda one: one.due)
        missing = self._group(here, expected) - len(here)
        if missing > 0 and soon:
            return max(one.late for one in soon[:missing])
        unknown = any(one not in expected and now - one.came < ACTIVE_SECONDS for one in others)
        return begin + self.seconds if unknown else now

    def _group(self, here: Collection[str], expected: Collection[_Round]) -> int:
        """How many sessions should be in a pass.

        All of them where they are back soon; where they are away for as long as a pass takes, or longer, in as many
        groups as have their turn meanwhile: one group would leave us idle while the servers behind us have it.
        """
        circle = [*(self._rounds[name] for name in here if name in self._rounds), *expected]
        away = [one.away for one in circle if one.away is not None]
        groups = 1
        if away and self._pass_seconds:
            groups += int(sum(away) / len(away) / self._pass_seconds)
        return math.ceil(len(circle) / groups)
