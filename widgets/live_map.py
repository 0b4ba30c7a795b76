"""A picture that changes once a second while cells run, and stays as a still one when it is stopped.

The cell that shows it returns at once. A thread draws; it never waits for the network, only looks at what is known.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable

from nbrunner.widgets.stop import StopControls
from nbrunner.widgets.swarm_map import SwarmMap


class LiveMap:
    """A `SwarmMap` in a notebook, drawn again every ``period`` seconds until `stop`.

    Parameters
    ----------
    draw
        Called from another thread for the map of now; must not block.
    on_end
        Called once, when it has stopped for whatever reason.
    period
        Seconds between two pictures.
    longest
        Seconds after which it stops by itself: a forgotten card must not fill the kernel's output for days.
    """

    def __init__(
        self,
        draw: Callable[[], SwarmMap],
        *,
        on_end: Callable[[], None] = lambda: None,
        period: float = 1.0,
        longest: float = 12 * 3600.0,
    ) -> None:
        from IPython.display import display

        self._draw, self._on_end, self._period = draw, on_end, period
        self._until = time.monotonic() + longest
        self._last = draw()
        self._display = display(self._last.bundle(live=True), raw=True, display_id=True)
        self._controls = StopControls(self._wake)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nbrunner-map", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it still changes."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Freeze it. Returns when the still picture is in place; may be called again."""
        self._end.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _wake(self) -> None:
        self._end.set()

    def _follow(self) -> None:
        why = ""
        try:
            while not self._end.wait(self._period):
                if time.monotonic() > self._until:
                    why = "after 12 hours"
                    break
                self._last = self._draw()
                self._display.update(self._last.bundle(live=True), raw=True)
                self._controls.say("live; drawn again every second")
        except Exception as error:  # noqa: BLE001 - whatever it is, the last picture stays and says so
            why = f"because of {type(error).__name__}: {error}"
        # Outside of any cell's context: see KernelView.
        contextvars.Context().run(self._freeze, why)
        self._on_end()

    def _freeze(self, why: str) -> None:
        self._display.update(self._last.bundle(live=False), raw=True)
        stopped = " ".join(part for part in ("Stopped", why, time.strftime("%Y-%m-%d %H:%M:%S")) if part)
        self._controls.replace(f"{stopped}. %swarm map shows it live again.")
