"""A swarm as a picture: a ruler of blocks, a bar per server, the route on it, and what is missing. Layout only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbrunner.client.svg import clip, label, picture, tidy, words, wrap
from nbrunner.protocol.identity import short_peer
from nbrunner.widgets.page import plain_table, state
from nbrunner.widgets.swarm_table import plain_bar, short_count

_MARGIN = 12
_LINE = 15
_LETTER, _CODE_LETTER = 5.5, 6.7  # widths of the small letters, a little more than they take
_FACTS_LEFT = 100  # beside the longest state
_MOST_ROWS = 64
_ONE_OF_TWO = (
    ".nbr-map{container-type:inline-size}.nbr-map-narrow{display:none}"
    "@container (max-width:520px){.nbr-map-wide{display:none}.nbr-map-narrow{display:block}}"
)
_COLOURS = {"online": "good", "joining": "wait", "draining": "leave", "unreachable": "bad"}
_COLUMNS = (
    *("server", "blocks", "state", "tok/s", "latency", "queue"),
    *("cache left", "adapters", "version", "reached", "route"),
)


@dataclass(frozen=True)
class _Layout:
    """How wide the picture is, and where its bars begin; names stand above them where they begin at the margin."""

    width: int
    left: int

    @property
    def right(self) -> int:
        return self.width - _MARGIN

    @property
    def name_drop(self) -> float:
        """Where the line with a server's name stands, against the top of its bar."""
        return 12 if self.left > _MARGIN else -4

    def letters(self, taken: float = 0, *, each: float = _LETTER) -> int:
        """How many letters go into a line, beside what is taken."""
        return int((self.width - 2 * _MARGIN - taken) / each)


_WIDE, _NARROW = _Layout(680, 176), _Layout(380, _MARGIN)


@dataclass(frozen=True)
class MapServer:
    """One server on the map.

    Attributes
    ----------
    tokens_per_second
        Of one request through its blocks, without waiting; None if not measured yet.
    latency, queue
        Seconds there and back (None if not measured), and seconds that requests waited there lately.
    cache_tokens
        Tokens for which it still has room; None if it does not say.
    relayed
        Reached through another peer.
    trouble
        Why it is not used, where it is not.
    """

    peer: str
    name: str
    start: int
    end: int
    state: str
    tokens_per_second: float | None = None
    latency: float | None = None
    queue: float = 0.0
    cache_tokens: int | None = None
    adapters: Sequence[str] = ()
    version: str = ""
    relayed: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class Gap:
    """Blocks ``[start, end)`` that nobody serves, and the command that would."""

    start: int
    end: int
    command: str


@dataclass(frozen=True)
class MapModel:
    """One model of the swarm.

    Attributes
    ----------
    route
        (PeerID, start, end) of the hops that the next request would take.
    route_seconds
        What it is expected to take per token outside this process.
    notes
        Advice, one sentence each.
    """

    model: str
    num_blocks: int
    servers: Sequence[MapServer]
    route: Sequence[tuple[str, int, int]] = ()
    route_seconds: float | None = None
    gaps: Sequence[Gap] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SwarmMap:
    """The swarm at one moment. ``moment``: when that was, as shown."""

    title: str
    models: Sequence[MapModel] = ()
    moment: str = ""
    notes: Sequence[str] = ()

    def svg(self, *, narrow: bool = False) -> str:
        """The picture, as a document that stands alone; ``narrow`` for a column of a page."""
        layout = _NARROW if narrow else _WIDE
        parts = [words(_MARGIN, 20, clip(self.title, layout.letters(70, each=7)), kind="strong")]
        if self.moment:
            parts.append(words(layout.right, 20, self.moment, kind="small soft-fill", anchor="end"))
        y = 30.0
        for model in self.models:
            drawn, y = _draw(model, y, layout)
            parts += drawn
        for line in wrap(self.notes, layout.letters()):
            y += _LINE
            parts.append(words(_MARGIN, y, line, kind="small soft-fill"))
        return picture(layout.width, y + 12, parts, title=self.title, description=self._description())

    def bundle(self, *, live: bool) -> dict[str, str]:
        """What to display. A live picture is also part of the page, where it follows its theme and its width.

        At rest it is an image and a table of text: that is what GitHub, nbconvert and a notebook that is not
        trusted show of a saved one.
        """
        wide = self.svg()
        data = {"image/svg+xml": wide, "text/plain": repr(self)}
        if live:
            data["text/html"] = (
                f"<style>{_ONE_OF_TWO}</style><div class='nbr-map'><div class='nbr-map-wide'>{wide}</div>"
                f"<div class='nbr-map-narrow'>{self.svg(narrow=True)}</div></div>"
            )
        return data

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.bundle(live=False)

    def __repr__(self) -> str:
        parts = [f"{tidy(self.title)} {self.moment}".rstrip()]
        for model in self.models:
            parts.append(f"\n{_caption(model)}")
            parts.append(plain_table(_COLUMNS, [_cells(one, model) for one in model.servers]))
            parts += [f"✖ {_name(one)}: {tidy(one.trouble)}" for one in model.servers if one.trouble]
            parts += [f"✖ nobody serves blocks [{gap.start}, {gap.end}): {gap.command}" for gap in model.gaps]
            parts += [line for line in (_route_line(model), *model.notes) if line]
        return "\n".join([*parts, *self.notes])

    def _description(self) -> str:
        told = []
        for model in self.models:
            told.append(f"{_caption(model)}.")
            told += [
                f"{_name(one)} holds blocks {one.start} to {one.end - 1}: {', '.join(_facts(one))}."
                for one in model.servers[:_MOST_ROWS]
            ]
            told += [f"Nobody serves blocks {gap.start} to {gap.end - 1}: {gap.command}." for gap in model.gaps]
            told.append(_route_line(model))
        return " ".join(part for part in [*told, *self.notes] if part)


