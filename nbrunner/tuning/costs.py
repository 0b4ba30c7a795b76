"""Where the time of a step went: computing here, computing on each server, and everything between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbrunner.client.watch import PassWatch

_RECENT = 20
"""Steps from which speed and the time that is left are estimated: the first are slower, and swarms change."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one or several steps. They add up to ``seconds``.

    Attributes
    ----------
    client
        Computing in this process.
    wire
        On the way, in queues, in daemons: whatever is neither here nor in a server's device.
    servers
        PeerID → in its device.
    sent, received
        Bytes of tensors.
    """

    seconds: float = 0.0
    client: float = 0.0
    wire: float = 0.0
    servers: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    sent: int = 0
    received: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Costs) -> Costs:
        servers = dict(self.servers)
        for peer, seconds in other.servers.items():
            servers[peer] = servers.get(peer, 0.0) + seconds
        return Costs(
            self.seconds + other.seconds,
            self.client + other.client,
            self.wire + other.wire,
            servers,
            self.tokens + other.tokens,
            self.steps + other.steps,
            self.sent + other.sent,
            self.received + other.received,
        )


def step_costs(watch: PassWatch, seconds: float, tokens: int) -> Costs:
    """The costs of a step that took ``seconds``.

    Servers work at the same time on different rows, so that their seconds may be more than the thread waited. What
    it waited is shared out among them and the wire in the proportions of the single requests.
    """
    waited = min(watch.waited, seconds)
    asked = sum(one.total_seconds for one in watch.passes)
    servers: dict[str, float] = {}
    for one in watch.passes:
        share = waited * min(one.compute_seconds, one.total_seconds) / asked if asked else 0.0
        servers[one.peer] = servers.get(one.peer, 0.0) + share
    return Costs(
        seconds=seconds,
        client=seconds - waited,
        wire=waited - sum(servers.values()),
        servers=servers,
        tokens=tokens,
        steps=1,
        sent=sum(one.bytes_sent for one in watch.passes),
        received=sum(one.bytes_received for one in watch.passes),
    )


def recent(costs: Sequence[Costs]) -> Costs:
    """The last steps together, without the very first, in which everything is touched for the first time."""
    later = costs[1:] or costs
    total = Costs()
    for one in later[-_RECENT:]:
        total += one
    return total


def seconds_left(costs: Sequence[Costs], steps_left: int) -> float | None:
    """How long the rest will take, if it goes on like this; None while nothing is known."""
    now = recent(costs)
    return now.seconds / now.steps * steps_left if now.steps else None
