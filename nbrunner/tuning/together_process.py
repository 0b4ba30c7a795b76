"""The child process that averages, as its parent holds it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

from nbrunner.child import Spawner
from nbrunner.errors import NBRunnerError, ServerStartError
from nbrunner.protocol.together import MAX_VALUES
from nbrunner.tuning.together_channel import Account, AnySaid, Called, Leave, Said, encode, read, reader

_FOLDER = "NBRUNNER_TOGETHER_FOLDER"  # as in together_child, which must not be imported here: it loads hivemind
_LOG_LINES = 200
_LONGEST_LINE = 2000
_LEAVE_SECONDS = 4.0
_LOOK_SECONDS = 0.5  # so often, whoever waits looks whether the process is still there


class TogetherProcess:
    """Starts the child, and hears what it says.

    Parameters
    ----------
    on_called, on_account
        Called from a thread of ours with what `Called` and `Account` say.
    """

    def __init__(self, on_called: Callable[[bool], None], on_account: Callable[[Account], None]) -> None:
        self._on_called = on_called
        self._on_account = on_account
        self._answers: queue.Queue[Said | None] = queue.Queue()
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="nbrunner-together-", ignore_cleanup_errors=True)
        self._spawner = Spawner()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self._folder.name, _FOLDER: self._folder.name}
        try:
            self._process = self._spawner.popen(
                [sys.executable, "-m", "nbrunner.tuning.together_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
                env=variables,
            )
        except BaseException:
            self._spawner.close()
            self._folder.cleanup()
            raise
        self._threads = [
            threading.Thread(target=target, name=f"together-{what}-{self.pid}", daemon=True)
            for what, target in (("said", self._listen), ("log", self._read_log))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """The end of what it logged."""
        return "\n".join(list(self._lines))

    def say(self, message: AnySaid, body: bytes | memoryview = b"") -> None:
        """Write a message; nothing happens if the child has ended."""
        stdin = self._process.stdin
        if stdin is None:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):
            for buffer in encode(message, body):
                view, at = memoryview(buffer), 0
                while at < len(view):
                    at += stdin.write(view[at:]) or 0

    def forget_answers(self) -> None:
        """Drop answers that nobody waited for."""
        with contextlib.suppress(queue.Empty):
            while True:
                if self._answers.get_nowait() is None:
                    self._answers.put(None)
                    return

    def answer(self, seconds: float) -> Said:
        """The next answer.

        Raises
        ------
        ServerStartError
            The child has ended, with its log.
        TimeoutError
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                said = self._answers.get(timeout=min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0.0)))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no answer within {seconds:.0f} s") from None
                continue
            if said is None:
                self._answers.put(None)  # for whoever asks next
                self._process.wait()
                raise ServerStartError(
                    f"the process that averages with the others has ended: {self._last_line()}", log=self.log
                )
            return said

    def close(self) -> None:
        """Let it take its leave; then it is ended, and its files are gone."""
        if self.alive:
            self.say(Leave())
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                with self._lock:
                    self._process.stdin.close()
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._spawner.close()
        self._folder.cleanup()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        take = reader(self._process.stdout)
        with contextlib.suppress(ValueError, OSError):
            while said := read(take, 4 * MAX_VALUES):
                message = said[0]
                if isinstance(message, Called):
                    self._on_called(message.called)
                elif isinstance(message, Account):
                    self._on_account(message)
                else:
                    self._answers.put(said)
        self._answers.put(None)

    def _read_log(self) -> None:
        pipe = self._process.stderr
        if pipe is None:
            return
        with contextlib.suppress(ValueError, OSError), open(pipe.fileno(), "rb", closefd=False) as buffered:
            for line in iter(lambda: buffered.readline(_LONGEST_LINE), b""):
                self._lines.append(line.decode(errors="replace").rstrip())

    def _last_line(self) -> str:
        self._threads[1].join(1.0)
        return next((line.strip() for line in reversed(self._lines) if line.strip()), "it logged nothing")


def raise_failure(kind: str, reason: str) -> None:
    """Raise what failed in the child, as the exception that it was."""
    from nbrunner import errors

    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NBRunnerError):
        raise found(reason)
    raise ServerStartError(reason)
