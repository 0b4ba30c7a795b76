"""The engine thread: one asyncio loop per process owns every node, stream and session.

Notebooks have a loop of their own that must stay free, and scripts have none. Everything public is therefore a
coroutine on this loop, seen from outside as a `Handle`: the same object can be waited for, awaited or iterated.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

from nbrunner.errors import SessionError

T = TypeVar("T")
logger = logging.getLogger(__name__)

_HEARTBEAT = 0.1  # seconds, see `wait_async`
CANCEL_GRACE = 2.0
"""Seconds that a cancelled coroutine has for its clean-up before the caller goes on."""


class EngineLoop:
    """A daemon thread with an asyncio loop. Get the process's one with `EngineLoop.get()`.

    It is a private uvloop where that is installed (a small frame there and back over two daemons takes 20 % less
    time than with the selector loop), never a policy: a policy would change the loops of the notebook's kernel.
    """

    _lock = threading.Lock()
    _instance: EngineLoop | None = None

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.loop = _new_loop()
        self._closers: list[Callable[[], Awaitable[object]]] = []
        self._waiting: dict[threading.Thread, concurrent.futures.Future[Any]] = {}
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._main, name="nbrunner-engine", daemon=True)
        self.thread.start()
        self._ready.wait()
        atexit.register(self.close)

    @classmethod
    def get(cls) -> EngineLoop:
        """The engine of this process; a forked child gets a new one, because threads do not survive a fork."""
        with cls._lock:
            engine = cls._instance
            if engine is None or engine._pid != os.getpid() or engine.loop.is_closed():
                engine = cls._instance = cls()
            return engine

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._ready.set)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> EngineLoop | None:
        """The engine whose loop this is; None if it is a loop of somebody else's."""
        engine = cls._instance
        return engine if engine is not None and engine.loop is loop else None

    def on_close(self, closer: Callable[[], Awaitable[object]]) -> None:
        """Have an async function called when the process ends, the last registered first."""
        self._closers.append(closer)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the engine; from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the engine and wait for it. Ctrl-C and a kernel interrupt cancel it."""
        if threading.current_thread() is self.thread:
            coroutine.close()
            raise SessionError(
                "a blocking call was made on the engine's own thread, where it would wait for itself"
            )
        return self.wait(self.submit(coroutine), timeout)

    def wait(self, future: concurrent.futures.Future[T], timeout: float | None = None) -> T:
        """Wait for what was submitted; not on the engine's own thread. Ctrl-C and a kernel interrupt cancel it."""
        me = threading.current_thread()
        self._waiting[me] = future
        try:
            return wait_sync(future, timeout)
        finally:
            del self._waiting[me]

    def wait_any(self, futures: Collection[concurrent.futures.Future[T]]) -> concurrent.futures.Future[T]:
        """Wait for the first of several to be done; an interrupt, or `cancel_thread`, leaves the others running."""
        me = threading.current_thread()
        self._waiting[me] = next(iter(futures))
        try:
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
            return next(iter(done))
        finally:
            del self._waiting[me]

    def cancel_thread(self, thread: threading.Thread) -> None:
        """Cancel what another thread waits for in `run`, `wait` or `wait_any`: `CancelledError` is raised there."""
        future = self._waiting.get(thread)
        if future is not None:
            future.cancel()

    def close(self, timeout: float = 3.0) -> None:
        """Run the closers, cancel what still runs, end the thread. Called at exit."""
        if self._pid != os.getpid() or self.loop.is_closed():
            return
        atexit.unregister(self.close)
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            self.submit(self._finish(timeout)).result(timeout + 1.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout)

    async def _finish(self, timeout: float) -> None:
        closers, self._closers = self._closers, []
        for closer in reversed(closers):
            try:
                async with asyncio.timeout(timeout):
                    await closer()
            except Exception as error:  # noqa: BLE001 - one that fails must not keep the others from closing
                logger.debug("closing failed: %r", error)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def wait_sync(future: concurrent.futures.Future[T], timeout: float | None = None) -> T:
    """Wait for an engine future; on Ctrl-C or timeout cancel it and give its clean-up a moment."""
    try:
        return future.result(timeout)
    except BaseException:
        if not future.done():
            future.cancel()
            with contextlib.suppress(KeyboardInterrupt):
                concurrent.futures.wait([future], CANCEL_GRACE)
        raise


async def wait_async(future: concurrent.futures.Future[T]) -> T:
    """Await an engine future from any other loop.

    The heartbeat is what makes a kernel interrupt work: ipykernel turns SIGINT into ``call_soon`` on the loop's
    own thread, which does not wake a sleeping select; without a timer it is seen at the next event (measured: 9 s).
    """
    waiter = asyncio.wrap_future(future)
    try:
        while not waiter.done():
            await asyncio.wait({waiter}, timeout=_HEARTBEAT)
        return waiter.result()
    finally:
        if not future.done():
            future.cancel()


class Handle(Generic[T]):
    """Something running on the engine: items as they come, and a result at the end.

    Wait with ``.result()``, ``await``, ``for`` or ``async for``; leaving a loop early cancels it.

    Parameters
    ----------
    produce
        Called with the handle on the engine; an async iterator of the items.
    finish
        Makes the result out of all items.
    """

    def __init__(
        self,
        produce: Callable[[Handle[T]], AsyncIterator[Any]],
        finish: Callable[[list[Any]], T],
    ) -> None:
        self.items: list[Any] = []
        self._finish = finish
        self._news = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self.future: concurrent.futures.Future[T] = EngineLoop.get().submit(self._drive(produce))
        self.future.add_done_callback(lambda _: self._tell())

    async def _drive(self, produce: Callable[[Handle[T]], AsyncIterator[Any]]) -> T:
        async for item in produce(self):
            self.items.append(item)
            self._tell()
        return self._finish(self.items)

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
        for listener in list(self._listeners):
            listener()

    def cancel(self) -> None:
        """Stop it; waiting for it then raises `CancelledError`."""
        self.future.cancel()

    @property
    def done(self) -> bool:
        return self.future.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end. Ctrl-C cancels the work too."""
        return wait_sync(self.future, timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return wait_async(self.future).__await__()

    def __iter__(self) -> Iterator[Any]:
        position = 0
        try:
            while True:
                with self._news:
                    # The timeout lets Ctrl-C through on platforms where a lock cannot be interrupted.
                    while position >= len(self.items) and not self.future.done():
                        self._news.wait(0.5)
                if position >= len(self.items):
                    self.future.result()
                    return
                position += 1
                yield self.items[position - 1]
        finally:
            if not self.future.done():
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the listening loop was closed under us
                loop.call_soon_threadsafe(news.set)

        self._listeners.append(listener)
        position = 0
        try:
            while True:
                while position < len(self.items):
                    position += 1
                    yield self.items[position - 1]
                if self.future.done() and position >= len(self.items):
                    self.future.result()
                    return
                news.clear()
                if position < len(self.items) or self.future.done():
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_HEARTBEAT):
                        await news.wait()
        finally:
            self._listeners.remove(listener)
            if not self.future.done():
                self.cancel()
