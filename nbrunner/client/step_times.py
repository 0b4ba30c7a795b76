"""Where the time of a token goes: this process, the way, and each server's queue and compute. Pure arithmetic.

A server knows only its own clock: it says how long a step waited, computed and was there in all (`HopTiming`). What
is left of the time the client measured around the step was on the way. It is shared out among the ways in
proportion to what the directory's measured round trips lead to expect of each, evenly where nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.steps import HopTiming

HopBlocks = tuple[str, int, int]


class StepTime(NamedTuple):
    """One step as the client saw it: `time.perf_counter` before and after, and what the servers said."""

    began: float
    ended: float
    timings: Sequence[HopTiming]


@dataclass(frozen=True, slots=True)
class HopTime:
    """One server's share of a token, in seconds.

    Attributes
    ----------
    wire
        On the way to it: estimated, see the module.
    queue, compute
        Waiting for its device and computing, as it says.
    handling
        The rest of its time: taking the message apart and handing the result on.
    """

    peer: str
    start: int
    end: int
    wire: float
    queue: float
    compute: float
    handling: float


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Where one token's time went, in seconds.

    Attributes
    ----------
    index
        Which token of the generation, from 0.
    before
        In this process before the step: preparation and embedding.
    hops
        The servers, in order.
    back
        On the way back to this process: estimated, as `HopTime.wire`.
    after
        In this process after the step: norm, head, choice of the token, its text.
    parts
        Messages each server got; with several (a long prompt), servers work at the same time, and the sum of what
        they say is more than what it took.
    replaced
        A server was lost during this step: what is not a server's own time went into finding another.
    """

    index: int
    before: float
    hops: tuple[HopTime, ...]
    back: float
    after: float
    parts: int = 1
    replaced: bool = False

    @property
    def client(self) -> float:
        """Seconds in this process."""
        return self.before + self.after

    @property
    def wire(self) -> float:
        """Seconds on the way, all ways together."""
        return self.back + sum(hop.wire for hop in self.hops)

    @property
    def total(self) -> float:
        """Seconds of all of it, one after the other."""
        return self.client + self.wire + sum(hop.queue + hop.compute + hop.handling for hop in self.hops)


def token_time(
    index: int,
    step: StepTime,
    chain: Sequence[HopBlocks],
    *,
    asked: float,
    emitted: float,
    ways: Sequence[float] | None = None,
    replaced: bool = False,
) -> TokenTime:
    """What one token's time was made of.

    Parameters
    ----------
    step
        The step that computed it.
    chain
        Who ran it, in order.
    asked, emitted
        `time.perf_counter` when the token before it was there (or the request was made), and when this one was.
    ways
        Expected seconds of each way: to the first server, from each to the next, and back; None if not known.
    """
    said: list[tuple[float, float, float]] = []
    parts = 1
    for peer, _, _ in chain:
        own = [timing for timing in step.timings if timing.peer == peer]
        parts = max(parts, len(own))
        said.append((sum(one.queue for one in own), sum(one.compute for one in own), sum(one.total for one in own)))
    on_servers = sum(max(total, queue + compute) for queue, compute, total in said)
    on_the_way = max(0.0, step.ended - step.began - on_servers)
    shares = _shares(ways, len(chain) + 1)
    hops = tuple(
        HopTime(peer, start, end, on_the_way * share, queue, compute, max(0.0, total - queue - compute))
        for (peer, start, end), (queue, compute, total), share in zip(chain, said, shares, strict=False)
    )
    return TokenTime(
        index=index,
        before=max(0.0, step.began - asked),
        hops=hops,
        back=on_the_way * shares[-1],
        after=max(0.0, emitted - step.ended),
        parts=parts,
        replaced=replaced,
    )


def typical(times: Sequence[TokenTime]) -> TokenTime | None:
    """The token to show when none is named: of median time among those after the first, without a replacement."""
    later = [one for one in times if one.index > 0 and not one.replaced] or list(times)
    return sorted(later, key=lambda one: one.total)[len(later) // 2] if later else None


def costs_most(time: TokenTime) -> str:
    """One sentence: what costs most of a token, and what would help. Empty without servers."""
    if not time.hops or time.total <= 0:
        return ""
    queue, compute = sum(hop.queue for hop in time.hops), sum(hop.compute for hop in time.hops)
    handling = sum(hop.handling for hop in time.hops)
    kinds = {"wire": time.wire, "client": time.client, "queue": queue, "compute": compute, "handling": handling}
    most = max(kinds, key=lambda kind: kinds[kind])
    figure = f"{kinds[most] * 1e3:.1f} of {time.total * 1e3:.1f} ms a token"
    count = len(time.hops)
    if time.replaced:
        return f"Finding another server cost most of this token: {figure}; a spare for each block shortens that."
    if most == "wire":
        fewer = "servers nearer to you" if count == 1 else "fewer servers with more blocks each, or nearer ones,"
        return f"The way costs most: {figure}; {fewer} would help."
    if most == "client":
        return f"This process costs most: {figure}; less work beside it, or a faster machine here, would help."
    worst = max(time.hops, key=lambda hop: {"queue": hop.queue, "compute": hop.compute}.get(most, hop.handling))
    where = f"{short_peer(worst.peer)} [{worst.start}, {worst.end})"
    if most == "queue":
        return f"Waiting costs most: {figure}, mainly at {where}; another server with these blocks would help."
    if most == "handling":
        return f"Handing on costs most: {figure}, mainly at {where}; less work beside that server would help."
    return f"Computing costs most: {figure}, mainly at {where}; a faster machine for these blocks would help."


def _shares(ways: Sequence[float] | None, count: int) -> list[float]:
    if ways is None or len(ways) != count or sum(ways) <= 0:
        return [1 / count] * count
    return [way / sum(ways) for way in ways]
