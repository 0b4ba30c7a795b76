"""What is known of a server hosted here, from the facts that it sends. Pure."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RATE_SECONDS = 5.0
_MOST_PROBLEMS = 3


@dataclass(frozen=True)
class HostStatus:
    """A hosted server at one moment.

    Attributes
    ----------
    state
        ``starting``, ``online``, ``paused``, ``draining``, ``ended`` or ``failed``.
    blocks, num_blocks
        ``(start, end)`` once chosen; how many the model has.
    sessions, peers
        Open now; different peers served so far.
    tokens_in, tokens_out
        Tokens × rows of prompts and requests, and of steps of one token, since it started.
    rate_in, rate_out
        The same per second, over the last five.
    step_seconds, queue_seconds
        One token through its blocks; how long the last ones waited before.
    threads
        Of torch, as of now.
    cache_bytes, cache_limit
        Of the caches of sessions.
    memory_bytes, device_bytes
        Of the process in RAM; of torch on the GPU.
    errors
        What went wrong, in words, the last first.
    """

    state: str
    model: str
    blocks: tuple[int, int] | None = None
    num_blocks: int = 0
    device: str = ""
    dtype: str = ""
    sessions: int = 0
    peers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    rate_in: float = 0.0
    rate_out: float = 0.0
    step_seconds: float = 0.0
    queue_seconds: float = 0.0
    threads: int = 0
    cache_bytes: int = 0
    cache_limit: int = 0
    memory_bytes: int = 0
    device_bytes: int = 0
    errors: tuple[str, ...] = ()
    ready_at: float | None = None
    ended_at: float | None = None

    def changed(self, **facts: Any) -> HostStatus:
        """A copy with other facts."""
        if "errors" in facts:
            facts["errors"] = tuple(facts["errors"])
        if facts.get("state") in ("ended", "failed"):
            facts |= {"sessions": 0, "rate_in": 0.0, "rate_out": 0.0}
        return dataclasses.replace(self, **facts)

    def line(self, ends_at: float | None = None) -> str:
        """All of it in one line of text."""
        span = (
            f"blocks [{self.blocks[0]}, {self.blocks[1]}) of {self.num_blocks}" if self.blocks else "no blocks yet"
        )
        left = f", leaves in {duration(ends_at - time.time())}" if ends_at and self.state == "online" else ""
        why = f": {self.errors[0]}" if self.state == "failed" and self.errors else ""
        return (
            f"{self.state}{why}; {self.model}, {span}; {self.peers} peers served, {self.sessions} sessions; "
            f"in {self.rate_in:.0f}, out {self.rate_out:.0f} tokens/s; {self.memory_bytes / 1e6:.0f} MB{left}"
        )


class Rates:
    """Tokens per second from counters read now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def note(self, at: float, tokens_in: int, tokens_out: int) -> tuple[float, float]:
        """Tokens in and out per second over the last five seconds."""
        self._seen.append((at, tokens_in, tokens_out))
        while len(self._seen) > 2 and at - self._seen[1][0] >= _RATE_SECONDS:
            self._seen.popleft()
        first_at, first_in, first_out = self._seen[0]
        seconds = at - first_at
        if seconds <= 0:
            return 0.0, 0.0
        return (tokens_in - first_in) / seconds, (tokens_out - first_out) / seconds


def take_status(before: HostStatus, event: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """The fields of a `HostStatus` that a ``status`` event tells."""
    names = {field.name for field in dataclasses.fields(before)} - {"errors", "model", "blocks"}
    facts = {name: value for name, value in event.items() if name in names}
    if facts.get("state") not in ("online", "paused", "draining"):
        facts.pop("state", None)
    into, out = rates.note(float(event["at"]), int(event["tokens_in"]), int(event["tokens_out"]))
    return facts | {"rate_in": into, "rate_out": out}


def problems_of(log: str, *, ended: bool = False) -> list[str]:
    """Warnings and errors in a log, without what only programmers read, the last first.

    ``ended``: the server did not leave by being told to; its last words are then the reason.
    """
    found = []
    lines = [line for line in log.splitlines() if line.strip()]
    for line in lines:
        match = re.match(r"\d\d:\d\d:\d\d [WEC] (.*)", line) or re.match(r"nbrunner: (.*)", line)
        if match and match[1] not in found:
            found.append(match[1])
    if ended and not found and lines:
        found.append(lines[-1].strip())
    return found[::-1][:_MOST_PROBLEMS]


def duration(seconds: float) -> str:
    """``1 h 59 min``, ``59 s``."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
