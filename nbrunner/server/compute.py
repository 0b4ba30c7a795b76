"""The compute thread: everything that touches a device's tensors runs there, one pass after the other."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError
from typing import Any, Generic, Protocol, TypeVar, cast

from nbrunner.server.gathering import Gathering
from nbrunner.server.scheduler import Scheduler, Urgency, Waiting

logger = logging.getLogger(__name__)

T = TypeVar("T")

AWAKE_SECONDS = 0.002
"""A lone session that comes back sooner than this is waited for awake. To fall asleep and be woken takes 0.1 ms,
and the core forgets what it had in its caches. One server of a small model: 1.41 ms a hop instead of 1.59."""

REST_SECONDS = 0.02
"""What a step needs of the processor's caches is there as long as this; see `nbrunner.blocks.rehearsal`."""

READY_SECONDS = 0.015
"""What is done for a step before it comes begins so long before it is due. Later, it would give a little more, and
take the core from the client, which is computing its head then (decision 0018)."""


class Part(Protocol):
    """A part of a session, as the thread sees it: `nbrunner.server.stepping.PartWork`."""

    @property
    def tokens(self) -> int:
        """Tokens × rows left."""

    @property
    def rows(self) -> int: ...

    @property
    def joins(self) -> Hashable | None: ...


PartRunner = Callable[[Sequence[tuple[Any, int]]], Sequence[Exception | None]]
"""Runs so many tokens × rows of each part together, and says what went wrong with which."""


class Done(Generic[T]):
    """What a job returned, and the seconds it waited and ran."""

    __slots__ = ("compute", "queue", "value")

    def __init__(self, value: T, queue: float, compute: float) -> None:
        self.value = value
        self.queue = queue
        self.compute = compute


