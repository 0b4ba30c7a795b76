"""The card of a training run in a cell: it follows, is told what to do, and stays as a picture and a table."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbrunner.errors import NBRunnerError
from nbrunner.widgets.page import page
from nbrunner.widgets.tune_card import TuneCard, card_of

if TYPE_CHECKING:
    from nbrunner.tuning.run import TrainingRun

REFRESH_SECONDS = 1.0
_ENDED = ("stopped", "done", "failed")
_HINTS = {
    "pause": "Wait after this step; nothing is held on any server meanwhile",
    "resume": "Go on; after an error, with the step that could not be made",
    "checkpoint": "Write a checkpoint before the next step",
    "sample": "Answer the sample prompts before the next step",
    "stop": "End after this step, with a checkpoint; again: at once",
}
_WIDTHS = {"checkpoint": "124px"}
"""All five fit beside each other in a page 700 pixels wide."""
_ICONS = {"pause": "pause", "resume": "play", "checkpoint": "save", "sample": "comment", "stop": "stop"}


def allowed(state: str, *, samples: bool) -> frozenset[str]:
    """Which buttons make sense in a state."""
    if state in _ENDED:
        return frozenset()
    names = {"checkpoint", "stop"} | ({"sample"} if samples else set())
    if state in ("starting", "running"):
        names.add("pause")
    if state in ("paused", "pausing"):
        names.add("resume")
    return frozenset({"stop"} if state == "stopping" else names)


class LiveTuneCard:
    """Four displays: the curves, the controls (until the end), the facts, the answers and at the end a table.

    Parameters
    ----------
    run
        What is shown, and told what the controls say.
    """

    def __init__(self, run: TrainingRun) -> None:
        from IPython.display import display

        self._run = run
        self._end = threading.Event()
        self._closing = threading.Lock()
        self._shown: dict[str, str] = {}
        card = card_of(run)
        self._picture = display(_picture(card, live=True), raw=True, display_id=True)
        self._make_controls()
        self._body = display(_html(card.body_html()), raw=True, display_id=True)
        self._answers = display(_html(_samples(card)), raw=True, display_id=True)
        self._thread = threading.Thread(target=self._follow, name="nbrunner-tune-card", daemon=True)
        self._thread.start()
        run.on_change(self._changed)
        self._changed()

    def _make_controls(self) -> None:
        import ipywidgets
        from IPython.display import display

        self._buttons = {
            name: ipywidgets.Button(
                description=name.capitalize(),
                icon=_ICONS[name],
                tooltip=hint,
                layout={"width": _WIDTHS.get(name, "102px")},
            )
            for name, hint in _HINTS.items()
        }
        for name, button in self._buttons.items():
            button.on_click(lambda _, name=name: self._press(name))
        exponent = _exponent(self._run.lr)
        self._slider = ipywidgets.FloatLogSlider(
            value=self._run.lr,
            min=exponent - 3,
            max=exponent + 1,
            step=0.05,
            readout_format=".2e",
            description="learning rate",
            tooltip="From the next step on; the schedule keeps its shape",
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "min(420px, 100%)"},
        )
        self._slider.observe(self._slid, names=["value"])
        self._note = ipywidgets.Label("")
        row = ipywidgets.HBox([*self._buttons.values()], layout={"flex_flow": "row wrap"})
        # beside the slider: a line of its own would be an empty one most of the time
        told = ipywidgets.HBox([self._slider, self._note], layout={"flex_flow": "row wrap"})
        self._box = ipywidgets.VBox([row, told])
        self._rows = (row, told)
        self._enable()
        bundle = {**self._box._repr_mimebundle_(), "text/plain": ""}
        self._controls = display(bundle, raw=True, display_id=True)

    # -- told ----------------------------------------------------------------------------------------------------

    def _press(self, name: str) -> None:
        """In a thread: a click must never keep the kernel from running cells."""

        def work() -> str:
            if name == "checkpoint":
                return f"written: {self._run.checkpoint().result(600).name}"
            if name == "sample":
                self._run.sample().result(600)
                return ""
            getattr(self._run, name)()
            return ""

        self._in_thread(name, work)

    def _slid(self, change: Any) -> None:
        self._in_thread("lr", lambda: self._set_lr(float(change["new"])))

    def _set_lr(self, lr: float) -> str:
        self._run.set_lr(lr)
        return f"learning rate {lr:.3g} from the next step on"

    def _in_thread(self, name: str, work: Callable[[], str]) -> None:
        def tell() -> None:
            try:
                told = work()
            except (NBRunnerError, TimeoutError, OSError) as error:
                told = str(error)
            if told and not self._end.is_set():  # nothing to say must not hide what another button said meanwhile
                self._note.value = told

        self._note.value = ""
        threading.Thread(target=tell, name=f"nbrunner-tune-{name}", daemon=True).start()

    # -- shown ---------------------------------------------------------------------------------------------------

    def _enable(self) -> None:
        state = self._run.state
        may = allowed(state, samples=bool(self._run.settings.samples))
        for name, button in self._buttons.items():
            if button.disabled == (name in may):
                button.disabled = name not in may
        words = "Stop now" if state == "stopping" else "Stop"
        if self._buttons["stop"].description != words:
            self._buttons["stop"].description = words

    def _follow(self) -> None:
        while not self._end.wait(REFRESH_SECONDS):
            self._update()

    def _changed(self) -> None:
        """Called in the run's thread, which waits at its end: whoever waited for the run finds the card frozen."""
        if self._run.state in _ENDED:
            self.close()

    def _update(self) -> None:
        self._enable()
        card = card_of(self._run)
        self._show(self._picture, "picture", _picture(card, live=True))
        self._show(self._body, "body", _html(card.body_html()))
        self._show(self._answers, "answers", _html(_samples(card)))

    def _show(self, display: Any, name: str, bundle: dict[str, str]) -> None:
        if self._shown.get(name) != bundle["text/html"]:
            self._shown[name] = bundle["text/html"]
            display.update(bundle, raw=True)

    def _freeze(self) -> None:
        """Only text and pictures stay; a widget without its kernel would show an error in their place."""
        card = card_of(self._run)
        self._picture.update(_picture(card, live=False), raw=True)
        self._body.update({"text/html": card.body_html(), "text/plain": ""}, raw=True)
        self._answers.update(_html(page(card.samples_html(), card.table_html())), raw=True)
        self._controls.update(_html("<div></div>"), raw=True)
        for widget in (self._box, *self._rows, self._slider, self._note, *self._buttons.values()):
            for part in ("style", "layout"):
                if hasattr(widget, part):
                    getattr(widget, part).close()
            widget.close()

    def close(self, timeout: float = 5.0) -> None:
        """Freeze it as it is; the run goes on."""
        with self._closing:
            if self._end.is_set():
                return
            self._end.set()
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout)
            contextvars.Context().run(self._freeze)  # why: see `nbrunner.widgets.live`


def _picture(card: TuneCard, *, live: bool) -> dict[str, str]:
    """A live one is part of the page, where it follows theme and width; at rest it is an image, for GitHub too."""
    bundle = {"image/svg+xml": card.svg(), "text/plain": repr(card)}
    if live:
        bundle["text/html"] = page(card.picture_html())
    return bundle


def _samples(card: TuneCard) -> str:
    found = card.samples_html()
    return page(found) if found else "<div></div>"


def _html(content: str) -> dict[str, str]:
    return {"text/html": content, "text/plain": ""}


def _exponent(lr: float) -> int:
    import math

    return math.floor(math.log10(lr))
