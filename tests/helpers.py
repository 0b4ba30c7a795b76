"""What several tests need: waiting for a condition, a browser, and finding what a test left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

#: Inherited by every process that a test starts, so that one whose parent was killed is still found.
RUN_MARK = "NBRUNNER_TEST_RUN"

#: Where daemons and local swarms put their sockets; hivemind's own would be in /tmp whatever TMPDIR says.
SOCKETS = ((Path("/tmp"), "hivemind-*.sock"), (Path(tempfile.gettempdir()), "nbrunner-*"))


def wait_until(
    condition: Callable[[], T | None], timeout: float = 20.0, *, what: str = "", interval: float = 0.02
) -> T:
    """The first true value of `condition`, or an AssertionError after `timeout` seconds that names `what`."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(interval)


def find_chromium() -> str | None:
    """Path of a chromium that playwright can drive, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    # Asked in a process of its own: playwright's sync API leaves a driver running until it is stopped.
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    path = answer.stdout.strip()
    return path if path and Path(path).exists() else None


def at_once(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What the jobs return, each in a thread of its own and begun together."""
    ready = threading.Barrier(len(jobs))

    def run(job: Callable[[], T]) -> T:
        ready.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def mark_this_run() -> None:
    """Mark the processes of this test run; call once, before anything is started."""
    os.environ.setdefault(RUN_MARK, uuid.uuid4().hex)


def _processes() -> dict[int, psutil.Process]:
    me = psutil.Process()
    found = {child.pid: child for child in me.children(recursive=True)}
    mark = os.environ.get(RUN_MARK)
    if mark:
        # Those whose parent died are no longer our children, but they inherited the mark.
        for process in psutil.process_iter():
            if process.pid != me.pid and process.pid not in found:
                with contextlib.suppress(psutil.Error, OSError):
                    if process.environ().get(RUN_MARK) == mark and not _is_ancestor(process, me):
                        found[process.pid] = process
    return found


def _is_ancestor(process: psutil.Process, of: psutil.Process) -> bool:
    return process in of.parents()


def _serves_the_interpreter(process: psutil.Process) -> bool:
    """Python's own helper processes, one per interpreter, which end with it."""
    command = " ".join(process.cmdline())
    return "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command


def _foreign_daemons(ours: set[int]) -> bool:
    return any(
        process.info["name"] == "p2pd" and process.pid not in ours for process in psutil.process_iter(["name"])
    )


def _socket_places() -> frozenset[str]:
    return frozenset(str(path) for folder, pattern in SOCKETS for path in folder.glob(pattern))


def _bound_sockets() -> set[str]:
    with contextlib.suppress(OSError):
        return {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    return set()


@dataclass(frozen=True)
class Leftovers:
    """What exists at one moment; `since` then lists what came later and is still there."""

    processes: frozenset[tuple[int, float]]
    threads: frozenset[threading.Thread]
    sockets: frozenset[str]

    @classmethod
    def now(cls) -> Leftovers:
        processes = set()
        for process in _processes().values():
            with contextlib.suppress(psutil.Error):
                processes.add((process.pid, process.create_time()))
        threads = frozenset(threading.enumerate())
        return cls(frozenset(processes), threads, _socket_places())

    def since(self) -> list[str]:
        """One line for each thing that is there now and was not then; empty if the place is clean."""
        lines = [
            f"thread {thread.name!r} (not a daemon: it keeps the interpreter alive)"
            for thread in threading.enumerate()
            if thread not in self.threads
            and not thread.daemon
            and thread.is_alive()
            # workers of a loop's own executor: the engine's loop lives as long as the process, and so do they
            and not thread.name.startswith("asyncio_")
        ]
        processes = _processes()
        for process in processes.values():
            with contextlib.suppress(psutil.Error):
                if (process.pid, process.create_time()) in self.processes or _serves_the_interpreter(process):
                    continue
                command = " ".join(process.cmdline())[:200] or process.name()
                lines.append(f"process {process.pid} ({process.status()}): {command}")
        strays = _socket_places() - self.sockets
        # A name does not say whose it was: while another swarm runs on this machine, it may be that one's.
        if strays and not _foreign_daemons(set(processes)):
            bound = _bound_sockets()
            lines += [
                f"sockets at {path}" for path in sorted(strays) if not any(name.startswith(path) for name in bound)
            ]
        return lines

    def wait_until_gone(self, timeout: float) -> list[str]:
        """What is still left after at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        left = self.since()
        while left and time.monotonic() < deadline:
            # Models that close their connection when they are collected often sit in reference cycles.
            gc.collect()
            time.sleep(0.05)
            left = self.since()
        return left