def _draw(model: MapModel, y: float, layout: _Layout) -> tuple[list[str], float]:
    parts: list[str] = []
    lines: list[str] = []  # of text; drawn last, so that the route runs behind them

    def at(block: int) -> float:
        return layout.left + (layout.right - layout.left) * block / model.num_blocks

    y += _LINE
    parts.append(words(_MARGIN, y, clip(_caption(model), layout.letters(each=6.5)), kind="strong"))
    y += 22
    parts += _ruler(model.num_blocks, y, at, layout)
    rows: dict[str, float] = {}  # PeerID → where its bar is
    top = y + 4
    y += 8 if layout.left > _MARGIN else 14
    for server in model.servers[:_MOST_ROWS]:
        if layout.left == _MARGIN:
            y += _LINE
        rows.setdefault(server.peer, y + 8)
        colour = _COLOURS.get(server.state, "soft")
        left, width = at(server.start), at(server.end) - at(server.start)
        lines.append(words(_MARGIN, y + layout.name_drop, clip(_name(server), 25)))
        parts.append(_bar(left, y, width, colour, solid=server.state == "online", title=server.peer))
        y += 16 + _LINE
        lines.append(words(_MARGIN, y - 2, state(server.state), kind=f"small strong {colour}-fill"))
        for line in wrap(_figures(server), layout.letters(_FACTS_LEFT)):
            lines.append(words(_MARGIN + _FACTS_LEFT, y - 2, line, kind="small soft-fill"))
            y += _LINE
        y -= 6
    if len(model.servers) > _MOST_ROWS:
        y += _LINE
        rest = len(model.servers) - _MOST_ROWS
        lines.append(words(_MARGIN, y - 4, f"and {rest} more servers: %swarm status lists them", kind="small"))
    parts += _grid(model.num_blocks, top, y, at)
    for gap in model.gaps:
        if layout.left == _MARGIN:
            y += _LINE
        lines.append(
            words(_MARGIN, y + layout.name_drop, f"✖ nobody [{gap.start}, {gap.end})", kind="strong bad-fill")
        )
        parts.append(_bar(at(gap.start), y, at(gap.end) - at(gap.start), "bad", solid=False, title="nobody"))
        y += 16 + _LINE
        for line in wrap([gap.command], layout.letters(each=_CODE_LETTER)):
            lines.append(words(_MARGIN, y - 2, line, kind="code"))
            y += _LINE
        y -= 4
    parts += _route(model, rows, at)
    for line in wrap([_route_line(model)], layout.letters()):
        y += _LINE
        lines.append(words(_MARGIN, y, line, kind="small route-fill"))
    for note in model.notes:
        for line in wrap([note], layout.letters()):
            y += _LINE
            lines.append(words(_MARGIN, y, line, kind="small"))
    return parts + lines, y + 10


def _ruler(blocks: int, y: float, at: Any, layout: _Layout) -> list[str]:
    step = next(size for size in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 10**9) if blocks / size <= 16)
    marks = [*range(0, blocks, step), blocks]
    if len(marks) > 2 and blocks - marks[-2] < step * 0.6:
        marks.pop(-2)  # its number would run into the last one
    beside = layout.left > _MARGIN
    parts = [words(_MARGIN, y, "blocks", kind="small soft-fill")] if beside else []
    parts += [words(at(mark), y, mark, kind="small soft-fill", anchor="middle") for mark in marks]
    return parts


