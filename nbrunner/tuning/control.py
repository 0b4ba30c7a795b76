"""Pause, resume, stop and small jobs between two steps: how a training thread is told what to do.

The thread comes by `Control.gate` before each step, and whenever it had to give a step up; there it does what was
asked for, and waits while it is to wait. Nothing else ever stops it, so that a pause leaves a whole step behind.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from nbrunner.errors import SessionError

T = TypeVar("T")
State = Literal["starting", "running", "pausing", "paused", "stopping", "stopped", "done", "failed"]

_Job = tuple[Callable[[], Any], "concurrent.futures.Future[Any]"]


class StopRun(BaseException):
    """Raised in the training thread, at the gate, when the run is to end there."""


class Control:
    """What a training thread and everybody else have in common. All methods may be called from any thread.

    Attributes
    ----------
    error : Exception or None
        Why it paused or failed by itself.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._news = threading.Condition(threading.RLock())
        self._jobs: deque[_Job] = deque()
        self._listeners: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._pause = self._stop = self._waiting = False
        self._started = False
        self._holds = 0
        self._end: State | None = None

    # -- from outside --------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What it does now."""
        with self._news:
            if self._end is not None:
                return self._end
            if self._stop:
                return "stopping"
            if self._pause:
                return "paused" if self._waiting else "pausing"
            return "running" if self._started else "starting"

    @property
    def ended(self) -> bool:
        return self._end is not None

    def pause(self) -> None:
        """Wait before the next step. Nothing happens if it does already, or has ended."""
        self._set(pause=True)

    def resume(self) -> None:
        """Go on, after whatever pause. Nothing happens if it runs or has ended."""
        self._set(pause=False)

    def stop(self) -> None:
        """End before the next step."""
        self._set(stop=True)

    def _set(self, *, pause: bool | None = None, stop: bool | None = None) -> None:
        with self._news:
            if self._end is not None:
                return
            if pause is not None:
                self._pause = pause
            if pause is False:
                self.error = None
            if stop is not None:
                self._stop = stop
            self._news.notify_all()
        self._tell()

    def between_steps(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Have the training thread do something before its next step, or at once if it waits.

        Raises
        ------
        SessionError
            It has ended.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._news:
            if self._end is not None:
                raise SessionError("this run has ended; its model is there, and can be used directly")
            self._jobs.append((job, future))
            self._news.notify_all()
        return future

    @contextlib.contextmanager
    def held(self, timeout: float | None = None) -> Iterator[None]:
        """Between two steps: the thread does nothing while the block runs. Also when it has ended.

        Raises
        ------
        TimeoutError
            Its step takes longer than ``timeout`` seconds.
        """
        with self._news:
            self._holds += 1
            self._news.notify_all()
            there = self._news.wait_for(lambda: self._waiting or self.ended or self._mine(), timeout)
        try:
            if not there:
                raise TimeoutError("the step that is running takes too long")
            yield
        finally:
            with self._news:
                self._holds -= 1
                self._news.notify_all()

    def _mine(self) -> bool:
        return threading.current_thread() is self._thread

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have a function called after each change of state, in whatever thread made it. It must not wait."""
        self._listeners.append(listener)

    def wait_for(self, condition: Callable[[State], bool], timeout: float | None = None) -> bool:
        """Wait until the state is such."""
        with self._news:
            return self._news.wait_for(lambda: condition(self.state), timeout)

    def wake(self) -> None:
        """Have everybody who waits look again."""
        with self._news:
            self._news.notify_all()

    # -- in the training thread ----------------------------------------------------------------------------------

    def gate(self) -> None:
        """Do what was asked for; wait while it is to wait.

        Raises
        ------
        StopRun
            The run is to end here.
        """
        with self._news:
            self._thread = threading.current_thread()
            if not self._started:
                self._started = True
                self._tell()
        while True:
            with self._news:
                job = self._jobs.popleft() if self._jobs else None
                if job is None:
                    if self._stop:
                        self._leave_wait()
                        raise StopRun
                    if not self._pause and not self._holds:
                        self._leave_wait()
                        return
                    if not self._waiting:
                        self._waiting = True
                        self._news.notify_all()
                        self._tell()
                        continue  # a listener may have asked for something
                    self._news.wait()
                    continue
            self._do(job)

    def _leave_wait(self) -> None:
        if self._waiting:
            self._waiting = False
            self._tell()

    def _do(self, job: _Job) -> None:
        function, future = job
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - belongs to whoever asked for it
            future.set_exception(error)
        else:
            future.set_result(result)
        self._tell()

    def trouble(self, error: BaseException) -> None:
        """Pause because of an error, and wait at the gate until somebody resumes or stops."""
        with self._news:
            self.error = error
            self._pause = True
        self._tell()
        self.gate()

    @property
    def stopping(self) -> bool:
        """Whether it is to end before its next step."""
        return self._stop

    def end(self, state: State, error: BaseException | None = None) -> None:
        """The last thing the thread does. What was still asked for is refused."""
        with self._news:
            jobs, self._jobs = list(self._jobs), deque()
            self._end, self._waiting = state, False
            if error is not None:
                self.error = error
            self._news.notify_all()
        for _, future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(SessionError("the run ended before it came to this"))
        self._tell()

    def _tell(self) -> None:
        for listener in list(self._listeners):
            with contextlib.suppress(Exception):  # one that fails must not end a training
                listener()
