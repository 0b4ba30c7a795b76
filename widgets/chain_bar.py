"""A chain of servers as a row of boxes, wide as the blocks they hold, and as one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbrunner.protocol.identity import short_peer
from nbrunner.widgets.page import page, text


@dataclass(frozen=True)
class HopView:
    """One hop as shown: PeerID, blocks ``[start, end)``, the name its owner gave, and why it was taken."""

    peer: str
    start: int
    end: int
    name: str = ""
    why: str = ""


@dataclass(frozen=True)
class ChainView:
    """A chain to look at. ``title`` above it, ``notes`` below, one line each."""

    hops: Sequence[HopView]
    title: str
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        lines = [self.title]
        for hop in self.hops:
            label = " ".join(part for part in (hop.name, short_peer(hop.peer)) if part)
            lines.append(f"  → [{hop.start}, {hop.end}) {label}" + (f": {hop.why}" if hop.why else ""))
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        return page(
            f"<div><strong>{text(self.title)}</strong></div>",
            f"<ol class='nbr-chain' aria-label='{text(self.title)}'>{''.join(map(_hop, self.hops))}</ol>",
            *[f"<div><small>{text(note)}</small></div>" for note in self.notes],
        )


def _hop(hop: HopView) -> str:
    name = f"{text(hop.name)} " if hop.name else ""
    why = f"<br><small>{text(hop.why)}</small>" if hop.why else ""
    return (
        f"<li style='flex: {max(1, hop.end - hop.start)} 1 auto'><span class='nbr-hop'>"
        f"{name}<span title='{text(hop.peer)}'>{text(short_peer(hop.peer))}</span> "
        f"<strong>[{hop.start}, {hop.end})</strong>{why}</span></li>"
    )
