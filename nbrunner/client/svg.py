"""Pieces of the SVG pictures: text from strangers made safe, and one set of colours for light and dark pages.

A picture is shown in two ways. Inside a page its rules follow JupyterLab's theme; as an image file it sees only
``prefers-color-scheme``, and may stand on a page of the other kind. So every picture paints its own background.
"""

from __future__ import annotations

import hashlib
import html
import textwrap
import unicodedata
from collections.abc import Sequence

_LIGHT = {
    "back": "#ffffff",
    "ink": "#1f2328",
    "soft": "#57606a",
    "line": "#d0d7de",
    "faint": "#eef1f4",
    "good": "#2f6fb0",
    "wait": "#946200",
    "leave": "#7a4fb5",
    "bad": "#b3261e",
    "route": "#c2410c",
}
_DARK = {
    "back": "#161a1f",
    "ink": "#e6e9ec",
    "soft": "#a4adb7",
    "line": "#3a424c",
    "faint": "#232930",
    "good": "#7fb3e6",
    "wait": "#e3b341",
    "leave": "#c4a1f2",
    "bad": "#ff897d",
    "route": "#ffa657",
}


def tidy(value: object) -> str:
    """Any value as one line of plain text, without characters that control a terminal or reorder a line."""
    return "".join(one for one in str(value) if not unicodedata.category(one).startswith("C"))


def label(value: object) -> str:
    """Any value as text of an SVG or of a page: escaped, and without characters that XML forbids."""
    return html.escape(tidy(value), quote=True)


def clip(value: object, characters: int) -> str:
    """Plain text of at most so many characters; what is cut shows as ``…``."""
    given = str(value)
    return given if len(given) <= characters else given[: max(characters - 1, 0)] + "…"


def wrap(parts: Sequence[str], characters: int, joint: str = " · ") -> list[str]:
    """Parts joined into as few lines as have room for them; a part that is longer than a line is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(joint) + len(part) <= characters:
            lines[-1] += joint + part
        else:
            lines += textwrap.wrap(part, characters) or [""]
    return lines


def words(x: float, y: float, value: object, *, kind: str = "", anchor: str = "start") -> str:
    """One line of text. ``kind``: CSS classes, space separated, without their prefix."""
    classes = " ".join(f"nbp-{one}" for one in ["text", *kind.split()])
    return f"<text x='{x:.1f}' y='{y:.1f}' class='{classes}' text-anchor='{anchor}'>{label(value)}</text>"


def picture(width: int, height: float, parts: Sequence[str], *, title: str, description: str) -> str:
    """A whole SVG document, as wide as there is room but no wider than is pleasant to read."""
    body = "".join(parts)
    # A pattern of its own: one with the same id in a part of the page that is hidden would not be painted.
    hatch = f"nbp-hatch-{hashlib.blake2s(body.encode(), digest_size=6).hexdigest()}"
    body = body.replace("url(#nbp-hatch)", f"url(#{hatch})")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' class='nbp' viewBox='0 0 {width} {height:.0f}' width='100%' "
        # no height: JupyterLab does not shrink an image that has a size of its own to a narrow page
        f"role='img' aria-label='{label(title)}' style='max-width:{width * 1.25:.0f}px;height:auto'>"
        f"<title>{label(title)}</title><desc>{label(description)}</desc><style>{_style()}</style>"
        f"<defs><pattern id='{hatch}' width='6' height='6' patternUnits='userSpaceOnUse' "
        "patternTransform='rotate(45)'><rect width='3' height='6' class='nbp-soft-fill'/></pattern></defs>"
        f"<rect width='{width}' height='{height:.0f}' rx='4' class='nbp-back'/>{body}</svg>"
    )


def _style() -> str:
    def variables(colours: dict[str, str]) -> str:
        return ";".join(f"--nbp-{name}:{value}" for name, value in colours.items())

    fills = "".join(f".nbp .nbp-{name}-fill{{fill:var(--nbp-{name})}}" for name in _LIGHT)
    strokes = "".join(f".nbp .nbp-{name}-line{{stroke:var(--nbp-{name});fill:none}}" for name in _LIGHT)
    return (
        f".nbp{{{variables(_LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{.nbp{{{variables(_DARK)}}}}}"
        f"[data-jp-theme-light='true'] .nbp{{{variables(_LIGHT)}}}"
        f"[data-jp-theme-light='false'] .nbp{{{variables(_DARK)}}}"
        ".nbp .nbp-back{fill:var(--nbp-back);stroke:var(--nbp-line)}"
        ".nbp .nbp-text{font:12px system-ui,sans-serif;fill:var(--nbp-ink);"
        "paint-order:stroke;stroke:var(--nbp-back);stroke-width:3px;stroke-linejoin:round}"
        ".nbp .nbp-text.nbp-back-fill{stroke:none}"
        ".nbp .nbp-small{font-size:11px}.nbp .nbp-strong{font-weight:600}"
        ".nbp .nbp-code{font-family:ui-monospace,monospace;font-size:11px}" + fills + strokes
    )
