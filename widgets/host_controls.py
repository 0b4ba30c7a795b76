"""The card of a hosted server in a cell, kept true while it runs, with buttons."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from nbrunner.errors import NBRunnerError
from nbrunner.hosting_status import HostStatus
from nbrunner.widgets.host_card import HostCard, log_html
from nbrunner.widgets.page import page

REFRESH_SECONDS = 1.0
_NAMES = ("pause", "resume", "drain", "stop")
_HINTS = {
    "pause": "Take no new sessions; those that are open go on",
    "resume": "Take new sessions again",
    "drain": "Let open sessions move to other servers, then end",
    "stop": "End now; clients rebuild their sessions elsewhere",
}
_ICONS = {"pause": "pause", "resume": "play", "drain": "sign-out", "stop": "stop"}


class Hosted(Protocol):
    """What the card needs of a server: `nbrunner.hosting.HostedServer` has it."""

    ends_at: float | None

    @property
    def status(self) -> HostStatus:
        """Facts of now."""
        ...

    @property
    def log(self) -> str:
        """Its last lines."""
        ...

    def pause(self) -> None:
        """See `nbrunner.hosting.HostedServer`."""

    def resume(self) -> None:
        """See `nbrunner.hosting.HostedServer`."""

    def drain(self) -> None:
        """See `nbrunner.hosting.HostedServer`."""

    def stop(self) -> None:
        """See `nbrunner.hosting.HostedServer`."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `nbrunner.hosting.HostedServer`."""


def allowed(state: str) -> tuple[str, ...]:
    """Which buttons make sense in a state."""
    return {
        "starting": ("stop",),
        "online": ("pause", "drain", "stop"),
        "paused": ("resume", "drain", "stop"),
        "draining": ("stop",),
    }.get(state, ())


class LiveHostCard:
    """Three displays: the card, the buttons, the log. The log has its own so that it stays unfolded.

    Parameters
    ----------
    server
        What is shown, and told what the buttons say.
    title
        Of the card.
    """

    def __init__(self, server: Hosted, title: str) -> None:
        from IPython.display import display

        self._server, self._title = server, title
        self._html = self._log = ""
        self._end = threading.Event()
        self._closing = threading.Lock()
        self._card_display = display(self._card(), raw=True, display_id=True)
        self._make_buttons()
        self._log_display = display(self._log_bundle(), raw=True, display_id=True)
        self._thread = threading.Thread(target=self._follow, name="nbrunner-host-card", daemon=True)
        self._thread.start()
        server.on_change(self._changed)
        self._changed()

    def _make_buttons(self) -> None:
        import ipywidgets
        from IPython.display import display

        self._buttons = {
            name: ipywidgets.Button(
                description=name.capitalize(), icon=_ICONS[name], tooltip=_HINTS[name], layout={"width": "100px"}
            )
            for name in _NAMES
        }
        self._note = ipywidgets.Label("")
        row = [*self._buttons.values(), self._note]
        self._box = ipywidgets.HBox(row, layout={"flex_flow": "row wrap"})
        for name, button in self._buttons.items():
            button.on_click(lambda _, name=name: self._press(name))
        self._enable()
        bundle = {**self._box._repr_mimebundle_(), "text/plain": ""}
        self._button_display = display(bundle, raw=True, display_id=True)

    def _press(self, name: str) -> None:
        """Do it in a thread: a click must never keep the kernel from running cells."""

        def work() -> None:
            self._note.value = ""
            try:
                getattr(self._server, name)()
            except NBRunnerError as error:
                self._note.value = str(error)

        threading.Thread(target=work, name=f"nbrunner-host-{name}", daemon=True).start()

    def _enable(self) -> None:
        may = allowed(self._server.status.state)
        for name, button in self._buttons.items():
            if button.disabled == (name in may):
                button.disabled = name not in may

    def _follow(self) -> None:
        while not self._end.wait(REFRESH_SECONDS / 2):
            self._update()

    def _changed(self) -> None:
        """Called by the server's thread, which waits: whoever waited for the end finds the card frozen."""
        if self._server.status.state in ("ended", "failed"):
            self.close()

    def _update(self) -> None:
        self._enable()
        bundle = self._card()
        if bundle["text/html"] != self._html:
            self._html = bundle["text/html"]
            self._card_display.update(bundle, raw=True)
        if self._server.log != self._log:
            self._log_display.update(self._log_bundle(), raw=True)

    def _freeze(self) -> None:
        """Only text and pictures stay; a widget without its kernel would show an error in their place."""
        self._update()
        self._button_display.update({"text/plain": "", "text/html": "<div></div>"}, raw=True)
        for widget in (self._box, self._note, *self._buttons.values()):
            for part in ("style", "layout"):
                if hasattr(widget, part):
                    getattr(widget, part).close()
            widget.close()

    def _card(self) -> dict[str, Any]:
        card = HostCard(self._title, self._server.status, self._server.ends_at, time.time())
        return {"text/plain": repr(card), "text/html": card.html(log=False)}

    def _log_bundle(self) -> dict[str, Any]:
        self._log = self._server.log
        return {"text/plain": "", "text/html": page(log_html(self._log))}

    def close(self, timeout: float = 3.0) -> None:
        """Freeze it as it is; the server goes on."""
        with self._closing:
            if self._end.is_set():
                return
            self._end.set()
            self._thread.join(timeout)
            contextvars.Context().run(self._freeze)  # why: see `nbrunner.widgets.live`
