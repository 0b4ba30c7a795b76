"""What a server tells its owner about itself: plain facts, for a card or a program."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from nbrunner.server.runner import BlockServer


def status_of(server: BlockServer) -> dict[str, object]:
    """The state of a server that is ready, as JSON values; bytes and seconds, counters since it started."""
    host = server.host
    quotas = host.quotas
    return {
        "state": server.state,
        "sessions": quotas.sessions,
        "peers": host.traffic.peers,
        "tokens_in": host.traffic.tokens_in,
        "tokens_out": host.traffic.tokens_out,
        "step_seconds": host.step_seconds,
        "queue_seconds": host.queue_seconds,
        "threads": server.threads,
        "cache_bytes": quotas.bytes_used,
        "cache_limit": host.limits.cache_bytes,
        "memory_bytes": resident_bytes(),
        "device_bytes": _device_bytes(host.span.device),
        "at": time.time(),
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM, pages that it shares included; 0 where that cannot be read."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0
