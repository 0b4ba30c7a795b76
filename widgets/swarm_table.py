"""Who serves what, as a table that a screen reader can read and a saved notebook keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nbrunner.protocol.identity import short_peer
from nbrunner.widgets.page import page, plain_table, state, table, text

_COLUMNS = ("server", "blocks", "state", "tok/s", "latency", "cache left", "sessions", "version")
_BAR_CHARACTERS = 16


@dataclass(frozen=True)
class ServerRow:
    """One server as shown.

    Attributes
    ----------
    tokens_per_second
        Of one request through its blocks, without waiting; None if not measured yet.
    latency
        Seconds there and back; None if not measured.
    cache_tokens
        Tokens for which it still has room; None if it does not say.
    """

    peer: str
    name: str
    start: int
    end: int
    state: str
    tokens_per_second: float | None
    latency: float | None
    cache_tokens: int | None
    sessions: int
    version: str
    dtype: str = ""


@dataclass(frozen=True)
class ModelTable:
    """The servers of one model. ``missing``: ranges of blocks nobody serves now; ``advice``: what to do."""

    model: str
    num_blocks: int
    rows: Sequence[ServerRow]
    missing: Sequence[tuple[int, int]] = ()
    advice: str = ""


@dataclass(frozen=True)
class SwarmTable:
    """A swarm at one moment: displays as tables, prints as text."""

    title: str
    models: Sequence[ModelTable] = field(default_factory=tuple)
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        parts = [self.title]
        for model in self.models:
            parts.append(f"\n{_caption(model)}")
            rows = [_plain_cells(row, model.num_blocks) for row in model.rows]
            parts.append(plain_table(_COLUMNS, rows))
            if model.missing:
                parts.append(f"✖ {_missing(model)} {model.advice}".rstrip())
        return "\n".join([*parts, *self.notes])

    def _repr_html_(self) -> str:
        parts = [f"<div><strong>{text(self.title)}</strong></div>"]
        for model in self.models:
            rows = [_html_cells(row, model.num_blocks) for row in model.rows]
            parts.append(table(_caption(model), _COLUMNS, rows, numbers=(3, 4, 5, 6)))
            if model.missing:
                advice = f" <code>{text(model.advice)}</code>" if model.advice else ""
                parts.append(f"<div class='nbr-alert' role='alert'>✖ {text(_missing(model))}{advice}</div>")
        parts += [f"<div><small>{text(note)}</small></div>" for note in self.notes]
        return page(*parts)


def blocks_bar(start: int, end: int, total: int, *, reachable: bool = True) -> str:
    """A span as a bar over the whole model, in HTML; the numbers stand beside it."""
    left, width = 100 * start / total, 100 * (end - start) / total
    off = "" if reachable else " nbr-off"
    return (
        f"<span class='nbr-bar{off}' aria-hidden='true'><i style='left:{left:.2f}%;width:{width:.2f}%'></i></span>"
        f"[{start}, {end})"
    )


def plain_bar(start: int, end: int, total: int) -> str:
    """The same in text: ``░░████░░ [2, 6)``."""
    scale = min(1.0, _BAR_CHARACTERS / total)
    first, last = int(start * scale), max(int(start * scale) + 1, round(end * scale))
    length = max(last, round(total * scale))
    return "░" * first + "█" * (last - first) + "░" * (length - last) + f" [{start}, {end})"


def _caption(model: ModelTable) -> str:
    count = len(model.rows)
    return f"{model.model}: {model.num_blocks} blocks, {count} server{'' if count == 1 else 's'}"


def _missing(model: ModelTable) -> str:
    spans = ", ".join(f"[{start}, {end})" for start, end in model.missing)
    return f"nobody serves blocks {spans}."


def _plain_cells(row: ServerRow, total: int) -> list[str]:
    name = " ".join(part for part in (row.name, short_peer(row.peer)) if part)
    return [name, plain_bar(row.start, row.end, total), state(row.state), *_figures(row)]


def _html_cells(row: ServerRow, total: int) -> list[str]:
    name = f"{text(row.name)} " if row.name else ""
    label = f"{name}<code title='{text(row.peer)}'>{text(short_peer(row.peer))}</code>"
    bar = blocks_bar(row.start, row.end, total, reachable=row.state == "online")
    return [label, bar, text(state(row.state)), *map(text, _figures(row))]


def _figures(row: ServerRow) -> list[str]:
    speed = "–" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
    latency = "–" if row.latency is None else f"{row.latency * 1e3:.1f} ms"
    cache = "–" if row.cache_tokens is None else f"{short_count(row.cache_tokens)} tok"
    return [speed, latency, cache, str(row.sessions), row.version or "–"]


def short_count(count: float) -> str:
    """``1.2 k``, ``3.4 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
