"""Choosing the chain: which servers run which blocks. Pure functions of a view.

Latency mode finds the chain with the least seconds per decode step. A chain walks over states (server, block
boundary). With r(a, b) the measured round trip:

=============================  ==================================================================================
entering a server              half of r(who sends to it), its queue, a fixed overhead, and a large penalty if its
                               caches have no room
each block on it               its step time / its blocks: a part of a span may be used
leaving the last server        half of r(client, server)
=============================  ==================================================================================

From server to server, r is what the server announced; where it has not measured, it is guessed from the client's
own round trips to both. The graph has no cycles (boundaries only grow), so one pass over the boundaries is
Dijkstra's result.

Throughput mode, for training, takes a server at random at each boundary, weighted by measured speed, so that many
clients together load each server by what it can do.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nbrunner.errors import MissingBlocksError, UserInputError
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.view import ServerEntry, SwarmView

Mode = Literal["latency", "throughput"]

HOP_SECONDS = 0.002  # of any hop, beside network and compute: frames, two daemons, scheduling (measured 1-2 ms)
UNKNOWN_ROUND_TRIP = 0.1  # between continents less, between friends at home more
NO_CACHE_SECONDS = 10.0  # using a server without room means refusal and a second choice
NEAR_EQUAL = 0.05  # chains that differ by less are chosen among at random: measurements are not better than that


class PlannedHop(NamedTuple):
    """One server of a planned chain and the blocks ``[start, end)`` it is to run."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True)
class HopCost:
    """What one hop adds to a decode step, in seconds: the way to it, waiting, computing, and a lack of cache."""

    hop: PlannedHop
    network: float
    queue: float
    compute: float
    penalty: float


@dataclass(frozen=True)
class Explanation:
    """Why a chain is what it is.

    Attributes
    ----------
    hops
        The chain with the cost of each part; empty if there is none.
    back
        Seconds from the last server to the client.
    unused
        PeerID → why it is not in the chain, for every server of the model.
    missing
        Ranges of blocks that nobody usable serves.
    """

    hops: list[HopCost]
    back: float
    unused: dict[str, str]
    missing: list[tuple[int, int]]

    @property
    def seconds(self) -> float:
        """Expected seconds of one decode step, without the client's own part."""
        return self.back + sum(cost.network + cost.queue + cost.compute + cost.penalty for cost in self.hops)


def plan_chain(
    view: SwarmView,
    *,
    model: str,
    start: int,
    end: int,
    mode: Mode = "latency",
    allowed: Collection[str] | None = None,
    blocked: Collection[str] | None = None,
    exclude: Collection[str] = frozenset(),
    adapter: str = "",
    cache_tokens: int = 0,
    pending: Mapping[str, int] | None = None,
    rng: random.Random | None = None,
) -> list[PlannedHop]:
    """Servers for blocks ``[start, end)``, in order.

    Parameters
    ----------
    view
        What is known.
    model
        Uid of the checkpoint.
    mode
        ``latency`` for generating, ``throughput`` for training.
    allowed, blocked
        PeerIDs the user allows (None: all) and forbids.
    exclude
        PeerIDs not to use this time.
    adapter
        Uid of an adapter that they must serve.
    cache_tokens
        Tokens times rows that the session will hold; servers without room are the last choice.
    pending
        PeerID → parts of the same batch that it is given already: in throughput mode those with the least for their
        speed are taken.
    rng
        For choices among near-equals; the same seed and view give the same chain.

    Raises
    ------
    MissingBlocksError
        Naming exactly the blocks that no usable server has.
    UserInputError
        An empty or negative range.
    """
    if not 0 <= start < end:
        raise UserInputError(f"blocks [{start}, {end}) are not a range")
    usable = _usable(view, model, start, end, allowed, blocked, exclude)
    if adapter:
        usable = {peer: entry for peer, entry in usable.items() if adapter in entry.record.adapters}
    missing = _uncovered(((entry.record.start, entry.record.end) for entry in usable.values()), start, end)
    if missing:
        raise _missing_error(view, model, missing, allowed, blocked, exclude, adapter)
    rng = rng or random.Random()  # noqa: S311 - spreading load, not secrets
    if mode == "throughput":
        return _spread(usable, start, end, pending or {}, rng)
    costs = _Costs(view, usable, cache_tokens, rng)
    plan = _cheapest(costs, start, end, relay=False) or _cheapest(costs, start, end, relay=True)
    if plan is None:
        raise _missing_error(view, model, [(start, end)], allowed, blocked, exclude, adapter)
    return plan


