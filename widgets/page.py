"""HTML fragments that look right in light and dark pages and need nothing from elsewhere."""

from __future__ import annotations

import functools
import html
import importlib.resources
from collections.abc import Iterable, Sequence

State = str

STATE_SIGNS = {
    "online": "●",
    "joining": "◐",
    "draining": "◌",
    "offline": "_",
    "unreachable": "✖",
    "ok": "✔",
    "warning": "▲",
    "problem": "✖",
    "unknown": "?",
}
"""A sign beside each word, so that colour is never what tells two states apart."""


def text(value: object) -> str:
    """Any value as safe HTML text. Names and messages come from strangers."""
    return html.escape(str(value), quote=True)


def state(word: str) -> str:
    """A state with its sign, as plain text: ``● online``."""
    return f"{STATE_SIGNS.get(word, '·')} {word}"


def page(*parts: str) -> str:
    """A fragment with the style it needs; each output stands alone in a saved notebook."""
    return f"<style>{_style()}</style><div class='nbr'>{''.join(parts)}</div>"


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    wrap: Sequence[int] = (),
) -> str:
    """A table with a caption and header cells.

    Parameters
    ----------
    caption, columns
        Plain text.
    rows
        Cells as *HTML*; escape with `text` what is not. The first cell of a row is its header.
    numbers
        Columns aligned to the right.
    wrap
        Columns of sentences, which may take several lines.
    """
    heads = "".join(
        f"<th scope='col'{_class(index, numbers, wrap)}>{text(name)}</th>" for index, name in enumerate(columns)
    )
    body = []
    for row in rows:
        first, *rest = row
        cells = "".join(
            f"<td{_class(index, numbers, wrap)}>{cell}</td>" for index, cell in enumerate(rest, start=1)
        )
        body.append(f"<tr><th scope='row'>{first}</th>{cells}</tr>")
    return (
        f"<div class='nbr-scroll' tabindex='0' role='region' aria-label='{text(caption)}'>"
        f"<table><caption>{text(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in text, columns aligned with spaces."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    return "\n".join(lines)


def _class(index: int, numbers: Sequence[int], wrap: Sequence[int]) -> str:
    return " class='nbr-num'" if index in numbers else " class='nbr-wrap'" if index in wrap else ""


@functools.cache
def _style() -> str:
    return importlib.resources.files("nbrunner.widgets").joinpath("nbrunner.css").read_text("utf-8")
