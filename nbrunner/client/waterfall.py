"""The waterfall of a token: where its time went, one row for this process and one for each server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbrunner.client.step_times import TokenTime, costs_most
from nbrunner.client.svg import clip, picture, words, wrap
from nbrunner.protocol.identity import short_peer

_WIDTH, _LEFT, _RIGHT, _MARGIN = 680, 176, 668, 12
_CHARACTERS = 120
_KINDS = {"here": "leave", "wire": "hatch", "queue": "wait", "compute": "good", "handling": "soft"}
"""What a piece of time is → how it is painted. Each is named in words beside its row as well."""


@dataclass(frozen=True)
class Waterfall:
    """Displays as a picture, prints as a table. ``text``: of the token."""

    time: TokenTime
    text: str = ""

    @property
    def rows(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """(what, [(kind, seconds), …]) in the order in which it happened."""
        time = self.time
        rows: list[tuple[str, list[tuple[str, float]]]] = [("embedding, preparation", [("here", time.before)])]
        for number, hop in enumerate(time.hops, start=1):
            pieces = [
                ("wire", hop.wire),
                ("queue", hop.queue),
                ("compute", hop.compute),
                ("handling", hop.handling),
            ]
            rows.append((f"{number} {short_peer(hop.peer)} [{hop.start}, {hop.end})", pieces))
        return [*rows, ("way back", [("wire", time.back)]), ("norm, head, choice", [("here", time.after)])]

    @property
    def title(self) -> str:
        return f"Token {self.time.index} {clip(repr(self.text), 24)}: {self.time.total * 1e3:.1f} ms"

    @property
    def notes(self) -> list[str]:
        """What costs most, and how to read the picture."""
        notes = [costs_most(self.time)] if costs_most(self.time) else []
        if self.time.hops:
            notes.append("Ways are what is left of the time, shared out by the measured round trips.")
        if self.time.parts > 1:
            notes.append(f"It travelled in {self.time.parts} parts, so servers worked at the same time.")
        return notes

    def svg(self) -> str:
        """The picture, as a document that stands alone."""
        scale = (_RIGHT - _LEFT) / max(self.time.total, 1e-9)
        parts = [words(_MARGIN, 20, self.title, kind="strong")]
        x, y = float(_LEFT), 32.0
        for name, pieces in self.rows:
            parts.append(words(_MARGIN, y + 12, clip(name, 26)))
            parts.append(
                f"<line x1='{_LEFT}' x2='{_RIGHT}' y1='{y + 15:.1f}' y2='{y + 15:.1f}' class='nbp-line-line'/>"
            )
            for kind, seconds in pieces:
                width = seconds * scale
                paint = "fill='url(#nbp-hatch)'" if kind == "wire" else f"class='nbp-{_KINDS[kind]}-fill'"
                parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.2f}' height='14' {paint}/>")
                x += width
            parts.append(words(_LEFT, y + 27, _told(pieces), kind="small soft-fill"))
            y += 34
        for note in self.notes:
            for line in wrap([note], _CHARACTERS):
                y += 15
                parts.append(words(_MARGIN, y, line, kind="small"))
        return picture(_WIDTH, y + 12, parts, title=self.title, description=repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name.ljust(width)}  {_told(pieces)}" for name, pieces in self.rows]
        return "\n".join([self.title, *lines, *self.notes])


def _told(pieces: list[tuple[str, float]]) -> str:
    return " · ".join(f"{kind} {seconds * 1e3:.2f} ms" for kind, seconds in pieces)
