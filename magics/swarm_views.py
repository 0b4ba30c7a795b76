"""The directory's data as the tables and chains that `nbrunner.widgets` shows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nbrunner.errors import PeerError, serve_command
from nbrunner.protocol.identity import short_peer
from nbrunner.swarm.routing import Explanation, HopCost
from nbrunner.swarm.view import ServerEntry, SwarmView
from nbrunner.widgets.chain_bar import ChainView, HopView
from nbrunner.widgets.swarm_table import ModelTable, ServerRow, SwarmTable

if TYPE_CHECKING:
    from nbrunner.client.connection import SwarmConnection


async def look(connection: SwarmConnection) -> SwarmView:
    """The swarm as it is now: fresh records, and every server asked whether it is there. Runs on the engine."""
    directory = connection.directory
    await directory.refresh()

    async def ask(peer: str) -> None:
        try:
            await directory.measure(peer)
        except PeerError as error:
            directory.mark_failed(peer, str(error))

    await asyncio.gather(*(ask(peer) for peer in directory.view.servers))
    return directory.view


def swarm_table(
    view: SwarmView, *, title: str, invite: bool, advice: Mapping[str, str] | None = None
) -> SwarmTable:
    """All servers known, by model; those that failed us are shown as unreachable. ``advice``: uid → a sentence."""
    rows: dict[str, list[ServerRow]] = {}
    blocks: dict[str, int] = {}
    for peer, entry in view.servers.items():
        _add(rows, blocks, peer, entry, entry.record.state)
    for peer, entry in view.failed.items():
        _add(rows, blocks, peer, entry, "unreachable")
    models = []
    for model in sorted(rows):
        ordered = sorted(rows[model], key=lambda row: (row.start, row.end, row.peer))
        missing = uncovered(((row.start, row.end) for row in ordered if row.state == "online"), blocks[model])
        models.append(ModelTable(model, blocks[model], ordered, missing, _advice(model, missing)))
    notes = [] if rows else ["No server has announced itself yet."]
    notes += [advice[model] for model in sorted(rows) if advice and advice.get(model)]
    if invite and not rows:
        notes.append("To serve a model: nbrunner serve MODEL --invite INVITE, with an invite of role 'host'.")
    return SwarmTable(title, models, notes)


def uncovered(spans: Iterable[tuple[int, int]], blocks: int) -> list[tuple[int, int]]:
    """Ranges of ``[0, blocks)`` in none of the spans."""
    missing, position = [], 0
    for start, end in sorted(spans):
        if start > position:
            missing.append((position, start))
        position = max(position, end)
    if position < blocks:
        missing.append((position, blocks))
    return missing


def chain_view(explanation: Explanation, view: SwarmView, model: str) -> ChainView:
    """Where the next request would go, what each hop costs, and why the other servers are not in it."""
    known = {**view.servers, **view.failed}
    hops = [_hop(cost, known[cost.hop.peer].record.name) for cost in explanation.hops]
    if hops:
        title = (
            f"The next request to {model} goes through {len(hops)} server{'' if len(hops) == 1 else 's'}: "
            f"about {explanation.seconds * 1e3:.1f} ms for each token outside this process"
        )
        notes = [f"and {explanation.back * 1e3:.1f} ms back to this notebook"]
    else:
        title = f"No chain for {model} can be made now"
        notes = []
    for start, end in explanation.missing:
        notes.append(f"nobody serves blocks [{start}, {end}): {_advice(model, [(start, end)])}")
    for peer, why in explanation.unused.items():
        record = known[peer].record
        label = " ".join(part for part in (record.name, short_peer(peer)) if part)
        notes.append(f"not used: {label} [{record.start}, {record.end}), {why}")
    return ChainView(hops, title, notes)


def _add(
    rows: dict[str, list[ServerRow]], blocks: dict[str, int], peer: str, entry: ServerEntry, state: str
) -> None:
    record = entry.record
    cache = record.cache_bytes_left // record.cache_bytes_per_token if record.cache_bytes_per_token else None
    row = ServerRow(
        peer=peer,
        name=record.name,
        start=record.start,
        end=record.end,
        state=state,
        tokens_per_second=1 / record.step_seconds if record.step_seconds > 0 else None,
        latency=entry.round_trip,
        cache_tokens=cache,
        sessions=record.sessions,
        version=record.version,
        dtype=record.dtype,
    )
    rows.setdefault(record.model, []).append(row)
    blocks[record.model] = max(blocks.get(record.model, 0), record.num_blocks)


def _hop(cost: HopCost, name: str) -> HopView:
    why = f"{cost.network * 1e3:.1f} ms there, {cost.compute * 1e3:.1f} ms computing"
    if cost.queue > 0.0005:
        why += f", {cost.queue * 1e3:.1f} ms waiting"
    if cost.penalty:
        why += ", hardly any room left in its caches"
    return HopView(cost.hop.peer, cost.hop.start, cost.hop.end, name, why)


def _advice(model: str, missing: list[tuple[int, int]]) -> str:
    return serve_command(model, *missing[0]) if missing else ""
