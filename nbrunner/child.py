"""A server as a child process: start it so that it ends with us, hear what it says, tell it what to do."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nbrunner.errors import ServerStartError

START_SECONDS = 120.0
"""For a server to be ready. A small one takes five; a big one reads its weights first."""

_LOG_LINES = 400
_LONGEST_LINE = 2000


class LocalServer:
    """A server process that this one has started.

    Attributes
    ----------
    pid : int
    blocks : tuple of int
        ``(start, end)``.
    peer_id : str
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        blocks: tuple[int, int],
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.blocks = blocks
        self.peer_id = ""
        self.addresses: list[str] = []
        self._process = process
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._on_event = on_event
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"server-{process.pid}", daemon=True)
        self._logger = threading.Thread(target=self._read_log, name=f"server-log-{process.pid}", daemon=True)
        self._reader.start()
        self._logger.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has logged so far (the last 400 lines)."""
        return "\n".join(list(self._lines))

    def kill(self) -> None:
        """End it at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._close_pipes()

    def end(self) -> None:
        """Begin to `kill` it; does not wait."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def stop(self, timeout: float = 35.0) -> None:
        """Ask it to leave: it drains its sessions, says goodbye and ends."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes()

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        stdin = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended, or its pipes are closed
                stdin.write(line.encode() + b"\n")
                stdin.flush()

    def wait_for(self, event: str, deadline: float) -> dict[str, Any]:
        """The facts of an event it prints; `ServerStartError` with its log if it ends or the time is over."""
        while True:
            try:
                found = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ServerStartError(
                    f"a local server was not {event} within {START_SECONDS:.0f} s. The end of its log:\n{self.log}",
                    log=self.log,
                ) from None
            if found is None:
                code = self._process.wait()
                self._logger.join(1.0)
                last = next((line for line in reversed(self.log.splitlines()) if line.strip()), "it logged nothing")
                raise ServerStartError(
                    f"a local server ended with exit code {code} before it was {event}: {last.strip()}",
                    log=self.log,
                )
            if found.get("event") == event:
                return found

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - we asked for a pipe
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if self._on_event is None or event.get("event") in ("joined", "ready"):
                    self._events.put(event)
                if self._on_event is not None:
                    self._on_event(event)
        self._events.put(None)

    def _read_log(self) -> None:
        """Keep the end of its log in memory: a file would stay behind when this process is killed."""
        assert self._process.stderr is not None  # noqa: S101 - we asked for a pipe
        for line in iter(lambda: self._process.stderr.readline(_LONGEST_LINE), b""):  # type: ignore[union-attr]
            self._lines.append(line.decode(errors="replace").rstrip())

    def _close_pipes(self) -> None:
        self._reader.join(1.0)
        self._logger.join(1.0)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __repr__(self) -> str:
        state = "" if self.alive else ", ended"
        return f"<LocalServer pid {self.pid}, blocks {self.blocks[0]}:{self.blocks[1]}{state}>"


class Spawner:
    """Starts processes from a thread that lives as long as they may.

    A server asks the kernel to be woken when its parent dies, and p2pd to be killed; to the kernel the parent is
    the *thread* that started it: one started from a worker thread would be told so when that thread is done.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="nbrunner-spawner", daemon=True)
        self._thread.start()

    def popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        answer: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()

        def job() -> None:
            try:
                answer.put(subprocess.Popen(command, **options))
            except OSError as error:
                answer.put(error)

        self._jobs.put(job)
        started = answer.get()
        if isinstance(started, OSError):
            raise ServerStartError(f"a server process could not be started: {started}")
        return started

    def close(self) -> None:
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while job := self._jobs.get():
            job()


def serve_command(model: str, *options: str) -> list[str]:
    """The command line of a server that is managed by the process that starts it."""
    return [sys.executable, "-m", "nbrunner", "serve", model, "--managed", "--json", *options]


def start_server(
    spawner: Spawner,
    command: list[str],
    blocks: tuple[int, int],
    *,
    threads: int,
    environment: dict[str, str] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> LocalServer:
    """Start a server process in a session of its own: a notebook's Stop button interrupts the process group."""
    # Servers that share cores: a thread that spins at a barrier takes the time of another server.
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    process = spawner.popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=variables,
    )
    return LocalServer(process, blocks, on_event=on_event)