def _grid(blocks: int, top: float, bottom: float, at: Any) -> list[str]:
    """The borders of the blocks, as ticks on the ruler; none where they would be a grey bar."""
    if blocks > 128:
        return []
    ticks = "".join(f"M{at(block):.1f} {top:.1f}v4" for block in range(blocks + 1))
    return [f"<path d='{ticks}' class='nbp-soft-line'/>"]


def _bar(x: float, y: float, width: float, colour: str, *, solid: bool, title: str) -> str:
    shape = f"x='{x + 1:.1f}' y='{y:.1f}' width='{max(width - 2, 2):.1f}' height='16' rx='3'"
    told = f"<title>{label(title)}</title>"
    if solid:
        return f"<g>{told}<rect {shape} class='nbp-{colour}-fill' fill-opacity='.8'/></g>"
    return (
        f"<g>{told}<rect {shape} fill='url(#nbp-hatch)' fill-opacity='.35'/>"
        f"<rect {shape} class='nbp-{colour}-line' stroke-width='1.5' stroke-dasharray='5 3'/></g>"
    )


def _route(model: MapModel, rows: dict[str, float], at: Any) -> list[str]:
    """A line that enters each server of the route at its first block and leaves it at its last."""
    hops = [(rows[peer], start, end) for peer, start, end in model.route if peer in rows]
    if not hops or len(hops) < len(model.route):
        return []
    path = "".join(
        f"{'M' if index == 0 else 'L'}{at(start):.1f} {y:.1f}L{at(end):.1f} {y:.1f}"
        for index, (y, start, end) in enumerate(hops)
    )
    parts = [
        f"<path d='{path}' class='nbp-back-line' stroke-width='6' stroke-linejoin='round'/>",
        f"<path d='{path}' class='nbp-route-line' stroke-width='3' stroke-linejoin='round'/>",
    ]
    for number, (y, start, _) in enumerate(hops, start=1):
        x = at(start) + (9 if number == 1 else 0)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='8' class='nbp-route-fill'/>")
        parts.append(words(x, y + 4, number, kind="small strong back-fill", anchor="middle"))
    y, _, end = hops[-1]
    parts.append(f"<path d='M{at(end) - 8:.1f} {y - 5:.1f}l8 5l-8 5z' class='nbp-route-fill'/>")
    return parts


def _route_line(model: MapModel) -> str:
    if not model.route:
        return "No route can be made now." if model.servers or model.gaps else ""
    hops = " → ".join(f"{short_peer(peer)} [{start}, {end})" for peer, start, end in model.route)
    cost = f", about {model.route_seconds * 1e3:.1f} ms a token" if model.route_seconds is not None else ""
    return f"━ route of the next request: {hops}{cost}"


def _caption(model: MapModel) -> str:
    count = len(model.servers)
    return f"{tidy(model.model)}: {model.num_blocks} blocks, {count} server{'' if count == 1 else 's'}"


def _name(server: MapServer) -> str:
    return " ".join(part for part in (short_peer(server.peer), tidy(server.name)) if part)


def _figures(server: MapServer) -> list[str]:
    """What is known of a server, each with its word."""
    speed, latency, queue, cache, adapters, version, reached = _values(server)
    parts = [f"{speed} tok/s", f"latency {latency}", f"queue {queue}", f"cache left {cache}"]
    parts += [f"adapters {adapters}" if server.adapters else "no adapters", reached]
    parts.append(f"v{version}" if server.version else "version –")  # short: all of it fits one line of the picture
    return [*parts, *([clip(tidy(server.trouble), 64)] if server.trouble else [])]


def _facts(server: MapServer) -> list[str]:
    return [server.state, *_figures(server)]


def _values(server: MapServer) -> list[str]:
    return [
        "–" if server.tokens_per_second is None else f"{server.tokens_per_second:.0f}",
        "–" if server.latency is None else f"{server.latency * 1e3:.1f} ms",
        f"{server.queue * 1e3:.1f} ms",
        "–" if server.cache_tokens is None else f"{short_count(server.cache_tokens)} tok",
        clip(tidy(", ".join(server.adapters)), 40) or "–",
        clip(tidy(server.version), 16) or "–",
        "relayed" if server.relayed else "direct",
    ]


def _cells(server: MapServer, model: MapModel) -> list[str]:
    hop = next((str(index) for index, hop in enumerate(model.route, 1) if hop[0] == server.peer), "")
    bar = plain_bar(server.start, server.end, model.num_blocks)
    return [_name(server), bar, state(server.state), *_values(server), hop]
