"""The journal: what a client knows about one session, and what must be sent so that a lost server does not matter.

A pure state machine over positions; it holds no tensors (`nbrunner.client.history` does) and does no I/O. The
session asks it three things: what to send (`segments`), what is missing (`gaps`), and it tells it what happened
(`begin`, `commit`, `abort`, `drop`, `place`). The rules of ``docs/protocol.md`` make the answer short:

* every hop that has been part of a finished step holds exactly the session's tokens;
* a hop that is new holds none, and its neighbour towards the client fills it;
* steps are numbered, so that a hop which has already taken one only forwards what comes of it.

*For every schedule of losses the tokens are those of the run without any*: a property test drives this class
against a model of the servers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from nbrunner.errors import SessionError
from nbrunner.protocol.steps import CacheOp, Hop


@dataclass(frozen=True)
class ChainHop:
    """One server of a session's chain.

    Attributes
    ----------
    fresh
        It joined after the last finished step: it holds nothing that can be relied on.
    """

    peer: str
    session: str
    start: int
    end: int
    fresh: bool = True


@dataclass(frozen=True)
class PendingStep:
    """A step under way: tokens ``[begin, end)`` after ``ops``. ``held`` is what established hops hold by then."""

    number: int
    ops: tuple[CacheOp, ...]
    begin: int
    end: int
    held: int


@dataclass(frozen=True)
class Segment:
    """Consecutive hops that push to one another; between segments the client carries the hidden states.

    ``source_from`` is the position from which the first hop must be sent its input, ``reply_from`` that from which
    the client wants the last hop's output.
    """

    hops: tuple[Hop, ...]
    source_from: int
    reply_from: int

    @property
    def positions_from(self) -> int:
        """The first position any hop of the segment computes."""
        return min(hop.position for hop in self.hops)


@dataclass
class Journal:
    """Positions and hops of one session over blocks ``[start, end)``.

    Attributes
    ----------
    length
        Tokens of finished steps.
    croppable
        Whether all hops can roll back by cropping; else a roll-back replays the session from its beginning.
    """

    start: int
    end: int
    length: int = 0
    step: int = 0
    hops: list[ChainHop] = field(default_factory=list)
    croppable: bool = True
    pending: PendingStep | None = None
    _repair: CacheOp | None = None
    _before: tuple[int, bool] | None = None

    # -- steps ---------------------------------------------------------------------------------------------------

    def begin(self, tokens: int, ops: Sequence[CacheOp] = ()) -> PendingStep:
        """Start a step of ``tokens`` new tokens after ``ops``."""
        if self.pending is not None:
            raise SessionError("a session runs one step at a time; wait for the one under way")
        after = length_after(self.length, ops)
        everything_again = (self._repair is not None and self._repair.kind == "reset") or (
            not self.croppable and (self._repair is not None or any(op.kind == "crop" for op in ops))
        )
        if everything_again:
            sent: tuple[CacheOp, ...] = (CacheOp("reset"),)
            held = 0
        else:
            sent = (*((self._repair,) if self._repair else ()), *ops)
            held = after
        self.pending = PendingStep(self.step + 1, sent, after, after + tokens, held)
        return self.pending

    def commit(self) -> None:
        """The step is finished: every hop holds its tokens."""
        step = self._current()
        self._before = (self.length, self._can_crop_away(step))
        self.length, self.step, self.pending, self._repair = step.end, step.number, None, None
        self.hops = [replace(hop, fresh=False) for hop in self.hops]

    def abort(self) -> list[ChainHop]:
        """Give the step up; what hops have of it will be undone with the next one.

        Tokens they may have taken can be cropped away. Ops they may have applied cannot be undone: after those
        the session is replayed from its beginning.

        Returns
        -------
        list of ChainHop
            Hops that joined during the step. What they hold is unknown, so they are dropped; close them.
        """
        step = self._current()
        self.step, self.pending = step.number, None
        self._repair = CacheOp("crop", self.length) if self._can_crop_away(step) else CacheOp("reset")
        dropped = [hop for hop in self.hops if hop.fresh]
        self.hops = [hop for hop in self.hops if not hop.fresh]
        return dropped

    def undo(self) -> None:
        """Take the last finished step back; what the hops have of it is undone with the next one, as in `abort`."""
        if self.pending is not None or self._before is None:
            raise SessionError("there is no finished step to take back")
        (self.length, croppable), self._before = self._before, None
        self._repair = CacheOp("crop", self.length) if croppable and self.length else CacheOp("reset")

    def _can_crop_away(self, step: PendingStep) -> bool:
        """Whether hops that took the step can go back by cropping: not if it applied ops to what was there."""
        return step.ops in ((), (self._repair,)) and (self._repair is None or self._repair.kind != "reset")

    # -- the chain -----------------------------------------------------------------------------------------------

    def gaps(self) -> list[tuple[int, int]]:
        """Ranges of blocks that no hop runs."""
        found, block = [], self.start
        for hop in self.hops:
            if hop.start > block:
                found.append((block, hop.start))
            block = hop.end
        if block < self.end:
            found.append((block, self.end))
        return found

    def place(self, hop: ChainHop) -> None:
        """A new hop; it must fill a gap, or a part of one."""
        if not any(start <= hop.start < hop.end <= end for start, end in self.gaps()):
            raise SessionError(f"blocks [{hop.start}, {hop.end}) are not missing from this session")
        self.hops = sorted([*self.hops, hop], key=lambda one: one.start)

    def drop(self, session: str) -> ChainHop | None:
        """A hop is lost (by its session id). None if it already was."""
        lost = next((hop for hop in self.hops if hop.session == session), None)
        self.hops = [hop for hop in self.hops if hop.session != session]
        return lost

    def upstream_of(self, session: str, broken: Collection[tuple[str, str]] = ()) -> str | None:
        """The peer that pushes to this hop, None if the client does."""
        previous: ChainHop | None = None
        for hop in self.hops:
            if hop.session == session:
                return previous.peer if previous is not None and not _cut(previous, hop, broken) else None
            previous = hop
        return None

    def segments(self, broken: Collection[tuple[str, str]] = ()) -> list[Segment]:
        """How the pending step travels.

        Parameters
        ----------
        broken
            Pairs (from, to) of peers that cannot reach each other.
        """
        if self.gaps():
            raise SessionError(f"the chain has gaps: {self.gaps()}")
        step = self._current()
        groups: list[list[ChainHop]] = []
        for hop in self.hops:
            if groups and not _cut(groups[-1][-1], hop, broken):
                groups[-1].append(hop)
            else:
                groups.append([hop])
        routes = [
            tuple(
                Hop(hop.peer, hop.session, hop.start, hop.end, 0 if hop.fresh else step.held, hop.fresh)
                for hop in group
            )
            for group in groups
        ]
        ends = [route[0].position for route in routes[1:]] + [step.begin]
        return [Segment(route, route[0].position, end) for route, end in zip(routes, ends, strict=True)]

    def _current(self) -> PendingStep:
        if self.pending is None:
            raise SessionError("no step is under way")
        return self.pending


def length_after(length: int, ops: Sequence[CacheOp]) -> int:
    """Tokens held once ``ops`` are applied to a session of ``length`` tokens."""
    for op in ops:
        if op.kind == "crop":
            length = min(length, op.count)
        elif op.kind == "reset":
            length = 0
    return length


def _cut(a: ChainHop, b: ChainHop, broken: Collection[tuple[str, str]]) -> bool:
    # libp2p does not dial itself: two spans of one server are joined by the client
    return a.peer == b.peer or (a.peer, b.peer) in broken