class ComputeThread:
    """One thread. What it runs next is for `Scheduler` to say, of all that waits, and when, for `Gathering`.

    Jobs of one session keep their order because a session submits one at a time. Waking the thread goes through
    a `queue.SimpleQueue`, written in C: a put and the wake-up take 10-20 µs, where `queue.PriorityQueue` with its
    Python condition variable took four times as long.
    """

    def __init__(self, name: str = "nbrunner-compute", initialize: Callable[[], None] | None = None) -> None:
        self.scheduler = Scheduler()
        self.gathering = Gathering()
        self._run_parts: PartRunner | None = None
        self._waiting: dict[int, _Job] = {}
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._awake_until = 0.0
        self._preparing: asyncio.TimerHandle | None = None
        self._running = threading.Lock()
        self._initialize = initialize
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    def serve_parts(self, run: PartRunner) -> None:
        """How parts are run, once there is a span to run them on."""
        self._run_parts = run

    async def submit(self, function: Callable[[], T], urgency: Urgency, *, peer: str = "") -> Done[T]:
        """Run a function in the thread. Cancelling takes the job back unless it has begun.

        Parameters
        ----------
        peer
            For whom; peers take turns.
        """
        job = self._job(urgency, peer)
        job.function = function
        found = cast(T, await self._enqueue(job))
        return Done(found, job.queue, job.compute)

    async def submit_part(
        self, part: Part, urgency: Urgency, *, peer: str, session: str, brief: bool = False
    ) -> Done[None]:
        """Run a part of a session, perhaps with those of others.

        Parameters
        ----------
        brief
            It takes no longer than the event loop may stand still: if nothing else runs or waits and no other
            session is active, it is run at once where we are, without waking the thread and being woken by it.
        """
        now = time.perf_counter()
        self._awake_until = 0.0
        self._stop_preparing()
        with self._lock:
            self.gathering.came(session, now)
            alone = self.gathering.active(now) == 1
        if brief and alone and self._may_run_here():
            try:
                (problem,) = self._runner()([(part, part.tokens)])
            finally:
                self._running.release()
            if problem is not None:
                raise problem
            ended = time.perf_counter()
            with self._lock:
                self.gathering.went([session], ended)
                back = self.gathering.late(session)
            if back - ended < AWAKE_SECONDS:
                self._awake_until = back
                self._stay_awake()
            return Done(None, 0.0, ended - now)
        job = self._job(urgency, peer)
        job.part, job.session = part, session
        await self._enqueue(job)
        return Done(None, job.queue, job.compute)

    def before_next(self, session: str, function: Callable[[bool], None]) -> None:
        """Have something short run where we are, in the event loop, before a session's next step comes.

        Parameters
        ----------
        function
            Run at once, or, if the session is known to be away for some time, shortly before it is due: then it is
            called with True. Not at all if other sessions are active, or something else runs or waits.
        """
        self._stop_preparing()  # of another session: two are active, and it would only hold that one
        with self._lock:
            away = self.gathering.due(session) - time.perf_counter()
        if REST_SECONDS < away < math.inf:
            loop = asyncio.get_running_loop()
            self._preparing = loop.call_later(away - READY_SECONDS, self._in_pause, function, True)
        else:
            self._in_pause(function, False)

    def _in_pause(self, function: Callable[[bool], None], rested: bool) -> None:
        self._preparing = None
        with self._lock:
            alone = self.gathering.active(time.perf_counter()) == 1
        if alone and self._may_run_here():
            try:
                function(rested)
            finally:
                self._running.release()

    def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.cancel()
            self._preparing = None

    def _stay_awake(self) -> None:
        if time.perf_counter() < self._awake_until and not self._closed:
            asyncio.get_running_loop().call_soon(self._stay_awake)

    def session_ended(self, session: str) -> None:
        """No step of it is waited for any more."""
        self._stop_preparing()
        with self._lock:
            self.gathering.forget(session)
            waited_for = bool(self._waiting)
        if waited_for:
            self._wake.put(True)  # those that it was to be joined with go on without it

    def close(self) -> None:
        """Take no more; what waits is cancelled; returns when the thread has ended."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
        for job in waiting.values():
            job.give_up()
        self._wake.put(False)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _may_run_here(self) -> bool:
        return not self._waiting and not self._closed and self._running.acquire(blocking=False)

    def _job(self, urgency: Urgency, peer: str) -> _Job:
        loop = asyncio.get_running_loop()
        return _Job(next(self._numbers), urgency, peer, loop, loop.create_future())

    async def _enqueue(self, job: _Job) -> object:
        with self._lock:
            if self._closed:
                raise RuntimeError("the compute thread is closed")
            self._waiting[job.number] = job
        self._wake.put(True)
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._lock:
                self._waiting.pop(job.number, None)
            raise

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._initialize:
            self._initialize()
        while self._wake.get():
            while self._run_next():
                pass

    def _run_next(self) -> bool:
        """Run what the scheduler says; False if nothing waits."""
        self._gather()
        with self._lock:
            waiting = [job.waiting for job in self._waiting.values()]
            now = time.perf_counter()
            chosen = self.scheduler.choose(waiting, now, active=self.gathering.active(now))
            jobs = [(self._waiting.pop(one.work.number), one.tokens) for one in chosen]
        if not jobs:
            return False
        with self._running:
            unfinished = self._run_jobs(jobs)
        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.update({job.number: job for job in unfinished})
        if closed:
            for job in unfinished:
                job.give_up()
        return True

    def _gather(self) -> None:
        """Give the steps of other sessions a moment to arrive, to be run together with those here."""
        begin = time.perf_counter()
        now = begin
        while True:
            with self._lock:
                steps = any(job.is_step for job in self._waiting.values())
                here = {job.session for job in self._waiting.values() if job.part is not None}
                until = self.gathering.until(here, begin, now) if steps else now
            if until <= now or self._closed:
                return
            try:
                if not self._wake.get(timeout=until - now):
                    self._wake.put(False)
                    return
            except queue.Empty:
                pass
            now = time.perf_counter()

    def _run_jobs(self, jobs: Sequence[tuple[_Job, int]]) -> list[_Job]:
        """Those that have something left are returned."""
        jobs = [(job, tokens) for job, tokens in jobs if not job.future.cancelled()]
        if not jobs:
            return []
        began = time.perf_counter()
        for job, _ in jobs:
            job.begin(began)
        first = jobs[0][0]
        if first.function is not None:
            first.run()
            return []
        parts = [(job.part, tokens) for job, tokens in jobs]
        try:
            problems = self._runner()(parts)
        except BaseException as error:  # noqa: BLE001 - handed to whoever awaits the jobs
            problems = cast(Sequence[Exception], [error] * len(jobs))
        ended = time.perf_counter()
        seconds = ended - began
        steps_only = all(job.urgency is Urgency.DECODE for job, _ in jobs)
        unfinished, finished = [], []
        for (job, _), problem in zip(jobs, problems, strict=True):
            job.compute += seconds
            if problem is None and job.part is not None and job.part.tokens:
                unfinished.append(job)
            else:
                finished.append((job, problem))
        with self._lock:  # before they are answered: the next step may be here at once
            self.gathering.went([job.session for job, _ in finished], ended, seconds if steps_only else None)
        for job, problem in finished:
            job.answer(None, problem)
        return unfinished

    def _runner(self) -> PartRunner:
        if self._run_parts is None:
            raise RuntimeError("there is no span yet")
        return self._run_parts


class _Job:
    __slots__ = (
        "_loop",
        "begun",
        "compute",
        "function",
        "future",
        "number",
        "part",
        "peer",
        "queue",
        "session",
        "submitted",
        "urgency",
    )

    def __init__(
        self,
        number: int,
        urgency: Urgency,
        peer: str,
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[object],
    ) -> None:
        self.number, self.urgency, self.peer = number, urgency, peer
        self.function: Callable[[], object] | None = None
        self.part: Part | None = None
        self.session = ""
        self._loop = loop
        self.future: asyncio.Future[object] = future
        self.submitted = time.perf_counter()
        self.queue = 0.0
        self.begun = False
        self.compute = 0.0

    @property
    def is_step(self) -> bool:
        """A decode step that others can be joined to."""
        return self.part is not None and self.urgency is Urgency.DECODE and self.part.joins is not None

    @property
    def waiting(self) -> Waiting:
        part = self.part
        if part is None:
            return Waiting(self.number, self.urgency, self.submitted, self.peer, joins=None)
        divisible = self.urgency is not Urgency.DECODE
        return Waiting(
            self.number, self.urgency, self.submitted, self.peer, part.tokens, part.rows, divisible, part.joins
        )

    def begin(self, now: float) -> None:
        if not self.begun:
            self.begun, self.queue = True, now - self.submitted

    def run(self) -> None:
        function, self.function = self.function, None
        if function is None:
            return
        began = time.perf_counter()
        try:
            value, error = function(), None
        except BaseException as caught:  # noqa: BLE001 - handed to whoever awaits the job
            value, error = None, caught
        del function
        self.compute = time.perf_counter() - began
        self.answer(value, error)

    def give_up(self) -> None:
        self.function = self.part = None
        self.answer(None, CancelledError())

    def answer(self, value: object, error: BaseException | None) -> None:
        self.part = None  # it holds tensors, and the job lives until the next one comes
        try:
            self._loop.call_soon_threadsafe(self._set, value, error)
        except RuntimeError:
            logger.debug("the event loop closed before a job ended")

    def _set(self, value: object, error: BaseException | None) -> None:
        if self.future.done():
            return
        if isinstance(error, CancelledError):
            self.future.cancel()
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(value)
