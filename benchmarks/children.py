"""Processes that a benchmark runs side by side: each does its part when it is told to, and answers by a line."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_MARK = "ANSWER "


class Child:
    """The other end of a child's standard input and output."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, what: object) -> None:
        """Something for the child to do; `listen` gives it there."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(what)}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The child's next `say`; what else it prints is not meant for us."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise RuntimeError("a process of the benchmark has ended")


@contextlib.contextmanager
def child(module: str, *arguments: str) -> Iterator[Child]:
    """``python -m MODULE ARGUMENTS``, which has said that it is ready; ended when the block is left."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = Child(process)
            found.answer()
            yield found
        finally:
            process.terminate()


def listen() -> Iterator[Any]:
    """In the child: what it is told, as long as there is a parent."""
    say(True)
    for line in sys.stdin:
        yield json.loads(line)


def say(what: object) -> None:
    """In the child: answer."""
    print(f"{_MARK}{json.dumps(what)}", flush=True)
