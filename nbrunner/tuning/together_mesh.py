"""Everyone who teaches together holds a stream to everyone: how they find each other, and hear when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch

from nbrunner.errors import BadPeerDataError, NBRunnerError, PeerError, PeerRefusedError, UserInputError
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.refusals import Refused
from nbrunner.protocol.status import Ping, Pong
from nbrunner.protocol.tensors import pack, take
from nbrunner.protocol.together import (
    MAX_PARTICIPANTS,
    SLICE_VALUES,
    BeginRound,
    GetTeaching,
    GetTeachingState,
    JoinTeaching,
    Teaching,
    TeachingManifest,
    TeachingProgress,
    TeachingRecord,
    TeachingState,
    difference,
)
from nbrunner.swarm.daemon import split_address
from nbrunner.swarm.greeting import refusal
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

logger = logging.getLogger(__name__)

LIMITS = Limits(frame_bytes=4 * SLICE_VALUES)

SILENT_SECONDS = 10.0
"""A peer that has said nothing for so long is gone: it says something every two."""

_SAY_SECONDS = 2.0
_ANSWER_SECONDS = 5.0
_GOODBYE_SECONDS = 0.5
_SEND_SECONDS = 3.0
_STATE_SECONDS = 120.0
_RECORD_SECONDS = 60.0
_RENEW_SECONDS = 20.0
_LOOK_SECONDS = (1.0, 2.0, 4.0, 4.0, 8.0, 15.0)  # between looks into the directory; the last for ever
_DOWNLOADS = 2  # of our state at once


@dataclass
class Member:
    """Another who takes part, or did.

    Attributes
    ----------
    seen, began
        Monotonic seconds: when it last said something; when it began to wait, or when it had finished.
    turn_begun
        The turn for which we, as coordinator, have let it begin.
    rounds, share, clipped, refused
        What we had from it: rounds together, its weight in the last, parts shortened, what was wrong.
    """

    peer: str
    name: str = ""
    reachable: bool = True
    streams: list[Stream] = field(default_factory=list)
    progress: TeachingProgress | None = None
    seen: float = 0.0
    began: float = 0.0
    overdue: bool = False
    turn_begun: int = -1
    rounds: int = 0
    share: float = 0.0
    clipped: int = 0
    refused: str = ""

    @property
    def live(self) -> bool:
        """Connected, and has said how far it is."""
        return bool(self.streams) and self.progress is not None and self.progress.state != "left"


class Mesh:
    """The streams to all others.

    Parameters
    ----------
    progress
        What we say of ourselves.
    state
        Our parameters for those who join: vector, lineage, round; None if there is nothing to give yet.
    on_change
        Called when anything about anyone has changed.
    on_begin
        Called with the sender and its message when a round is called.
    """

    def __init__(
        self,
        node: Node,
        teaching: Teaching,
        *,
        name: str,
        reachable: bool,
        progress: Callable[[], TeachingProgress],
        state: Callable[[], tuple[torch.Tensor, bytes, int] | None],
        on_change: Callable[[], None],
        on_begin: Callable[[str, BeginRound], None],
    ) -> None:
        self.members: dict[str, Member] = {}
        self._node = node
        self._teaching = teaching
        self._digest = teaching.digest
        self._name = name
        self._reachable = reachable
        self._progress = progress
        self._state = state
        self._on_change = on_change
        self._on_begin = on_begin
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._look = asyncio.Event()
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._started = time.time()

    @property
    def live(self) -> list[Member]:
        """Those who are there now."""
        return [member for member in self.members.values() if member.live]

    def admits(self, peer: str) -> bool:
        """Whether this peer has joined, with an invite and the same teaching."""
        member = self.members.get(peer)
        return member is not None and member.live

    async def open(self) -> None:
        """Be there, and find who is.

        Raises
        ------
        UserInputError
            Others teach something else under this name, and what.
        PeerError
            No node of the swarm took our record.
        """
        await self._node.serve(self._handle, LIMITS)
        records = await self._records()
        same = [peer for peer, record in records.items() if record.digest == self._digest]
        if records and not same:
            await self._compare(records)
        if len(same) >= MAX_PARTICIPANTS:
            raise UserInputError(f"{len(same)} peers teach {self._teaching.name!r} already; no more fit in")
        if not await self._publish():
            raise PeerError("no server of the swarm took the word that you teach; is the same nbrunner there?")
        await self._meet(records := await self._records())
        if not self.live:  # those who did teach the same may be gone, while others are there
            await self._compare(records)
        self._spawn(self._keep_announced(), "together-record")
        self._spawn(self._keep_looking(), "together-look")
        self._spawn(self._keep_talking(), "together-talk")

    async def close(self) -> None:
        """Say goodbye, and end all streams when the others have."""
        await self.say()
        with contextlib.suppress(TimeoutError):  # a word sent just before a stream is closed may be lost
            async with asyncio.timeout(_GOODBYE_SECONDS), self._news:
                await self._news.wait_for(lambda: not self.live_or_new)
        with contextlib.suppress(NBRunnerError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._publish(gone=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self.members.values():
            for stream in member.streams:
                stream.close()

    # -- talking --------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """`say` it without waiting."""
        self._spawn(self.say(), "together-say")

    async def say(self) -> None:
        """Tell everyone how far we are."""
        message = self._progress()
        for member in self.live_or_new:
            self._spawn(self._send(member, message), "together-say")

    @property
    def live_or_new(self) -> list[Member]:
        return [member for member in self.members.values() if member.streams]

    async def begin(self, peer: str, message: BeginRound) -> None:
        """Tell one peer that its round begins."""
        if (member := self.members.get(peer)) is not None:
            await self._send(member, message)

    async def _send(self, member: Member, message: TeachingProgress | BeginRound | JoinTeaching) -> None:
        for stream in list(member.streams):
            try:
                async with asyncio.timeout(_SEND_SECONDS):
                    await stream.send(message)
            except (PeerError, TimeoutError):
                stream.close()
                continue
            return

    async def fetch_state(self, peer: str) -> tuple[torch.Tensor, bytes, int]:
        """Download a peer's parameters: vector, lineage, round.

        Raises
        ------
        PeerError
        TimeoutError
        """
        total, at = self._teaching.values, 0
        vector = torch.empty(total)
        lineage, round_ = b"", 0
        async with asyncio.timeout(_STATE_SECONDS):
            stream = await self._node.open_stream(peer)
            try:
                await stream.send(GetTeachingState(self._teaching.name, self._digest))
                while at < total or not lineage:
                    message, tensors = await stream.receive()
                    if not isinstance(message, TeachingState) or message.position != at:
                        raise _unexpected(message, peer)
                    values = take(tensors, "values", dtype=torch.float32, shape=[min(SLICE_VALUES, total - at)])
                    vector[at : at + len(values)] = values
                    at += len(values)
                    if lineage and (lineage, round_) != (message.lineage, message.round):
                        raise BadPeerDataError(f"peer {short_peer(peer)} changed its state on the way", peer=peer)
                    lineage, round_ = message.lineage, message.round
            finally:
                stream.close()
        return vector, lineage, round_

    # -- streams that come ----------------------------------------------------------------------------------------

    async def _handle(self, stream: Stream) -> None:
        async with asyncio.timeout(_ANSWER_SECONDS):
            message, _ = await stream.receive()
        if isinstance(message, JoinTeaching):
            await self._take_in(stream, message)
            return
        while True:
            if isinstance(message, GetTeaching):
                await stream.send(TeachingManifest(self._teaching))
            elif isinstance(message, GetTeachingState):
                await self._give_state(stream, message)
            elif isinstance(message, Ping):
                await stream.send(Pong(message.nonce))
            else:
                raise BadPeerDataError(f"{type(message).__name__} has no meaning here", peer=stream.peer)
            message, _ = await stream.receive()

    async def _take_in(self, stream: Stream, message: JoinTeaching) -> None:
        if message.name != self._teaching.name:
            raise PeerRefusedError(f"here {self._teaching.name!r} is taught", code="teaching")
        if message.digest != self._digest:
            await stream.send(TeachingManifest(self._teaching))
            await stream.close_after_peer(1.0)
            return
        if stream.peer not in self.members and len(self.live_or_new) >= MAX_PARTICIPANTS:
            raise PeerRefusedError("as many take part as can", code="full", retry_after=60.0)
        await stream.send(self._introduction())
        await self._follow(stream, message)

    async def _give_state(self, stream: Stream, message: GetTeachingState) -> None:
        state = self._state()
        if message.name != self._teaching.name or message.digest != self._digest or state is None:
            raise PeerRefusedError("there is no such state here", code="teaching")
        vector, lineage, round_ = state
        async with self._downloads:
            for position in range(0, max(len(vector), 1), SLICE_VALUES):
                values = vector[position : position + SLICE_VALUES]
                await stream.send(TeachingState(lineage, round_, position), [pack("values", values)])

    async def _follow(self, stream: Stream, introduction: JoinTeaching) -> None:
        """Listen to one peer as long as it is there."""
        member = self.members.setdefault(stream.peer, Member(stream.peer))
        member.name, member.reachable = introduction.member, introduction.reachable
        member.streams.append(stream)
        member.seen = time.monotonic()
        try:
            await stream.send(self._progress())
            while True:
                message, _ = await stream.receive()
                member.seen = time.monotonic()
                if isinstance(message, TeachingProgress):
                    self._note(member, message)
                    async with self._news:
                        self._news.notify_all()
                    if message.state == "left":
                        return
                elif isinstance(message, BeginRound):
                    self._on_begin(stream.peer, message)
                else:
                    raise _unexpected(message, stream.peer)
        finally:
            member.streams.remove(stream)
            stream.close()
            if not member.streams and not (member.progress is not None and member.progress.state == "left"):
                self._look.set()  # it may be the connection that was lost, and not the peer
            self._on_change()
            async with self._news:
                self._news.notify_all()

    def _note(self, member: Member, message: TeachingProgress) -> None:
        before = member.progress
        waits, waited = message.state == "waiting", before is not None and before.state == "waiting"
        done, was_done = message.finished, before is not None and before.finished
        if (waits and not waited and not done) or (done and not was_done):
            member.began = member.seen
        if waits:
            member.overdue = False
        member.progress = message
        self._on_change()

    def _introduction(self) -> JoinTeaching:
        return JoinTeaching(self._teaching.name, self._digest, self._name, self._reachable)

    # -- finding --------------------------------------------------------------------------------------------------

    async def _records(self) -> dict[str, TeachingRecord]:
        records = await self._node.fetch_teaching()
        records.pop(self._node.peer_id, None)
        return {peer: one for peer, one in records.items() if one.name == self._teaching.name and not one.gone}

    async def _publish(self, *, gone: bool = False) -> bool:
        addresses = [split_address(address)[0] for address in self._node.addresses][:8]
        record = TeachingRecord(self._teaching.name, self._digest, self._teaching.method, self._started, addresses)
        return await self._node.publish_teaching(record, lifetime=_RECORD_SECONDS)

    async def _meet(self, records: dict[str, TeachingRecord]) -> None:
        """Connect to all we do not know yet, and wait until they have said how far they are."""
        strangers = [
            (peer, record)
            for peer, record in records.items()
            if record.digest == self._digest and not (peer in self.members and self.members[peer].streams)
        ]
        if strangers:
            room = max(MAX_PARTICIPANTS - len(self.live_or_new), 0)
            await asyncio.gather(*(self._join(peer, record) for peer, record in strangers[:room]))

    async def _join(self, peer: str, record: TeachingRecord) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                stream = await self._reach(peer, record)
                try:
                    await stream.send(self._introduction())
                    answer, _ = await stream.receive()
                    if not isinstance(answer, JoinTeaching) or answer.digest != self._digest:
                        raise _unexpected(answer, peer)
                except BaseException:
                    stream.close()
                    raise
                self._spawn(self._follow(stream, answer), f"together-{short_peer(peer)}")
                await self._introduced(peer)
        except (PeerError, TimeoutError) as error:
            logger.info("%s cannot be joined: %s", short_peer(peer), error or "no answer")

    async def _introduced(self, peer: str) -> None:
        """Wait until a peer has said how far it is."""
        async with self._news:
            await self._news.wait_for(lambda: peer in self.members and self.members[peer].progress is not None)

    async def _reach(self, peer: str, record: TeachingRecord) -> Stream:
        if record.addresses:
            with contextlib.suppress(PeerError):  # there may be a connection already
                await self._node.connect(peer, record.addresses, timeout=_ANSWER_SECONDS / 2)
        return await self._node.open_stream(peer, timeout=_ANSWER_SECONDS / 2)

    async def _compare(self, records: dict[str, TeachingRecord]) -> None:
        """Others use our name: `UserInputError` with what they do otherwise, unless they are gone."""
        others = [(peer, record) for peer, record in records.items() if record.digest != self._digest]
        for peer, record in others[:3]:
            try:
                stream = await self._reach(peer, record)
                try:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        await stream.send(GetTeaching())
                        answer, _ = await stream.receive()
                finally:
                    stream.close()
            except (PeerError, TimeoutError):
                continue  # its record outlives it for up to a minute
            if isinstance(answer, TeachingManifest) and answer.teaching.name == self._teaching.name:
                raise UserInputError(
                    f"others in this swarm teach {self._teaching.name!r} with another configuration: "
                    f"{difference(self._teaching, answer.teaching)}. Use the same method, model and options, "
                    "or another name."
                )

    # -- keeping --------------------------------------------------------------------------------------------------

    async def _keep_announced(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                if not await self._publish():
                    logger.warning("no server of the swarm took our record")
            except NBRunnerError as error:
                logger.warning("our record could not be renewed: %s", error)

    async def _keep_looking(self) -> None:
        looks = 0
        while True:
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS[min(looks, len(_LOOK_SECONDS) - 1)]):
                    await self._look.wait()
                    await asyncio.sleep(1.0)  # a peer that was killed is not worth the haste
                    looks = 0
            looks += 1
            try:
                await self._meet(await self._records())
            except NBRunnerError as error:
                logger.info("the directory cannot be read: %s", error)

    async def _keep_talking(self) -> None:
        while True:
            await asyncio.sleep(_SAY_SECONDS)
            now = time.monotonic()
            for member in self.live_or_new:
                if now - member.seen > SILENT_SECONDS:
                    logger.info("%s has been silent for %.0f s", short_peer(member.peer), now - member.seen)
                    for stream in list(member.streams):
                        stream.close()
            await self.say()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.INFO if isinstance(error, NBRunnerError) else logging.ERROR
            logger.log(level, "%s ended: %s", task.get_name(), error, exc_info=None if level < 40 else error)


def _unexpected(message: object, peer: str) -> PeerError:
    if isinstance(message, Refused):
        return refusal(peer, message)
    if isinstance(message, TeachingManifest):
        return PeerRefusedError(f"peer {short_peer(peer)} teaches something else", peer=peer, code="teaching")
    return BadPeerDataError(f"peer {short_peer(peer)} sent {type(message).__name__} out of place", peer=peer)
