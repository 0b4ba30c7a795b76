"""How many threads torch takes in a server: the cores of a machine are for all of its user's servers on it.

One server alone takes every core that it may use. Servers that share a machine and take every core each wait for
each other at the end of every matrix product; so each takes its share, and more again when others leave.

torch keeps the number for each thread that computes, and a new thread begins with the number that was set last.
``OMP_NUM_THREADS`` says with how many torch begins and does not keep it from taking more later, so that a server
can grow; but whoever set it meant something by it, and it stays the most that a share can be.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from nbrunner.server.compute import ComputeThread
from nbrunner.server.host import Host, measure
from nbrunner.server.neighbours import Neighbour, Seat, neighbours
from nbrunner.server.scheduler import Urgency

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks at who else serves on this machine. One look takes half a millisecond."""


def share(cores: int, others: Sequence[int]) -> int:
    """Threads for one server among others.

    Parameters
    ----------
    cores
        That it may use.
    others
        Of each other server: the threads it was told to take; 0 if it takes its share, as we do.
    """
    return max(1, (cores - sum(others)) // (1 + others.count(0)))


def processors() -> frozenset[int]:
    """Numbers of those that this process may run on."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def usable_cores(allowed: Collection[int], *, system: Path = Path("/sys")) -> int:
    """How many cores a process has, at least 1: those of its processors, within its container's share of time.

    Two processors that are threads of one core count once, as torch itself counts: they share what multiplies.
    """
    cores = set()
    for one in allowed:
        try:
            cores.add((system / f"devices/system/cpu/cpu{one}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(one))
    return max(1, min(len(cores), _time_limit(system / "fs/cgroup") or len(cores)))


def _time_limit(folder: Path) -> int:
    """Whole processors' worth of time that a cgroup leaves us, at least 1; 0 if it sets no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return 0
    try:
        return max(1, int(quota) // int(period)) if int(quota) > 0 else 0
    except (ValueError, ZeroDivisionError):
        return 0  # "max"


def _most() -> int:
    """What ``OMP_NUM_THREADS`` says, of which the first number counts; 0 if nothing."""
    match = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(match[1]) if match else 0


class Threads:
    """The number that one server takes, kept fair.

    Parameters
    ----------
    wanted
        A number that stays; 0: its share of the cores, as other servers come and go.

    Attributes
    ----------
    count : int
        As of the last look.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._seat: Seat | None = None
        self.count = 0
        self.look()

    def take_seat(self, folder: Path) -> None:
        """From now on the others count us. ``folder`` is private, and goes when this server does."""
        try:
            self._seat = Seat(folder, Neighbour(self._wanted, processors()))
        except OSError as error:
            logger.warning("other servers on this machine will not know of this one (%s)", error)

    def look(self) -> bool:
        """See who is there, and whether the number has changed by that."""
        before = self.count
        if self._wanted:
            self.count = self._wanted
            return self.count != before
        ours = processors()
        others = [one.threads for one in neighbours(self._seat) if not one.processors or one.processors & ours]
        cores = usable_cores(ours)
        self.count = min(share(cores, others), _most() or cores)
        if before and self.count != before:
            logger.info(
                "servers of yours on this machine: %d; computing with %d of its %d cores from now on",
                *(1 + len(others), self.count, cores),
            )
        return self.count != before

    def apply(self) -> None:
        """For the thread that calls it, and those that begin to compute later."""
        torch.set_num_threads(self.count)

    async def follow(self, compute: ComputeThread, host: Host) -> None:
        """Keep the number fair in the event loop, which runs brief steps, and in the compute thread.

        How fast the blocks are is measured again as soon as nobody would have to wait for that.
        """
        measured = True
        while not self._wanted:
            if self.look():
                self.apply()
                await compute.submit(self.apply, Urgency.DECODE)
                measured = host.span.device.type != "cpu"
            if not measured and not host.sessions and not compute.waiting:
                speed = (await compute.submit(lambda: measure(host.span), Urgency.STATELESS)).value
                host.take_speed(speed.step_seconds, speed.prefill_tokens_per_second)
                measured = True
            await asyncio.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """The others need not count us any more. May be called more than once."""
        if self._seat is not None:
            self._seat.close()
