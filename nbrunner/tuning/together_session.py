"""One client's part in teaching together: its state, the rounds it goes through, and the account of the others.

Lives in a process of its own (`nbrunner.tuning.together_child`), apart from the one that trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nbrunner.errors import BadPeerDataError, PeerError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.together import BeginRound, TeacherState, Teaching, TeachingProgress
from nbrunner.swarm.node import Node
from nbrunner.tuning.together_averaging import Averaged, Averaging, Group, movement, root_mean_square
from nbrunner.tuning.together_channel import Outcome, Participant, Settings
from nbrunner.tuning.together_mesh import Member, Mesh
from nbrunner.tuning.together_rounds import (
    View,
    better_lineage,
    capped,
    coordinator,
    due,
    is_called,
    new_lineage,
    weights,
)

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0  # for the coordinator's word to arrive after the time is over
_DISTRUST_SECONDS = 60.0  # for a coordinator that said nothing in time, and for who sent what it must not send
_LOST_SECONDS = 20.0  # for who did not give back its share of the average
_SHRINK = 0.9  # per round, of the largest step seen: learning rates fall slowly
_UNMOVED = 1e-3  # by how much others may differ from who has not trained at all, beside its own size


@dataclass
class Own:
    """What we say of ourselves."""

    state: TeacherState = "training"
    turn: int = 0
    steps: int = 0
    samples: int = 0
    fresh: int = 0
    round: int = 0
    lineage: bytes = b""
    finished: bool = False
    began: float = 0.0
    overdue: bool = False
    rounds: int = 0
    share: float = 0.0


class TeachingSession:
    """Joins those who teach the same, and averages with them.

    Parameters
    ----------
    vector
        [n] float32: our parameters, in the order of the teaching.
    own
        Where we stand: after a restart, where we stood.
    on_call
        Called with whether others wait for us.
    """

    def __init__(
        self,
        node: Node,
        teaching: Teaching,
        vector: torch.Tensor,
        settings: Settings,
        *,
        own: Own | None = None,
        on_call: Callable[[bool], None] = lambda called: None,
    ) -> None:
        self.own = own or Own()
        self.own.lineage = self.own.lineage or new_lineage()
        self.base = vector  # as of the last round: what joiners get, and what movement is measured from
        self._base_steps = self.own.steps
        self._node = node
        self._teaching = teaching
        self._settings = settings
        self._sizes = [one.size for one in teaching.parameters]
        self._scale = 0.0
        self._begun: asyncio.Future[BeginRound] | None = None
        self._distrusted: dict[str, float] = {}
        self._refused: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._on_call = on_call
        self._called = False
        self._went_over = False  # to the parameters of others, and the trainer does not know yet
        self._task: asyncio.Task[None] | None = None
        self._mesh = Mesh(
            node,
            teaching,
            name=settings.member,
            reachable=settings.reachable,
            progress=self._progress,
            state=lambda: (self.base, self.own.lineage, self.own.round),
            on_change=self._changed.set,
            on_begin=self._on_begin,
        )
        self._averaging = Averaging(node.p2p, f"nbrunner/{teaching.digest.hex()[:32]}", self._mesh.admits)

    @classmethod
    async def create(
        cls,
        invite: Invite,
        teaching: Teaching,
        vector: torch.Tensor,
        settings: Settings,
        *,
        own: Own | None = None,
        on_call: Callable[[bool], None] = lambda called: None,
    ) -> TeachingSession:
        """Join the swarm as a node of our own, and those who teach there.

        Raises
        ------
        NBRunnerError
            See `Node.create` and `Mesh.open`.
        """
        node = await Node.create(invite=invite, listen=settings.listen, client_mode=not settings.reachable)
        try:
            session = cls(node, teaching, vector, settings, own=own, on_call=on_call)
            await session.open()
        except BaseException:
            await node.close()
            raise
        return session

    async def open(self) -> None:
        """Join; afterwards `base` is what we start from, ours or that of those who were here before."""
        await self._averaging.open()
        await self._mesh.open()
        await self._go_over()
        await self._mesh.say()
        self._task = asyncio.create_task(self._run(), name="together")

    @property
    def peer_id(self) -> str:
        return self._node.peer_id

    async def wait_lost(self) -> str:
        """See `Node.wait_lost`."""
        return await self._node.wait_lost()

    async def close(self) -> None:
        """Leave. The others hear of it at once."""
        self.own.state = "left"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._mesh.close()
        await self._averaging.close()
        await self._node.close()

    # -- what the trainer does ------------------------------------------------------------------------------------

    def note(self, *, steps: int, samples: int, fresh: int, paused: bool) -> None:
        """How far training is."""
        own = self.own
        own.steps, own.samples, own.fresh = steps, samples, fresh
        if own.state in ("training", "paused"):
            state: TeacherState = "paused" if paused else "training"
            if state != own.state:
                own.state = state
                self._announce()

    async def average(self, vector: torch.Tensor, lineage: bytes) -> tuple[Outcome, torch.Tensor]:
        """One round: wait for the others, at most `Settings.patience` seconds, and average with those who came.

        Returns what happened, and the parameters to go on with.
        """
        if lineage != self.own.lineage:
            self._went_over = False
            return self._outcome("joined"), self.base
        self._measure(vector)
        if not self._views_of_others():
            self.base, self._base_steps = vector, self.own.steps
            return self._outcome("alone"), vector
        if not self.own.finished:
            self.own.began = time.monotonic()
        try:
            outcome, vector = await self._round(vector)
            if outcome.complete < 1.0:
                # A peer was lost that averaged a share for all: the others miss the same share, so once more.
                if not self.own.finished:
                    self.own.began = time.monotonic()
                outcome, vector = await self._round(vector)
        finally:
            self.own.state = "training"
            self._announce()
        return outcome, vector

    async def finish(self, vector: torch.Tensor, lineage: bytes, seconds: float) -> tuple[Outcome, torch.Tensor]:
        """No more steps of our own: go with the others' rounds until all have finished, at most ``seconds``."""
        own = self.own
        own.finished, own.began = True, time.monotonic()
        deadline = own.began + seconds
        # Who has finished counts as before: else the last one to train would pull everybody to its data.
        usual = own.samples * self._settings.every_steps // max(own.steps, 1)
        while True:
            own.fresh = max(own.fresh, usual)
            outcome, vector = await self.average(vector, lineage)
            lineage = own.lineage
            if outcome.kind == "joined":
                continue
            if outcome.last or not self._views_of_others() or time.monotonic() >= deadline:
                own.state = "finished"
                await self._mesh.say()
                return outcome, vector

    def participants(self) -> list[Participant]:
        """Everyone who takes part or did, ourselves first."""
        now, own = time.monotonic(), self.own
        members = sorted(self._mesh.members.values(), key=lambda member: member.peer)
        same = [member.progress.round for member in members if self._is_same(member) and member.progress]
        newest = max([own.round, *same])
        me = Participant(
            peer=self._node.peer_id,
            name=self._settings.member,
            you=True,
            state="finished" if own.finished else own.state,
            steps=own.steps,
            samples=own.samples,
            round=own.round,
            rounds=own.rounds,
            share=own.share,
            behind=newest - own.round,
            seen=0.0,
        )
        return [me, *(_participant(member, now, newest) for member in members if member.progress is not None)]

    # -- one round ------------------------------------------------------------------------------------------------

    async def _round(self, vector: torch.Tensor) -> tuple[Outcome, torch.Tensor]:
        own, settings = self.own, self._settings
        own.turn += 1
        own.state, own.overdue = "waiting", False
        self._begun = asyncio.get_running_loop().create_future()
        self._announce()
        patience = settings.farewell if own.finished else settings.patience
        try:
            async with asyncio.timeout_at(
                asyncio.get_running_loop().time() + (own.began + patience + _GRACE_SECONDS - time.monotonic())
            ):
                begin = await self._begun
        except TimeoutError:
            self._distrust(self._coordinator())
            return self._outcome("alone"), vector
        finally:
            self._begun = None
        if len(begin.peers) == 1:
            self.base, self._base_steps = vector, own.steps
            return self._outcome("alone", last=begin.last), vector
        own.state = "averaging"
        self._announce()
        group = self._group(begin)
        try:
            averaged = await self._averaging.average(
                vector, group, limit=self._limit(vector), seconds=settings.exchange
            )
        except Exception as error:  # noqa: BLE001 - hivemind's own errors, of any type: this round is lost, no more
            logger.warning("a round with %d peers failed: %r", len(group.peers), error)
            return self._outcome("alone"), vector
        return self._take(averaged, begin, group), averaged.vector

    def _group(self, begin: BeginRound) -> Group:
        reachable = [
            self._settings.reachable if peer == self._node.peer_id else self._mesh.members[peer].reachable
            for peer in begin.peers
        ]
        return Group(begin.group, begin.peers, capped(begin.weights), reachable)

    def _take(self, averaged: Averaged, begin: BeginRound, group: Group) -> Outcome:
        """Account for what a round brought."""
        own, total, now = self.own, sum(group.weights), time.monotonic()
        left_out = {*averaged.refused, *averaged.silent}
        for peer in averaged.lost:
            self._refused[peer] = now + _LOST_SECONDS
        for peer, what in averaged.refused.items():
            self._refused[peer] = now + _DISTRUST_SECONDS
            self._mesh.members[peer].refused = what
            logger.warning("%s sent %s: left out", short_peer(peer), what)
        if averaged.complete == 0.0:
            return self._outcome("alone", complete=0.0)
        for peer, weight in zip(group.peers, group.weights, strict=True):
            if peer == self._node.peer_id:
                own.share = weight / total
            elif peer not in left_out:
                member = self._mesh.members[peer]
                member.rounds += 1
                member.share = weight / total
                member.clipped += averaged.clipped.get(peer, 0)
        own.rounds += 1
        own.round = max(begin.round, own.round + 1)
        own.fresh = 0
        self.base, self._base_steps = averaged.vector, own.steps
        peers = [peer for peer in group.peers if peer not in left_out]
        return self._outcome("averaged", peers=peers, complete=averaged.complete, last=begin.last)

    def _outcome(
        self,
        kind: str,
        *,
        peers: list[str] | None = None,
        complete: float = 1.0,
        last: bool = False,
    ) -> Outcome:
        own = self.own
        return Outcome(kind, own.round, own.lineage, peers or [self._node.peer_id], complete, last)

    def _measure(self, vector: torch.Tensor) -> None:
        """Note how far one step moves us: others are believed to move about as far."""
        moved = movement(vector, self.base, self._sizes, self.own.steps - self._base_steps)
        if moved > 0.0:
            self._scale = max(moved, _SHRINK * self._scale)

    def _limit(self, vector: torch.Tensor) -> float:
        """How far another's values may be from ours, as a root mean square."""
        if self._scale == 0.0:
            return root_mean_square(vector) + _UNMOVED
        steps = max(self.own.steps - self._base_steps, self._settings.every_steps)
        return self._settings.clip * steps * self._scale

    # -- who begins -----------------------------------------------------------------------------------------------

    def _views_of_others(self) -> list[View]:
        """Those we can average with."""
        return [_view(member) for member in self._mesh.live if self._is_same(member)]

    def _is_same(self, member: Member) -> bool:
        return member.live and member.progress is not None and member.progress.lineage == self.own.lineage

    def _own_view(self) -> View:
        own = self.own
        return View(
            self._node.peer_id,
            own.state,
            own.lineage,
            own.turn,
            own.steps,
            own.fresh,
            own.round,
            own.began,
            own.finished,
            own.overdue,
        )

    def _coordinator(self) -> str:
        distrusted = [*_still(self._distrusted), *_still(self._refused)]
        return coordinator([self._node.peer_id, *(one.peer for one in self._views_of_others())], distrusted)

    def _distrust(self, peer: str) -> None:
        if peer and peer != self._node.peer_id:
            logger.warning("%s did not begin a round in time: another coordinates", short_peer(peer))
            self._distrusted[peer] = time.monotonic() + _DISTRUST_SECONDS

    async def _run(self) -> None:
        """Whenever something has changed: see whether to go over to others, whether they call, whether to begin."""
        again: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again):
                    await self._changed.wait()
            self._changed.clear()
            if self.own.state in ("training", "paused"):
                await self._go_over()
            self._tell_called()
            again = await self._coordinate()

    async def _coordinate(self) -> float | None:
        """Begin the round that is due, if it is ours to; returns the seconds after which to look again."""
        if self._coordinator() != self._node.peer_id:
            return None
        refused = _still(self._refused)
        others = [one for one in self._views_of_others() if not self._has_begun(one)]
        for one in others:
            if one.peer in refused and one.state == "waiting":
                await self._begin([one], last=False)  # by itself, and it need not wait
        others = [one for one in others if one.peer not in refused]
        mine = self._own_view()
        if mine.state == "waiting" and (self._begun is None or self._begun.done()):
            views = others
        else:
            views = [mine, *others]
        settings = self._settings
        found = due(views, now=time.monotonic(), patience=settings.patience, farewell=settings.farewell)
        for peer in found.absent:
            if peer == self._node.peer_id:
                self.own.overdue = True  # we coordinate, while our own trainer does not come
            else:
                self._mesh.members[peer].overdue = True
        if found.group:
            await self._begin(found.group, last=found.last)
        return found.again

    def _has_begun(self, view: View) -> bool:
        return view.state == "waiting" and self._mesh.members[view.peer].turn_begun >= view.turn

    async def _begin(self, group: list[View], *, last: bool) -> None:
        random.shuffle(group)  # who averages which share changes from round to round
        message = BeginRound(
            os.urandom(16),
            max(one.round for one in group) + 1 if len(group) > 1 else group[0].round,
            [one.peer for one in group],
            weights([one.fresh for one in group]),
            [one.turn for one in group],
            last,
        )
        for one in group:
            if one.peer == self._node.peer_id:
                self._on_begin(one.peer, message)
            else:
                self._mesh.members[one.peer].turn_begun = one.turn
        await asyncio.gather(*(self._mesh.begin(one.peer, message) for one in group))

    def _on_begin(self, sender: str, message: BeginRound) -> None:
        """Our round begins, if the one who says so may, and it is about us as we are now."""
        me, count = self._node.peer_id, len(message.peers)
        if sender != self._coordinator():
            logger.info("%s begins a round, which is not its to begin", short_peer(sender))
            return
        if not len(set(message.peers)) == len(message.weights) == len(message.turns) == count:
            raise BadPeerDataError(f"peer {short_peer(sender)} begins a round that makes no sense", peer=sender)
        known = {me, *(one.peer for one in self._views_of_others())}
        if me not in message.peers or not known.issuperset(message.peers):
            logger.info("%s begins a round with peers that are not here", short_peer(sender))
            return
        turn = message.turns[message.peers.index(me)]
        if self._begun is not None and not self._begun.done() and turn == self.own.turn:
            self._begun.set_result(message)

    def _tell_called(self) -> None:
        called = self._went_over or (self.own.state == "training" and is_called(self._views_of_others()))
        if called != self._called:
            self._called = called
            self._on_call(called)

    async def _go_over(self) -> None:
        """Take over the parameters of others if theirs are those that most have."""
        lineage = better_lineage(self._own_view(), [_view(member) for member in self._mesh.live])
        if lineage is None:
            return
        donors = [
            member
            for member in self._mesh.live
            if member.progress is not None and member.progress.lineage == lineage
        ]
        for member in sorted(donors, key=lambda one: -one.progress.round if one.progress else 0)[:3]:
            try:
                vector, lineage, round_ = await self._mesh.fetch_state(member.peer)
            except (PeerError, TimeoutError) as error:
                logger.warning("no state from %s: %s", short_peer(member.peer), error)
                continue
            self.base, self._base_steps = vector, self.own.steps
            self.own.lineage, self.own.round = lineage, round_
            logger.info("went over to the parameters of %s, round %d", short_peer(member.peer), round_)
            self._went_over = self._task is not None
            self._announce()
            return

    # -- what we say ----------------------------------------------------------------------------------------------

    def _progress(self) -> TeachingProgress:
        own = self.own
        return TeachingProgress(
            own.state, own.turn, own.steps, own.samples, own.fresh, own.round, own.lineage, own.finished
        )

    def _announce(self) -> None:
        self._changed.set()
        self._mesh.announce()


def _still(until: dict[str, float]) -> set[str]:
    now = time.monotonic()
    return {peer for peer, end in until.items() if end > now}


def _view(member: Member) -> View:
    progress = member.progress
    if progress is None:
        raise ValueError("a member that has said nothing has no view")
    return View(
        member.peer,
        progress.state,
        progress.lineage,
        progress.turn,
        progress.steps,
        progress.fresh,
        progress.round,
        member.began,
        progress.finished,
        member.overdue,
    )


def _participant(member: Member, now: float, newest: int) -> Participant:
    progress = member.progress
    if progress is None:
        raise ValueError("a member that has said nothing takes no part")
    gone = "left" if progress.state == "left" else "lost"
    state = progress.state if member.live else gone
    if member.live and progress.finished:
        state = "finished"
    return Participant(
        peer=member.peer,
        name=member.name,
        you=False,
        state=state,
        steps=progress.steps,
        samples=progress.samples,
        round=progress.round,
        rounds=member.rounds,
        share=member.share,
        behind=max(newest - progress.round, 0),
        seen=now - member.seen,
        clipped=member.clipped,
        refused=member.refused,
    )
