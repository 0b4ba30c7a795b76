"""A Stop button that works while its cell runs and leaves nothing in the saved notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbrunner.widgets.page import text


class StopControls:
    """A Stop button and a line about the progress, both replaced by a footer in the end.

    A widget that stayed would show "model not found" when the notebook is opened again (measured); so what is
    saved is text.

    Parameters
    ----------
    on_stop
        Called when the button is pressed, perhaps from another thread than the kernel's main one.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        import ipywidgets
        from IPython.display import display

        self._button = ipywidgets.Button(
            description="Stop", icon="stop", tooltip="Stop; the text so far stays", layout={"width": "90px"}
        )
        self._label = ipywidgets.Label("")
        self._box = ipywidgets.HBox([self._button, self._label])
        self._on_stop = on_stop
        self._button.on_click(self._clicked)
        _answer_in_subshell(self._button)
        # Where nobody draws widgets (a terminal that follows the outputs), a widget's repr would only be noise.
        self._display = display({**self._box._repr_mimebundle_(), "text/plain": ""}, raw=True, display_id=True)

    def _clicked(self, _: Any) -> None:
        self._button.disabled = True
        self._button.description = "Stopping"
        self._on_stop()

    def say(self, note: str) -> None:
        """Show the progress."""
        if self._label.value != note:
            self._label.value = note

    def replace(self, footer: str) -> None:
        """Put ``footer`` where the button was."""
        self._display.update(
            {
                "text/plain": footer,
                "text/html": f"<div style='white-space: pre-line'><small>{text(footer)}</small></div>",
            },
            raw=True,
        )
        for widget in (self._box, self._button, self._label):
            widget.layout.close()
            widget.close()
        self._button.style.close()
        self._label.style.close()


def _answer_in_subshell(widget: Any) -> None:
    """Let a click be handled while a *blocking* cell runs, where the frontend offers a subshell for it.

    ipykernel 7.4 sends what comes from a widget back to the (busy) main shell, because that shell published last
    on its comm; JupyterLab's own choice of a subshell is better. A bonus where it exists: cells of ours are
    awaited, and then a click arrives anyway.
    """
    comm = widget.comm
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
