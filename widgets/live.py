"""Text that grows in a cell's output and stays there, stored in the notebook as text.

A thread looks at the text at most ten times a second and publishes it when it has changed. It is not published as
tokens come: a flood of updates loses messages, ``status: idle`` among them, and the cell then shows [*] for ever
(measured); and whoever computes must not wait for a display.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nbrunner.widgets.page import text as escape
from nbrunner.widgets.stop import StopControls


class LiveView(Protocol):
    """Where a growing text is shown."""

    def finish(self, text: str, footer: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Show the last state; the Stop button goes, ``footer`` takes its place."""


class KernelView:
    """In a notebook: one display for the text, one for Stop and then the footer.

    Parameters
    ----------
    text, note
        Called from another thread for what to show now: the text, and one line about its progress.
    refresh
        Seconds between two updates.
    on_stop
        What the Stop button does; called from any thread.
    """

    def __init__(
        self, text: Callable[[], str], note: Callable[[], str], *, refresh: float, on_stop: Callable[[], None]
    ) -> None:
        from IPython.display import display

        self._read, self._note, self._refresh = text, note, refresh
        self._display = display({"text/plain": ""}, raw=True, display_id=True)
        self._controls = StopControls(on_stop)
        self._shown = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nbrunner-display", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._end.wait(self._refresh):
            text = self._read()
            if text != self._shown:
                self._show(text)
            self._controls.say(self._note())

    def _show(self, text: str, metadata: Mapping[str, Any] | None = None) -> None:
        self._shown = text
        data = {"text/plain": text, "text/html": f"<div style='white-space: pre-wrap'>{escape(text)}</div>"}
        self._display.update(data, raw=True, metadata=dict(metadata or {}))

    def finish(self, text: str, footer: str, metadata: Mapping[str, Any] | None = None) -> None:
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join(5)
        # ipykernel keeps the cell an update belongs to in a context variable. Frontends find the display by its id
        # wherever the update comes from, but nbclient listens only to the cell that runs now; outside of any
        # context, that is where the update goes.
        contextvars.Context().run(self._replace, text, footer, metadata)

    def _replace(self, text: str, footer: str, metadata: Mapping[str, Any] | None) -> None:
        self._show(text, metadata)
        self._controls.replace(footer)


class TerminalView:
    """In a terminal: what is new is printed; nothing can be changed afterwards.

    Parameters are those of `KernelView`; ``quiet`` prints only the end (for runs in the background, which must not
    write into the line being typed).
    """

    def __init__(self, text: Callable[[], str], *, refresh: float, quiet: bool = False) -> None:
        self._read, self._refresh, self._quiet = text, refresh, quiet
        self._shown = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nbrunner-display", daemon=True)
        if not quiet:
            self._thread.start()

    def _follow(self) -> None:
        while not self._end.wait(self._refresh):
            self._print(self._read())

    def _print(self, text: str) -> None:
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)

    def finish(self, text: str, footer: str, metadata: Mapping[str, Any] | None = None) -> None:
        if self._end.is_set():
            return
        self._end.set()
        if not self._quiet:
            self._thread.join(5)
        self._print(f"{text}\n{footer}\n")


class Notice:
    """One line about what is being done, and then what became of it: *starting …*, *starting … ready*."""

    def __init__(self, text: str, *, updates: bool) -> None:
        from IPython.display import display

        self._text, self._updates = text, updates
        self._display = display(_line(text), raw=True, display_id=True)

    def add(self, text: str) -> None:
        """Go on with the line; in a terminal, on the next one."""
        self._text += text
        if self._updates:
            self._display.update(_line(self._text), raw=True)
        else:
            sys.stdout.write(f"{text.strip()}\n")


def _line(text: str) -> dict[str, str]:
    return {"text/plain": text, "text/html": f"<div><small>{escape(text)}</small></div>"}
