"""When those who teach together average, with whom, and how much each counts: decisions without a network.

Everyone tells everyone how far it is. The peer with the smallest PeerID coordinates, though only by saying when:
a round begins when all who train wait for it, or when the first has waited long enough. Whoever has done its steps
calls the others, and they join at their next step, so that nobody waits longer than one step of the slowest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nbrunner.protocol.together import TeacherState

WEIGHT_RATIO = 10.0
"""No peer counts for more than this many times the (lower) median: samples are claimed, not proved."""

_SMALLEST_WEIGHT = 1e-3  # of the largest: a group in which only those of weight 0 are left has no average

LEAST_CLAIM = 1e-6
"""Less is taken for nothing: a sample counts 1, and the products of the smallest floats are 0."""


@dataclass(frozen=True)
class View:
    """One who takes part, as we see it now (ourselves included).

    Attributes
    ----------
    since
        Monotonic seconds: when it began to wait; for one that has finished, when it did.
    overdue
        It was waited for in vain and has not been back: it is not waited for again.
    """

    peer: str
    state: TeacherState
    lineage: bytes
    turn: int = 0
    steps: int = 0
    fresh: int = 0
    round: int = 0
    since: float = 0.0
    finished: bool = False
    overdue: bool = False


@dataclass(frozen=True)
class Due:
    """What a coordinator does next: begin with ``group``, or look again in ``again`` seconds (None: on news only).

    ``absent``: those who were waited for in vain. ``last``: nobody trains any more.
    """

    group: list[View] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    again: float | None = None
    last: bool = False


def due(views: Iterable[View], *, now: float, patience: float, farewell: float) -> Due:
    """Whether a round begins.

    Parameters
    ----------
    views
        Of one lineage.
    patience
        Seconds that one who called waits for those who train.
    farewell
        Seconds that those who have finished wait for those who have not.
    """
    views = list(views)
    waiting = [one for one in views if one.state == "waiting"]
    if not waiting:
        return Due()
    callers = [one for one in waiting if not one.finished]
    training = [one for one in views if one.state in ("training", "averaging")]
    expected = [one for one in training if not one.overdue] if callers else training
    deadline = min(one.since for one in callers or waiting) + (patience if callers else farewell)
    if expected and now < deadline:
        return Due(again=deadline - now)
    return Due(waiting, [one.peer for one in expected], last=not callers and not training)


def coordinator(peers: Iterable[str], distrusted: Iterable[str] = ()) -> str:
    """Who says when; the same for all who see the same peers."""
    out = set(distrusted)
    return min((peer for peer in peers if peer not in out), default="")


def weights(fresh: Sequence[int]) -> list[float]:
    """How much each counts: its samples since its last round, within `WEIGHT_RATIO`; alike if there are none."""
    positive = [one for one in fresh if one > 0]
    if not positive:
        return [1.0] * len(fresh)
    return capped([float(one) for one in fresh], WEIGHT_RATIO * statistics.median_low(positive))


def capped(claimed: Sequence[float], most: float | None = None) -> list[float]:
    """Weights as they are used, whoever they came from."""
    if most is None:
        positive = [one for one in claimed if one >= LEAST_CLAIM]
        most = WEIGHT_RATIO * statistics.median_low(positive) if positive else 0.0
    used = [min(one, most) for one in claimed]
    least = max(used, default=0.0) * _SMALLEST_WEIGHT or 1.0
    return [max(one, least) for one in used]


def is_called(views: Iterable[View]) -> bool:
    """Whether somebody who still trains waits for the others."""
    return any(one.state == "waiting" and not one.finished for one in views)


def new_lineage() -> bytes:
    """Of parameters that come from nobody else: when, in milliseconds, and eight random bytes."""
    return int(time.time() * 1000).to_bytes(8, "big") + os.urandom(8)


def better_lineage(own: View, others: Iterable[View]) -> bytes | None:
    """The lineage to go over to, if there is a better one than ours.

    Parameters of different beginnings cannot be averaged: the A and B of two adapters multiply, and the mean of
    products is not the product of means. Better is the one that more peers have; then more rounds; then any steps
    at all; then the older one.
    """
    everyone = [own, *others]
    size = Counter(one.lineage for one in everyone)
    rounds: dict[bytes, int] = {}
    taught: dict[bytes, bool] = {}
    for one in everyone:
        rounds[one.lineage] = max(rounds.get(one.lineage, 0), one.round)
        taught[one.lineage] = taught.get(one.lineage, False) or one.steps > 0
    best = min(size, key=lambda lineage: (-size[lineage], -rounds[lineage], not taught[lineage], lineage))
    return best if best != own.lineage else None