def explain(
    view: SwarmView,
    *,
    model: str,
    start: int,
    end: int,
    allowed: Collection[str] | None = None,
    blocked: Collection[str] | None = None,
    exclude: Collection[str] = frozenset(),
    cache_tokens: int = 0,
    chain: Sequence[PlannedHop] | None = None,
) -> Explanation:
    """Why the next chain would be what it is, or the costs of a given ``chain``; parameters as `plan_chain`."""
    usable = _usable(view, model, start, end, allowed, blocked, exclude)
    missing = _uncovered(((entry.record.start, entry.record.end) for entry in usable.values()), start, end)
    costs = _Costs(view, usable, cache_tokens, None)
    hops = list(chain) if chain is not None else []
    if chain is None and not missing:
        hops = _cheapest(costs, start, end, relay=False) or _cheapest(costs, start, end, relay=True) or []
    explained: list[HopCost] = []
    for before, hop in zip([None, *hops], hops, strict=False):
        if hop.peer in usable:
            explained.append(costs.explain(before.peer if before else None, hop))
    unused = {}
    for peer, entry in sorted([*view.servers.items(), *view.failed.items()]):
        if peer in {hop.peer for hop in hops}:
            continue
        unused[peer] = _why_not(view, peer, entry, model, start, end, allowed, blocked, exclude)
    back = costs.link(hops[-1].peer, None) if explained and hops[-1].peer in usable else 0.0
    return Explanation(explained, back, unused, missing)


class _Costs:
    """Seconds of everything in a chain. With an rng, each server's are stretched by up to `NEAR_EQUAL`.

    A chain that is cheapest by stretched costs is at most that much dearer by true ones, so the choice is random
    exactly among near-equals and never worse.
    """

    def __init__(
        self, view: SwarmView, usable: dict[str, ServerEntry], cache_tokens: int, rng: random.Random | None
    ) -> None:
        self.view = view
        self.usable = usable
        self.peers = sorted(usable)
        self._cache_tokens = cache_tokens
        self._stretch = {peer: 1.0 + (rng.random() * NEAR_EQUAL if rng else 0.0) for peer in self.peers}

    def link(self, near: str | None, far: str | None) -> float:
        """One way from one server to the next; None stands for the client."""
        if near is None or far is None:
            return self._own_round_trip(near or far) / 2
        if self.relayed(near, far):
            return (self._own_round_trip(near) + self._own_round_trip(far)) / 2 + HOP_SECONDS
        measured = self.usable[near].record.round_trips.get(far)
        if measured is None:
            measured = (self._own_round_trip(near) + self._own_round_trip(far)) / 2
        return measured / 2

    def relayed(self, near: str, far: str) -> bool:
        """Whether the client has to carry the hidden states between the two."""
        return (near, far) in self.view.bad_links

    def _own_round_trip(self, peer: str | None) -> float:
        entry = self.usable.get(peer) if peer is not None else None
        return UNKNOWN_ROUND_TRIP if entry is None or entry.round_trip is None else entry.round_trip

    def block(self, peer: str) -> float:
        record = self.usable[peer].record
        return record.step_seconds / (record.end - record.start)

    def penalty(self, peer: str, start: int, end: int) -> float:
        """For entering at block ``start``: the caches may have to hold everything up to the span's end."""
        record = self.usable[peer].record
        share = (min(record.end, end) - start) / (record.end - record.start)
        needed = self._cache_tokens * record.cache_bytes_per_token * share
        return NO_CACHE_SECONDS if needed > record.cache_bytes_left else 0.0

    def enter(self, near: str | None, peer: str, start: int, end: int) -> float:
        cost = self.link(near, peer) + HOP_SECONDS + self.usable[peer].record.queue_seconds
        return cost * self._stretch[peer] + self.penalty(peer, start, end)

    def run(self, peer: str) -> float:
        return self.block(peer) * self._stretch[peer]

    def explain(self, near: str | None, hop: PlannedHop) -> HopCost:
        record = self.usable[hop.peer].record
        return HopCost(
            hop,
            network=self.link(near, hop.peer) + HOP_SECONDS,
            queue=record.queue_seconds,
            compute=self.block(hop.peer) * (hop.end - hop.start),
            penalty=self.penalty(hop.peer, hop.start, hop.end),
        )


class _State(NamedTuple):
    """The best way known to a server at a boundary: total seconds, and the hops so far, the last one open."""

    seconds: float
    peer: str
    entered: int
    before: _State | None


def _cheapest(costs: _Costs, start: int, end: int, *, relay: bool) -> list[PlannedHop] | None:
    """The chain of least cost; None if bad links leave none and ``relay`` (through the client) is not allowed."""
    running: dict[str, _State] = {}  # servers that have just run the block before this boundary
    for boundary in range(start, end):
        entering: dict[str, _State] = {}
        for peer in costs.peers:
            record = costs.usable[peer].record
            if not record.start <= boundary < record.end:
                continue
            if boundary == start:
                entering[peer] = _State(costs.enter(None, peer, boundary, end), peer, boundary, None)
                continue
            ways = [
                _State(state.seconds + costs.enter(other, peer, boundary, end), peer, boundary, state)
                for other, state in running.items()
                if other != peer and (relay or not costs.relayed(other, peer))
            ]
            if ways:
                entering[peer] = min(ways, key=lambda way: way.seconds)
        after: dict[str, _State] = {}
        for peer in costs.peers:
            record = costs.usable[peer].record
            if not record.start <= boundary < record.end:
                continue
            ways = [way for way in (running.get(peer), entering.get(peer)) if way is not None]
            if ways:
                best = min(ways, key=lambda way: way.seconds)
                after[peer] = best._replace(seconds=best.seconds + costs.run(peer))
        running = after
    if not running:
        return None
    state: _State | None = min(running.values(), key=lambda way: way.seconds + costs.link(way.peer, None))
    plan: list[PlannedHop] = []
    until = end
    while state is not None:
        plan.append(PlannedHop(state.peer, state.entered, until))
        until, state = state.entered, state.before
    return plan[::-1]


