"""``nbrunner status``: who serves what, as seen from here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

from nbrunner.client.svg import tidy
from nbrunner.errors import serve_command
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.directory import Directory, SwarmView
from nbrunner.swarm.node import Node

_BAR = 24
_ROOM_FOR_BARS = 110
_NO_TERMINAL = 200
_PING_SECONDS = 2.0
_COLUMNS = ("server", "blocks", "", "state", "ms/token", "round trip", "cache left", "sessions", "version")


async def look(invite: Invite) -> SwarmView:
    """Join as a client, ask for all records and ping the servers.

    Raises
    ------
    BootstrapError
        Nobody answered.
    """
    node = await Node.create(invite=invite, client_mode=True)
    try:
        directory = Directory(node)
        await directory.start()
        servers = list(directory.view.servers)
        await asyncio.gather(*(directory.measure(peer, _PING_SECONDS) for peer in servers), return_exceptions=True)
        view = directory.view
        await directory.close()
        return view
    finally:
        await node.close()


def gaps(records: Iterable[ServerRecord]) -> dict[str, list[tuple[int, int]]]:
    """For each model, the blocks that no online server has, as ranges."""
    served: dict[str, list[bool]] = {}
    for record in records:
        blocks = served.setdefault(record.model, [False] * record.num_blocks)
        if record.state == "online":
            for block in range(record.start, min(record.end, len(blocks))):
                blocks[block] = True
    missing: dict[str, list[tuple[int, int]]] = {}
    for model, blocks in served.items():
        edges = [False, *(not there for there in blocks), False]
        changes = [at for at, (a, b) in enumerate(itertools.pairwise(edges)) if a != b]
        missing[model] = list(zip(changes[::2], changes[1::2], strict=True))
    return missing


def as_json(view: SwarmView) -> dict[str, Any]:
    """The view for programs."""
    servers = [
        {
            "peer": peer,
            "name": entry.record.name,
            "model": entry.record.model,
            "num_blocks": entry.record.num_blocks,
            "blocks": [entry.record.start, entry.record.end],
            "state": entry.record.state,
            "step_seconds": entry.record.step_seconds,
            "prefill_tokens_per_second": entry.record.prefill_tokens_per_second,
            "queue_seconds": entry.record.queue_seconds,
            "round_trip": entry.round_trip,
            "cache_bytes_left": entry.record.cache_bytes_left,
            "sessions": entry.record.sessions,
            "dtype": entry.record.dtype,
            "version": entry.record.version,
            "started": entry.record.started,
        }
        for peer, entry in _sorted(view)
    ]
    missing = gaps(entry.record for entry in view.servers.values())
    return {
        "servers": servers,
        "missing": {model: [list(one) for one in ranges] for model, ranges in missing.items()},
    }


def show(view: SwarmView) -> None:
    """The view as tables on standard output, one a model."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def plain(given: str) -> str:  # others chose it: neither rich's markup nor codes that steer the terminal
        return escape(tidy(given))

    console = Console()
    if not console.is_terminal:
        console = Console(width=_NO_TERMINAL)  # else a pipe gets the 80 columns of a terminal that nobody has
    drawn = console.width >= _ROOM_FOR_BARS
    models = sorted({entry.record.model for entry in view.servers.values()})
    if not models:
        console.print("Nobody serves anything in this swarm. To: nbrunner serve MODEL --invite INVITE")
    missing = gaps(entry.record for entry in view.servers.values())
    for model in models:
        table = Table(title=plain(model), title_justify="left", box=None, pad_edge=False)
        for name in _COLUMNS:
            if name or drawn:
                table.add_column(name, no_wrap=True)
        for peer, entry in _sorted(view):
            record = entry.record
            if record.model != model:
                continue
            table.add_row(
                plain(f"{short_peer(peer)} {record.name}".strip()),
                f"{record.start}:{record.end}",
                *([bar(record.start, record.end, record.num_blocks)] if drawn else []),
                record.state,
                f"{record.step_seconds * 1e3:.1f}",
                "?" if entry.round_trip is None else f"{entry.round_trip * 1e3:.0f} ms",
                f"{record.cache_bytes_left / 1e9:.1f} GB",
                str(record.sessions),
                plain(record.version),
            )
        console.print(table)
        for start, end in missing[model]:
            console.print(
                f"  [bold]blocks {start}:{end} are missing[/bold]. To serve them: "
                f"{escape(serve_command(model, start, end))}",
                soft_wrap=True,
            )


def bar(start: int, end: int, total: int, width: int = _BAR) -> str:
    """Where a span lies in its model, in characters."""
    width = min(width, total)
    first = start * width // total
    last = max(first + 1, -(-end * width // total))
    return "·" * first + "█" * (last - first) + "·" * (width - last)


def _sorted(view: SwarmView) -> list[tuple[str, Any]]:
    return sorted(view.servers.items(), key=lambda item: (item[1].record.model, item[1].record.start, item[0]))
