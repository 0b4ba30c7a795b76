"""The explorer: a trace, or two, as a map of layers × tokens to look into, patch and steer.

What a cell shows is one stand-alone page with its data inside, so that the saved notebook shows it with any kernel
or none. The kernel's side is a widget *without a view*: where its model lives in the same page, the two find each
other and new runs are possible; when it is gone, everything else still works.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import math
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.widgets.explorer_data import Packed, changed_cells, compared, pack
from nbrunner.widgets.explorer_page import document, fragment, script, style
from nbrunner.widgets.explorer_runs import KEEP, MAX_STRENGTH, Cell, again, model_of, patched, read_cell, steered

if TYPE_CHECKING:
    from nbrunner.client.trace import Trace


MOST_PINS = 6


class _Link(anywidget.AnyWidget):  # type: ignore[misc]
    """The kernel's side. With ``data`` it has a view too, for front ends whose outputs are pages of their own."""

    key = traitlets.Unicode().tag(sync=True)
    metas = traitlets.List().tag(sync=True)
    data = traitlets.Bytes(b"").tag(sync=True)
    view = traitlets.Dict().tag(sync=True)


class Explorer:
    """Traces to look into. Made by `explore`.

    Attributes
    ----------
    traces : list of Trace
        The runs; the last patched run comes behind them.
    selection : list of dict
        The pinned cells: ``trace`` (which run), ``layer``, ``position``.
    state : dict
        The rest of what was chosen in the page: ``source``, ``target``, ``statistic``. Where the explorer is shown
        again, it begins with these and with the selection.
    error : str
        Why the last new run did not work; empty if it did.
    """

    def __init__(self, traces: Sequence[Trace], titles: Sequence[str] = ()) -> None:
        if not 1 <= len(traces) <= 2:
            raise UserInputError(f"one trace is shown, or two are compared; not {len(traces)}")
        self._titles = [*titles] if titles else _titles(traces)
        self._count = len(traces)
        self.traces = list(traces)
        self.selection: list[dict[str, int]] = []
        self.state: dict[str, Any] = {"source": None, "target": None, "statistic": "probability"}
        self.error = ""
        self.note = compared(*traces).reason if len(traces) == 2 else ""
        self._packed: list[Packed] = [
            pack(one, title=title) for one, title in zip(traces, self._titles, strict=True)
        ]
        self._key = secrets.token_hex(8)
        self._link: Any = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None

    @property
    def trace(self) -> Trace:
        """The first run."""
        return self.traces[0]

    @property
    def model(self) -> Any:
        """The model that made the runs."""
        return model_of(self.traces)

    @property
    def patched(self) -> Trace | None:
        """What the last patch made."""
        return self.traces[self._count] if len(self.traces) > self._count else None

    # -- shown ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        one = self.trace
        return (
            f"<Explorer: {' / '.join(map(repr, self._titles))}, {len(one.layers)} layers × "
            f"{len(one.positions)} tokens, {sum(len(packed.buffer) for packed in self._packed) / 1000:.0f} kB>"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        self._open_link()
        bundle: dict[str, Any] = {
            "text/plain": repr(self),
            "text/html": fragment(self._packed, key=self._key, view=self._view()),
        }
        if _outputs_are_apart():
            bundle.update(self.widget()._repr_mimebundle_())
            bundle["text/plain"] = repr(self)
        return bundle

    def widget(self) -> Any:
        """The same as a widget with a view, for pages made of widgets; it ends with its kernel."""
        link = self._open_link()
        metas, offset = [], 0
        for one in self._packed:
            metas.append({**one.meta, "begin": offset, "size": len(one.buffer)})
            offset += len(one.buffer)
        link.metas, link.view = metas, self._view()
        link.data = b"".join(one.buffer for one in self._packed)
        return link

    def to_html(self, path: str | Path | None = None) -> str:
        """A stand-alone page that needs nothing from elsewhere; written to ``path`` if one is given."""
        page = document(self._packed, key=self._key, view=self._view())
        if path is not None:
            Path(path).write_text(page, "utf-8")
        return page

    def select(self, layer: int, position: int, trace: int = 0) -> None:
        """Pin a cell, here and in the page."""
        cell = read_cell({"trace": trace, "layer": layer, "position": position}, self.traces)
        chosen = vars(cell).copy()
        self.selection = [*(one for one in self.selection if one != chosen), chosen][-MOST_PINS:]
        if self._link is not None:
            self._link.send({"action": "select", "cell": chosen, "seq": 0})

    def _view(self) -> dict[str, Any]:
        """What the page begins with."""
        chosen = {name: self.state[name] for name in ("source", "target", "statistic")}
        return {"note": self.note, "name": _variable_of(self), "pins": self.selection, **chosen}

    # -- new runs ------------------------------------------------------------------------------------------------

    def patch(self, source: tuple[int, int, int], target: tuple[int, int, int]) -> Trace:
        """Put the source's state in place of the target's; both are (run, layer, position)."""
        names = ("trace", "layer", "position")
        self._patch(
            {"source": dict(zip(names, source, strict=True)), "target": dict(zip(names, target, strict=True))}
        )
        return self.traces[self._count]

    def handle(self, content: Any) -> tuple[dict[str, Any], list[bytes]]:
        """Answer one message of a page; what goes wrong is part of the answer, in words."""
        action = content.get("action") if isinstance(content, dict) else None
        acts = {"select": self._select, "patch": self._patch, "steer": self._steer, "follow": self._follow}
        try:
            if action not in acts:
                raise UserInputError(f"the page asked for something unknown: {action!r}")
            answer, buffers = acts[action](content)
        except NBRunnerError as error:
            self.error = str(error)
        except Exception as error:  # noqa: BLE001 - shown where it was asked for; the kernel goes on
            self.error = f"{type(error).__name__}: {error}"
        else:
            self.error = ""
            return answer, buffers
        return {"error": self.error}, []

    def _select(self, content: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        pins = content.get("pins")
        self.selection = [
            vars(read_cell(one, self.traces)).copy() for one in (pins if isinstance(pins, list) else [])
        ]
        for name in ("source", "target"):
            given = content.get(name)
            self.state[name] = vars(read_cell(given, self.traces)).copy() if given is not None else None
        self.state["statistic"] = str(content.get("statistic", ""))
        return {}, []

    def _patch(self, content: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        source = read_cell(content.get("source"), self.traces, name="source")
        target = read_cell(content.get("target"), self.traces, name="target")
        if target.trace >= self._count:
            raise UserInputError("the target must be in one of the prompts, not in a patched run")
        base = self.traces[target.trace]
        run = patched(self.traces, source, target)
        self.traces = [*self.traces[: self._count], run]
        changed = changed_cells(base, run)
        packed = pack(run, title="patched")
        cells = len(run.layers) * len(run.positions)
        words = f"{len(changed)} of {cells} cells have another best token; a notched corner marks them."
        note = f"Patched: {_words(source)} → {_words(target)}."
        answer = {"meta": packed.meta, "changed": changed, "words": words, "note": note, "base": target.trace}
        return answer, [packed.buffer]

    def _steer(self, content: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        source = read_cell(content.get("source"), self.traces, name="source")
        given = content.get("target")
        target = read_cell(given, self.traces, name="target") if given is not None else None
        strength = content.get("strength")
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise UserInputError(f"the strength must be a number, not {strength!r}")
        if abs(strength) > MAX_STRENGTH:
            raise UserInputError(f"a strength of {strength} is beyond {MAX_STRENGTH}")
        plain, other = steered(self.traces, source, target, float(strength))
        self.state["steered"] = {"strength": strength, "plain": plain, "steered": other}
        return {"plain": plain, "steered": other, "strength": strength}, []

    def _follow(self, content: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        from nbrunner.client.trace import token_id

        words = content.get("tokens")
        if (
            not isinstance(words, list)
            or not 1 <= len(words) <= 2
            or not all(isinstance(one, str) for one in words)
        ):
            raise UserInputError("give one or two tokens")
        tokens = [token_id(self.trace.tokenizer, one) for one in words]
        self.traces = [again(one, tokens=tokens) for one in self.traces]
        titles = [*self._titles, "patched"]
        packed = [pack(one, title=title) for one, title in zip(self.traces, titles, strict=False)]
        self._packed = packed[: self._count]
        return {"metas": [one.meta for one in packed]}, [one.buffer for one in packed]

    # -- the kernel's side ---------------------------------------------------------------------------------------

    def _open_link(self) -> Any:
        if self._link is None:
            self._link = _Link(key=self._key, _esm=script(), _css=style())
            self._link.on_msg(self._received)
        return self._link

    def _received(self, _: Any, content: Any, __: Any) -> None:
        """In the kernel's own thread: must return at once, since a run may take long."""
        if self._worker is None:
            self._worker = concurrent.futures.ThreadPoolExecutor(1, "nbrunner-explorer")
        # Outside of the context of the cell that runs now: an answer belongs to no cell.
        self._worker.submit(contextvars.Context().run, self._answer, content)

    def _answer(self, content: Any) -> None:
        answer, buffers = self.handle(content)
        seq = content.get("seq", 0) if isinstance(content, dict) else 0
        if seq and self._link is not None:
            self._link.send({**answer, "seq": seq}, buffers)

    def close(self) -> None:
        """End the kernel's side; what is shown stays."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
            self._worker = None
        if self._link is not None:
            self._link.close()
            self._link = None


def explore(
    what: Trace | str | Sequence[Trace | str],
    model: Any = None,
    *,
    top_k: int = 5,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
) -> Explorer:
    """Look into a run of a model.

    Parameters
    ----------
    what
        A `Trace`, a prompt, or two of them to compare.
    model
        For prompts: what runs them.
    top_k, layers, tokens, tokenizer
        For prompts: as in ``model.trace``.

    Returns
    -------
    Explorer
        Shows itself as the value of a cell; ``.to_html(path)`` writes it as a page.

    Raises
    ------
    UserInputError
        A prompt without a model; more than two runs; a trace without a lens.
    """
    given: list[Any] = [what] if isinstance(what, str) or hasattr(what, "top_ids") else list(what)
    if not 1 <= len(given) <= 2:
        raise UserInputError(f"one trace is shown, or two are compared; not {len(given)}")
    traces: list[Trace] = []
    for one in given:
        if isinstance(one, str):
            if model is None:
                raise UserInputError("to explore a prompt a model is needed: nbrunner.explore(prompt, model=model)")
            one = model.trace(one, keep=KEEP, top_k=top_k, layers=layers, tokens=tokens, tokenizer=tokenizer)
        elif not hasattr(one, "top_ids"):
            raise UserInputError(f"give a trace or a prompt, not {type(one).__name__}")
        traces.append(one)
    return Explorer(traces)


def _words(cell: Cell) -> str:
    return f"layer {cell.layer}, token {cell.position}"


def _titles(traces: Sequence[Trace]) -> list[str]:
    """Of each run its text; of two runs of one text also which is which."""
    titles = [_title(one) for one in traces]
    if len(set(titles)) == len(titles):
        return titles
    changes = [
        f", {len(one.edits)} edit{'' if len(one.edits) == 1 else 's'}" if one.edits else "" for one in traces
    ]
    return [
        f"run {number}{change}: {title}"
        for number, (title, change) in enumerate(zip(titles, changes, strict=True), 1)
    ]


def _variable_of(explorer: Explorer) -> str:
    """The notebook's name for it, so that the page can show code that runs; ``explorer`` if it has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    names = getattr(shell, "user_ns", {})
    return next(
        (name for name, value in list(names.items()) if value is explorer and not name.startswith("_")), "explorer"
    )


def _title(trace: Trace) -> str:
    special = set(getattr(trace.tokenizer, "all_special_tokens", ()))
    whole = "".join(one for one in trace.tokens if one not in special)
    return whole if len(whole) <= 60 else whole[:59] + "…"


def _outputs_are_apart() -> bool:
    """Whether outputs cannot see the kernel's side: Colab frames each, VS Code makes models on demand."""
    if "google.colab" in sys.modules:
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "__vsc_ipynb_file__" in getattr(shell, "user_ns", {})
