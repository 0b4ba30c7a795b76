"""The explorer as one piece of HTML: its own script and data inside, a plain table where scripts are stripped."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nbrunner.widgets.explorer_data import Packed, strided
from nbrunner.widgets.page import page, table, text

_TABLE_ROWS, _TABLE_COLUMNS = 13, 12


def fragment(
    packed: Sequence[Packed], *, key: str, view: Mapping[str, Any] | None = None, plain: bool = True
) -> str:
    """HTML for a cell's output or a page's body.

    Parameters
    ----------
    packed
        One trace, or two to compare.
    key
        Names the explorer; its script finds the kernel's side by it, where there is one.
    view
        What it begins with: ``note``, a sentence about the comparison; ``name`` of the variable that holds the
        explorer; ``pins``, ``source``, ``target`` (cells) and ``statistic``.
    plain
        With the table for readers without scripts.
    """
    data = [{"meta": one.meta, "data": one.encoded()} for one in packed]
    tables = "".join(map(_table, packed)) if plain else ""
    return (
        f"<style>{style()}</style><div class='nbx' data-nbx='{text(key)}'>"
        f"<div class='nbx-plain'>{page(tables)}</div></div>"
        f"<script type='module'>{script()}\n"
        f"startPage({_literal(key)}, {_literal(data)}, {_literal(dict(view or {}))});</script>"
    )


def document(packed: Sequence[Packed], *, key: str, view: Mapping[str, Any] | None = None) -> str:
    """A whole page."""
    title = " / ".join(one.meta["title"] for one in packed) or "nbrunner explorer"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title><style>:root {{ color-scheme: light dark; }} body {{ margin: 16px; }}</style>"
        f"</head><body>{fragment(packed, key=key, view=view)}</body></html>"
    )


@functools.cache
def script() -> str:
    """The ES module; also what the widget's front end loads."""
    return "\n".join(_read(name) for name in ("explorer_draw.js", "explorer_link.js", "explorer.js"))


@functools.cache
def style() -> str:
    """Its style sheet."""
    return _read("explorer.css")


def _read(name: str) -> str:
    return importlib.resources.files("nbrunner.widgets").joinpath(name).read_text("utf-8")


def _literal(value: Any) -> str:
    """JSON that may stand in a script: nothing in it can end the script or begin a comment."""
    return (
        json.dumps(value, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _table(packed: Packed) -> str:
    """The lens's best token at the last positions, last layer first."""
    meta = packed.meta
    best, probs = packed.array("top")[..., 0], packed.array("probs")[..., 0]
    columns = list(range(len(meta["positions"])))[-_TABLE_COLUMNS:]
    rows = []
    for row in reversed(strided(meta["layers"], _TABLE_ROWS)):
        cells = [
            f"{text(visible(meta['vocabulary'][best[row, column]]))} <small>{float(probs[row, column]):.2f}</small>"
            for column in columns
        ]
        rows.append([text(meta["layers"][row]), *cells])
    heads = [visible(meta["tokens"][meta["positions"][column]]) for column in columns]
    caption = f"Logit lens: most probable next token and its probability, by layer. {meta['title']}"
    return table(caption, ["layer", *heads], rows)


def visible(token: str) -> str:
    """A token with its spaces and line breaks to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
