"""``%swarm map``: what the directory knows, as a map; and who keeps it fresh while the map is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nbrunner.errors import NBRunnerError, serve_command
from nbrunner.magics.swarm_views import look, uncovered
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.routing import explain
from nbrunner.swarm.view import ServerEntry, SwarmView
from nbrunner.widgets.live_map import LiveMap
from nbrunner.widgets.swarm_map import Gap, MapModel, MapServer, SwarmMap

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbrunner.client.connection import SwarmConnection

_LOOK_PERIOD = 2.0  # seconds between two rounds of asking everybody; the picture itself changes more often


def map_of(view: SwarmView, *, title: str, moment: str = "", advice: Mapping[str, str] | None = None) -> SwarmMap:
    """The map of a view.

    Parameters
    ----------
    view
        What is known; those that failed us are shown as unreachable.
    title, moment
        Of the whole; when it was.
    advice
        Model uid → a sentence to show below its servers.
    """
    known = {**{peer: (entry, "") for peer, entry in view.servers.items()}}
    known |= {peer: (entry, "unreachable") for peer, entry in view.failed.items()}
    models = []
    for model in sorted({entry.record.model for entry, _ in known.values()}):
        servers = sorted(
            (_server(peer, entry, state) for peer, (entry, state) in known.items() if entry.record.model == model),
            key=lambda one: (one.start, one.end, one.peer),
        )
        blocks = max(entry.record.num_blocks for entry, _ in known.values() if entry.record.model == model)
        missing = uncovered(((one.start, one.end) for one in servers if one.state == "online"), blocks)
        told = explain(view, model=model, start=0, end=blocks)
        models.append(
            MapModel(
                model=model,
                num_blocks=blocks,
                servers=servers,
                route=[(cost.hop.peer, cost.hop.start, cost.hop.end) for cost in told.hops],
                route_seconds=told.seconds if told.hops else None,
                gaps=[Gap(start, end, serve_command(model, start, end)) for start, end in missing],
                notes=[advice[model]] if advice and advice.get(model) else [],
            )
        )
    notes = (
        []
        if models
        else ["No server has announced itself yet. To serve a model: nbrunner serve MODEL --invite INVITE"]
    )
    return SwarmMap(title, models, moment, notes)


class MapKeeper:
    """The live map of one notebook: at most one, in the output of the cell that asked last.

    Parameters
    ----------
    title
        Of the map.
    connection
        Whose directory is shown and kept fresh.
    advice
        As for `map_of`; called once a picture, must not block.
    """

    def __init__(
        self, connection: SwarmConnection, title: str, advice: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        from nbrunner.swarm.loop import EngineLoop

        self._connection, self._title, self._advice = connection, title, advice
        self._looking: Future[None] = EngineLoop.get().submit(self._look())
        try:
            self._map = LiveMap(self.draw, on_end=self._stop_looking)
        except BaseException:
            self._looking.cancel()
            raise

    def draw(self) -> SwarmMap:
        """The map of now, from what is known."""
        view = self._connection.directory.view
        return map_of(view, title=self._title, moment=time.strftime("%H:%M:%S"), advice=self._advice())

    def stop(self) -> None:
        """Freeze the picture and stop asking."""
        self._map.stop()
        self._stop_looking()

    def _stop_looking(self) -> None:
        self._looking.cancel()

    @property
    def running(self) -> bool:
        return self._map.running

    async def _look(self) -> None:
        while True:
            try:
                await look(self._connection)
            except NBRunnerError:
                if self._connection.node.closed:
                    return
            await asyncio.sleep(_LOOK_PERIOD)


def _server(peer: str, entry: ServerEntry, state: str) -> MapServer:
    record = entry.record
    cache = record.cache_bytes_left // record.cache_bytes_per_token if record.cache_bytes_per_token else None
    return MapServer(
        peer=peer,
        name=record.name,
        start=record.start,
        end=record.end,
        state=state or record.state,
        tokens_per_second=1 / record.step_seconds if record.step_seconds > 0 else None,
        latency=entry.round_trip,
        queue=record.queue_seconds,
        cache_tokens=cache,
        adapters=record.adapters,
        version=record.version,
        relayed=is_relayed(record),
        trouble=entry.failure if state else "",
    )


def is_relayed(record: ServerRecord) -> bool:
    """Whether a server can be reached only through another peer, by the addresses it announces."""
    return bool(record.addresses) and all("/p2p-circuit" in address for address in record.addresses)
