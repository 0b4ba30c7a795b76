"""One thread for what takes seconds: importing torch, starting servers, loading models."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], concurrent.futures.Future[Any]]


class Worker:
    """Runs functions one after the other in a thread that lives as long as the notebook is connected.

    One after the other: two cells that both find nothing configured must not start two swarms. One long-lived
    thread: on Linux a child process that asks for its parent's death signal gets it when the *thread* that started
    it ends.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run a function in the thread."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="nbrunner-notebook", daemon=True)
                self._thread.start()
            self._jobs.put((function, future))
        return future

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after what it is doing."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - belongs to whoever waits for the future
                future.set_exception(error)
            else:
                future.set_result(result)