def _spread(
    usable: dict[str, ServerEntry], start: int, end: int, pending: Mapping[str, int], rng: random.Random
) -> list[PlannedHop]:
    """A random chain, each server taken in proportion to the blocks × tokens per second it can do.

    Of those that have something to do already, only the ones are taken that would be through with one more first.
    """
    known = [_block_rate(entry.record) for entry in usable.values() if entry.record.prefill_tokens_per_second > 0]
    typical = statistics.median(known) if known else 1.0
    plan: list[PlannedHop] = []
    position = start
    while position < end:
        # A server is run to the end of its span, so the next one is another.
        here = [peer for peer in sorted(usable) if usable[peer].record.start <= position < usable[peer].record.end]
        weights = [_block_rate(usable[peer].record) or typical for peer in here]
        if any(pending.get(peer) for peer in here):
            seconds = [(1 + pending.get(peer, 0)) / weight for peer, weight in zip(here, weights, strict=True)]
            near = min(seconds) * (1 + NEAR_EQUAL)
            here = [peer for peer, one in zip(here, seconds, strict=True) if one <= near]
            weights = [1.0] * len(here)
        peer = rng.choices(here, weights)[0]
        stop = min(usable[peer].record.end, end)
        plan.append(PlannedHop(peer, position, stop))
        position = stop
    return plan


def _block_rate(record: ServerRecord) -> float:
    return record.prefill_tokens_per_second * (record.end - record.start) / (1 + record.sessions)


def _usable(
    view: SwarmView,
    model: str,
    start: int,
    end: int,
    allowed: Collection[str] | None,
    blocked: Collection[str] | None,
    exclude: Collection[str],
) -> dict[str, ServerEntry]:
    return {
        peer: entry
        for peer, entry in view.servers.items()
        if not _forbidden(peer, allowed, blocked)
        and peer not in exclude
        and entry.record.model == model
        and entry.record.state == "online"
        and entry.record.start < end
        and entry.record.end > start
    }


def _forbidden(peer: str, allowed: Collection[str] | None, blocked: Collection[str] | None) -> bool:
    return (allowed is not None and peer not in allowed) or (blocked is not None and peer in blocked)


def _uncovered(spans: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts of ``[start, end)`` in none of the spans."""
    missing: list[tuple[int, int]] = []
    position = start
    for span_start, span_end in sorted(spans):
        if span_start > position:
            missing.append((position, min(span_start, end)))
        position = max(position, span_end)
        if position >= end:
            break
    if position < end:
        missing.append((position, end))
    return [(low, high) for low, high in missing if low < high]


def _why_not(
    view: SwarmView,
    peer: str,
    entry: ServerEntry,
    model: str,
    start: int,
    end: int,
    allowed: Collection[str] | None,
    blocked: Collection[str] | None,
    exclude: Collection[str],
) -> str:
    record = entry.record
    if peer in view.failed:
        return f"failed: {entry.failure}"
    if record.model != model:
        return f"serves {record.model}"
    if record.end <= start or record.start >= end:
        return f"serves other blocks: [{record.start}, {record.end})"
    if record.state != "online":
        return f"is {record.state}"
    if _forbidden(peer, allowed, blocked):
        return "not among the allowed peers" if allowed is not None and peer not in allowed else "blocked by you"
    if peer in exclude:
        return "left out this time"
    return "a chain without it is faster"


def _missing_error(
    view: SwarmView,
    model: str,
    missing: list[tuple[int, int]],
    allowed: Collection[str] | None,
    blocked: Collection[str] | None,
    exclude: Collection[str],
    adapter: str,
) -> MissingBlocksError:
    """With what is known of servers that hold the blocks but cannot be used."""
    tried: list[str] = []
    revisions: set[str] = set()
    name = model.partition("@")[0]
    for peer, entry in sorted([*view.servers.items(), *view.failed.items()]):
        record = entry.record
        touches = any(record.start < high and record.end > low for low, high in missing)
        if record.model != model:
            if record.model.partition("@")[0] == name and touches:
                revisions.add(record.model)
        elif touches:
            low, high = missing[0]
            reason = _why_not(view, peer, entry, model, low, high, allowed, blocked, exclude)
            if adapter and peer in view.servers and adapter not in record.adapters:
                reason = f"does not serve the adapter {adapter}"
            tried.append(f"{short_peer(peer)} [{record.start}, {record.end}): {reason}")
    tried += [f"{other} is served, which is another revision" for other in sorted(revisions)]
    return MissingBlocksError(missing, model=model, tried=tried[:16])
