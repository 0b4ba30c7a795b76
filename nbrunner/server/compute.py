"""The compute thread: everything that touches a device's tensors runs there, most urgent first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from enum import IntEnum
from typing import Generic, TypeVar, cast

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Urgency(IntEnum):
    """Which work goes first. Somebody waits for every token of a decode; a gradient can wait."""

    DECODE = 0
    PREFILL = 1
    STATELESS = 2


class Done(Generic[T]):
    """What a job returned, and the seconds it waited and ran."""

    __slots__ = ("compute", "queue", "value")

    def __init__(self, value: T, queue: float, compute: float) -> None:
        self.value = value
        self.queue = queue
        self.compute = compute


class ComputeThread:
    """One thread, and a heap of jobs ordered by (urgency, arrival).

    Jobs of one session keep their order because a session submits one at a time. Waking the thread goes through
    a `queue.SimpleQueue`, written in C: a put and the wake-up take 10-20 µs, where `queue.PriorityQueue` with its
    Python condition variable took four times as long.
    """

    def __init__(self, name: str = "nbrunner-compute", initialize: Callable[[], None] | None = None) -> None:
        self._heap: list[tuple[int, int, _Job]] = []
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._running = threading.Lock()
        self._initialize = initialize
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._heap)

    async def submit(self, function: Callable[[], T], urgency: Urgency, *, brief: bool = False) -> Done[T]:
        """Run a function in the thread. Cancelling takes the job back unless it has begun.

        Parameters
        ----------
        brief
            It takes no longer than the event loop may stand still: if nothing else runs or waits, it is run at once
            where we are, without waking the thread and being woken by it.
        """
        if brief and not self._heap and not self._closed and self._running.acquire(blocking=False):
            try:
                began = time.perf_counter()
                value = function()
                return Done(value, 0.0, time.perf_counter() - began)
            finally:
                self._running.release()
        loop = asyncio.get_running_loop()
        job = _Job(function, loop, loop.create_future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the compute thread is closed")
            heapq.heappush(self._heap, (urgency, next(self._numbers), job))
        self._wake.put(True)
        found = cast(T, await job.future)
        return Done(found, job.begun - job.submitted, job.ended - job.begun)

    def close(self) -> None:
        """Take no more; what waits is cancelled; returns when the thread has ended."""
        with self._lock:
            self._closed = True
            waiting, self._heap = self._heap, []
        for _, _, job in waiting:
            job.give_up()
        self._wake.put(False)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        if self._initialize:
            self._initialize()
        while self._wake.get():
            with self._lock:
                if not self._heap:
                    continue
                _, _, job = heapq.heappop(self._heap)
            with self._running:
                job.run()
            del job  # it holds tensors, and this frame lives until the next one comes


class _Job:
    __slots__ = ("_function", "_loop", "begun", "ended", "future", "submitted")

    def __init__(
        self, function: Callable[[], object], loop: asyncio.AbstractEventLoop, future: asyncio.Future[object]
    ) -> None:
        self._function: Callable[[], object] | None = function
        self._loop = loop
        self.future: asyncio.Future[object] = future
        self.submitted = time.perf_counter()
        self.begun = self.ended = self.submitted

    def run(self) -> None:
        function, self._function = self._function, None
        if function is None or self.future.cancelled():
            return
        self.begun = time.perf_counter()
        try:
            value, error = function(), None
        except BaseException as caught:  # noqa: BLE001 - handed to whoever awaits the job
            value, error = None, caught
        del function
        self.ended = time.perf_counter()
        self._answer(value, error)

    def give_up(self) -> None:
        self._function = None
        self._answer(None, CancelledError())

    def _answer(self, value: object, error: BaseException | None) -> None:
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
