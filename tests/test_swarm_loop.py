from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from nbrunner.errors import SessionError
from nbrunner.swarm.loop import EngineLoop, Handle, wait_async


@pytest.fixture
def interrupt() -> Iterator[Any]:
    """Ctrl-C, a moment after it is asked for."""
    timers: list[threading.Timer] = []

    def later(seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        timers.append(timer)

    yield later
    for timer in timers:
        timer.cancel()
        timer.join()


class Work:
    """A coroutine that lasts until it is cancelled, and tells that it was."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def count(to: int, cancelled: threading.Event | None = None, forever: bool = False) -> AsyncIterator[int]:
    try:
        for number in range(to):
            await asyncio.sleep(0)
            yield number
        if forever:
            await asyncio.sleep(60)
    except asyncio.CancelledError:
        if cancelled:
            cancelled.set()
        raise


def test_one_engine_per_process() -> None:
    engine = EngineLoop.get()
    assert EngineLoop.get() is engine
    assert engine.thread.daemon

    async def where() -> tuple[str, bool]:
        return threading.current_thread().name, asyncio.get_running_loop() is engine.loop

    assert engine.run(where()) == ("nbrunner-engine", True)


def test_no_policy_is_set() -> None:
    EngineLoop.get()
    assert "uvloop" not in type(asyncio.get_event_loop_policy()).__module__


def test_processes_can_be_started_and_are_reaped_off_the_main_thread() -> None:
    async def start() -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", "print(1); raise SystemExit(3)", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output

    assert EngineLoop.get().run(start(), 20) == (3, b"1\n")


def test_results_and_errors_come_through() -> None:
    async def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        EngineLoop.get().run(fail())


def test_a_timeout_cancels() -> None:
    work = Work()
    with pytest.raises(TimeoutError):
        EngineLoop.get().run(work(), timeout=0.1)
    assert work.cancelled.wait(2)


def test_an_interrupt_cancels(interrupt: Any) -> None:
    work = Work()
    interrupt(0.2)
    with pytest.raises(KeyboardInterrupt):
        EngineLoop.get().run(work())
    assert work.cancelled.wait(2)


def test_blocking_on_the_engine_itself_is_refused() -> None:
    engine = EngineLoop.get()

    async def blocking() -> None:
        engine.run(asyncio.sleep(0))

    with pytest.raises(SessionError, match="wait for itself"):
        engine.run(blocking())


def test_cancelling_what_another_thread_waits_for() -> None:
    work, engine, seen = Work(), EngineLoop.get(), []

    def wait() -> None:
        try:
            engine.run(work())
        except concurrent.futures.CancelledError as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert work.started.wait(5)
    engine.cancel_thread(thread)
    thread.join(5)
    assert len(seen) == 1
    assert work.cancelled.wait(2)
    engine.cancel_thread(threading.current_thread())  # waits for nothing: nothing happens


def test_waiting_for_the_first_of_several() -> None:
    engine, work = EngineLoop.get(), Work()
    slow = engine.submit(work())
    quick = engine.submit(asyncio.sleep(0, 3))
    assert engine.wait_any([slow, quick]) is quick
    assert not slow.done()
    timer = threading.Timer(0.1, engine.cancel_thread, [threading.current_thread()])
    timer.start()
    assert engine.wait_any([slow]) is slow
    assert slow.cancelled()
    timer.join()


def test_awaiting_from_another_loop() -> None:
    async def there() -> str:
        await asyncio.sleep(0.05)
        return threading.current_thread().name

    async def here() -> str:
        return await wait_async(EngineLoop.get().submit(there()))

    assert asyncio.run(here()) == "nbrunner-engine"


def test_cancelling_the_one_who_awaits_cancels_the_work() -> None:
    work = Work()

    async def here() -> None:
        async with asyncio.timeout(0.2):
            await wait_async(EngineLoop.get().submit(work()))

    with pytest.raises(TimeoutError):
        asyncio.run(here())
    assert work.cancelled.wait(2)


def test_closing_runs_closers_backwards_and_cancels_the_rest() -> None:
    engine, order, work = EngineLoop(), [], Work()

    def closer(name: str, fails: bool = False) -> Any:
        async def close() -> None:
            order.append(name)
            if fails:
                raise ValueError(name)

        return close

    engine.on_close(closer("first"))
    engine.on_close(closer("second", fails=True))
    engine.on_close(closer("third"))
    future = engine.submit(work())
    assert work.started.wait(5)
    engine.close()
    assert order == ["third", "second", "first"]
    assert work.cancelled.is_set()
    assert future.cancelled()
    assert not engine.thread.is_alive()
    assert engine.loop.is_closed()
    engine.close()


def test_a_closer_that_hangs_is_left() -> None:
    engine = EngineLoop()

    async def hang() -> None:
        await asyncio.sleep(60)

    engine.on_close(hang)
    began = time.monotonic()
    engine.close(timeout=0.3)
    assert time.monotonic() - began < 3
    assert not engine.thread.is_alive()


def test_a_forked_child_has_an_engine_of_its_own() -> None:
    code = """
import os, asyncio
from nbrunner.swarm.loop import EngineLoop
engine = EngineLoop.get()
async def pid(): return os.getpid()
assert engine.run(pid()) == os.getpid()
child = os.fork()
if child == 0:
    assert EngineLoop.get() is not engine
    ok = EngineLoop.get().run(pid(), 5) == os.getpid()
    EngineLoop.get().close()
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert EngineLoop.get() is engine and engine.run(pid(), 5) == os.getpid()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_process_ends_while_work_goes_on() -> None:
    code = """
import asyncio, sys
from nbrunner.swarm.loop import EngineLoop
async def bye(): print("closed", flush=True)
EngineLoop.get().on_close(bye)
EngineLoop.get().submit(asyncio.sleep(60))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.stdout == "closed\n", done.stderr
    assert done.returncode == 0
    assert time.monotonic() - began < 30


# -- handles -----------------------------------------------------------------------------------------------------


def test_a_handle_in_every_way() -> None:
    handles = [Handle(lambda _: count(5), sum) for _ in range(4)]
    assert handles[0].result(5) == 10
    assert list(handles[1]) == [0, 1, 2, 3, 4]
    assert list(handles[1]) == [0, 1, 2, 3, 4], "again, from what it kept"

    async def here() -> tuple[list[int], int]:
        return [item async for item in handles[2]], await handles[3]

    assert asyncio.run(here()) == ([0, 1, 2, 3, 4], 10)
    assert all(handle.done for handle in handles)
    assert handles[0].items == [0, 1, 2, 3, 4]


def test_errors_come_after_the_items_that_were_made() -> None:
    async def fail(_: Any) -> AsyncIterator[int]:
        yield 1
        raise KeyError("inside")

    seen: list[int] = []
    handle: Handle[int] = Handle(fail, sum)
    with pytest.raises(KeyError):
        seen.extend(handle)
    with pytest.raises(KeyError):
        handle.result()

    async def here() -> None:
        items = aiter(handle)
        seen.append(await anext(items))
        await anext(items)

    with pytest.raises(KeyError):
        asyncio.run(here())
    assert seen == [1, 1]


def test_leaving_a_loop_cancels() -> None:
    for leave in ("for", "async for"):
        cancelled = threading.Event()
        handle = Handle(lambda _, cancelled=cancelled: count(3, cancelled, forever=True), sum)  # type: ignore[misc]

        async def here(handle: Any = handle) -> None:
            items = aiter(handle)
            async for item in items:
                if item == 2:
                    break
            await items.aclose()

        if leave == "for":
            for item in handle:
                if item == 2:
                    break
        else:
            asyncio.run(here())
        assert cancelled.wait(2), leave
        with pytest.raises(concurrent.futures.CancelledError):
            handle.result(2)


def test_an_interrupt_ends_a_loop_over_a_handle(interrupt: Any) -> None:
    cancelled = threading.Event()
    handle = Handle(lambda _: count(3, cancelled, forever=True), sum)
    seen = []
    interrupt(0.3)
    with pytest.raises(KeyboardInterrupt):
        seen.extend(item for item in handle)
    assert seen == [0, 1, 2]
    assert cancelled.wait(2)


def test_cancel() -> None:
    cancelled = threading.Event()
    handle = Handle(lambda _: count(1, cancelled, forever=True), sum)
    next(iter(handle.items), None)
    handle.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result(5)
    assert handle.done
