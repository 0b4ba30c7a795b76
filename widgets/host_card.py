"""A hosted server as a card: state, blocks on a ruler, what it has done, what it uses, what went wrong, its log.

The card is plain HTML at every moment, so that whatever moment a notebook is saved at, it can be read afterwards;
only the buttons are widgets, and they go when the server does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nbrunner.hosting_status import HostStatus, duration
from nbrunner.widgets.page import page, text

_SIGNS = {
    "starting": "◐",
    "online": "●",
    "paused": "❚❚",
    "draining": "◌",
    "ended": "■",
    "failed": "✖",
}
_WORDS = {
    "starting": "starting: loading its blocks and joining the swarm",
    "online": "online",
    "paused": "paused: takes no new sessions, what is open goes on",
    "draining": "draining: sessions move to other servers, then it ends",
    "ended": "ended",
    "failed": "failed",
}
_LOG_LINES = 40


@dataclass(frozen=True)
class HostCard:
    """A hosted server at one moment: displays as a card, prints as text.

    Attributes
    ----------
    title
        What is hosted and where.
    ends_at, now
        Unix seconds; when it leaves by itself, None if it does not.
    log
        Its last lines; folded.
    """

    title: str
    status: HostStatus
    ends_at: float | None = None
    now: float = 0.0
    log: str = ""

    def __repr__(self) -> str:
        facts = [f"{name}: {value}" for name, value in self._facts()]
        errors = [f"✖ {error}" for error in self.status.errors]
        return "\n".join([self.title, self._state(), *facts, *errors])

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, *, log: bool = True) -> str:
        """The card as HTML that needs nothing from elsewhere."""
        facts = "".join(
            f"<div class='nbr-fact'><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
            for name, value in self._facts()
        )
        errors = "".join(f"<li>{text(error)}</li>" for error in self.status.errors)
        return page(
            f"<section class='nbr-host nbr-host-{text(self.status.state)}' aria-label='{text(self.title)}'>",
            f"<div><strong>{text(self.title)}</strong></div>",
            f"<div class='nbr-host-state'>{text(self._state())}</div>",
            self._ruler(),
            f"<dl>{facts}</dl>",
            f"<ul class='nbr-alert' aria-label='errors'>{errors}</ul>" if errors else "",
            log_html(self.log) if log else "",
            "</section>",
        )

    def _state(self) -> str:
        status = self.status
        line = f"{_SIGNS.get(status.state, '·')} {_WORDS.get(status.state, status.state)}"
        if self.ends_at is not None and status.state in ("online", "paused"):
            line += f"; leaves by itself in {duration(self.ends_at - (self.now or time.time()))}"
        return line

    def _facts(self) -> list[tuple[str, str]]:
        status = self.status
        span = (
            f"[{status.blocks[0]}, {status.blocks[1]}) of {status.num_blocks}"
            if status.blocks
            else "not chosen yet"
        )
        memory = amount(status.memory_bytes) + (
            f", GPU {amount(status.device_bytes)}" if status.device_bytes else ""
        )
        return [
            ("blocks", span),
            (
                "peers served",
                f"{status.peers} so far, {status.sessions} session{'' if status.sessions == 1 else 's'} open",
            ),
            ("tokens in", f"{status.rate_in:.1f} /s, {status.tokens_in:,} so far"),
            ("tokens out", f"{status.rate_out:.1f} /s, {status.tokens_out:,} so far"),
            (
                "time for a token",
                f"{status.step_seconds * 1e3:.1f} ms, {status.queue_seconds * 1e3:.1f} ms waiting",
            ),
            ("cache", f"{amount(status.cache_bytes)} of {amount(status.cache_limit)}"),
            ("memory", memory),
            ("runs as", f"{status.dtype} on {status.device}" if status.dtype else "–"),
        ]

    def _ruler(self) -> str:
        """The blocks of the model as a row of boxes, ours filled, their numbers below."""
        status = self.status
        if not status.blocks or status.num_blocks < 1:
            return ""
        start, end = status.blocks
        total, width = status.num_blocks, 640
        each = width / total
        off = " nbr-off" if status.state != "online" else ""
        ticks = (
            ""
            if total > 128
            else "".join(
                f"<line x1='{index * each:.1f}' x2='{index * each:.1f}' y1='2' y2='22'/>"
                for index in range(1, total)
            )
        )
        middle = (start + end) / 2 * each
        label = f"{start}–{end - 1}" if end - start > 1 else f"{start}"
        return (
            f"<svg class='nbr-ruler{off}' viewBox='0 0 {width} 42' width='100%' role='img' "
            f"aria-label='blocks {start} to {end - 1} of {total}' xmlns='http://www.w3.org/2000/svg'>"
            f"<rect class='nbr-ruler-all' x='0.5' y='2' width='{width - 1}' height='20'/>"
            f"<rect class='nbr-ruler-ours' x='{start * each:.1f}' y='2' width='{(end - start) * each:.1f}' "
            f"height='20'/>"
            f"<g class='nbr-ruler-ticks'>{ticks}</g>"
            f"<text x='{min(max(middle, 24), width - 24):.1f}' y='37' text-anchor='middle'>{label}</text>"
            + ("<text x='0' y='37'>0</text>" if middle > 60 else "")
            + (f"<text x='{width}' y='37' text-anchor='end'>{total - 1}</text>" if middle < width - 60 else "")
            + "</svg>"
        )


def log_html(log: str) -> str:
    """The end of a log, folded."""
    lines = log.splitlines()[-_LOG_LINES:]
    count = f"{len(lines)} line{'' if len(lines) == 1 else 's'}"
    return (
        f"<details class='nbr-log'><summary>log, {count}</summary><pre>{text(chr(10).join(lines))}</pre></details>"
    )


def amount(size: float) -> str:
    """Bytes for people: ``463 MB``, ``1.2 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
