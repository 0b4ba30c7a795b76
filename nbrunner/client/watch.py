"""Who did what in the passes of one thread, and how long it waited for them: where the time of training goes.

Set in a context variable, which the engine's tasks inherit from the call that starts them, so that nothing between
the training loop and a single request has to know.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from nbrunner.client.runner import Pass

_current: ContextVar[PassWatch | None] = ContextVar("nbrunner_pass_watch", default=None)


@dataclass
class PassWatch:
    """The passes of `watching` contexts so far.

    Attributes
    ----------
    passes : list of Pass
        Answered requests, in the order in which they were answered; of one step, several may run at once.
    waited : float
        Seconds in which the thread did nothing but wait for them.
    """

    passes: list[Pass] = field(default_factory=list)
    waited: float = 0.0

    def take(self) -> PassWatch:
        """What there is, and begin again."""
        taken = PassWatch(self.passes, self.waited)
        self.passes, self.waited = [], 0.0
        return taken


def current_watch() -> PassWatch | None:
    """The watch of this context, if there is one."""
    return _current.get()


@contextlib.contextmanager
def watching(watch: PassWatch | None) -> Iterator[None]:
    """Have the passes that are asked for inside noted in a watch."""
    token = _current.set(watch)
    try:
        yield
    finally:
        _current.reset(token)


def note_pass(done: Pass) -> None:
    """Called for every answered request."""
    watch = _current.get()
    if watch is not None:
        watch.passes.append(done)


@contextlib.contextmanager
def waiting(watch: PassWatch | None) -> Iterator[None]:
    """The thread waits inside."""
    began = time.perf_counter()
    try:
        with watching(watch):
            yield
    finally:
        if watch is not None:
            watch.waited += time.perf_counter() - began
