"""What a peer believes about the servers of its swarm at one moment: plain data, for routing and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbrunner.protocol.records import ServerRecord


@dataclass(frozen=True)
class ServerEntry:
    """One server.

    Attributes
    ----------
    record
        As it announces itself.
    expires
        Unix seconds until when the record is good.
    round_trip
        Seconds there and back to its event loop, as measured from here; None if not yet.
    failed_until
        Unix seconds before which it is not tried again; 0 for a server that has not failed.
    failure
        Why it is not used.
    """

    record: ServerRecord
    expires: float = 0.0
    round_trip: float | None = None
    failed_until: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class SwarmView:
    """All servers at one moment.

    Attributes
    ----------
    servers
        PeerID → entry, of those that can be used as far as we know; of any state except offline.
    failed
        PeerID → entry, of those that failed us and have not shown since that they are well.
    bad_links
        Pairs (near, far): near could not reach far. Both may be fine otherwise.
    nodes_heard
        DHT nodes that answered when the records were last fetched. 0: we are alone, or cut off.
    updated
        Unix seconds of that.
    """

    servers: Mapping[str, ServerEntry] = field(default_factory=dict)
    failed: Mapping[str, ServerEntry] = field(default_factory=dict)
    bad_links: frozenset[tuple[str, str]] = frozenset()
    nodes_heard: int = 0
    updated: float = 0.0
