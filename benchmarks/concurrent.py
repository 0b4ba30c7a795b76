"""Several sessions at once: their tokens per second together, over one session's, and over plain transformers'.

``--processes`` runs only the second part: four client processes over two servers, against four processes of plain
transformers. Both have the two cores of the machine to share.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.children import Child, child, listen, say
from benchmarks.models import checkpoint, local_model, prompt, remote_model
from benchmarks.report import Report, Result, interleaved
from benchmarks.timing import generate_timed

SESSIONS = 8
TOKENS = 48
PROMPTS = [16, 24, 40, 64, 96, 144, 200, 256]

PROCESSES = 4
PROCESS_PROMPTS = [16, 40, 96, 200]


def run(*, processes: bool = False) -> Report:
    """``mid``; greedy, prompts of 16 to 256 tokens; one thread in each process.

    Parameters
    ----------
    processes
        Only the part with several client processes.
    """
    results = [_over_plain()] if processes else [_over_one(), _over_plain()]
    prompts = {} if processes else {"prompts": PROMPTS}
    conditions = {"tokens": TOKENS, **prompts, "prompts of processes": PROCESS_PROMPTS}
    name = "concurrent --processes" if processes else "concurrent"
    return Report(name, results, {**conditions, "dtype": "float32", "threads": 1})


def _over_one() -> Result:
    """One server with all blocks; the sessions are threads of one client."""
    import nbrunner

    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=1) as swarm:
        remote = remote_model("mid", swarm.invite)
        together, one = interleaved(
            [lambda: 1 / tokens_per_second(remote, PROMPTS), lambda: 1 / tokens_per_second(remote, [PROMPTS[4]])]
        )
        remote.close()
    return Result(
        f"mid, {SESSIONS} sessions over one",
        1 / together,
        "tokens/s",
        reference=1 / one,
        ratio=one / together,
        reach=3.0,
    )


def _over_plain() -> Result:
    """Two servers; each client a process with a session, against as many processes with the whole model."""
    import nbrunner

    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=2) as swarm, contextlib.ExitStack() as stack:
        clients, plain = (
            [stack.enter_context(child("benchmarks.concurrent", where, str(length))) for length in PROCESS_PROMPTS]
            for where in (swarm.invite, PLAIN)
        )
        ours, theirs = interleaved([lambda: 1 / rate_of(clients), lambda: 1 / rate_of(plain)])
    return Result(
        f"mid, {PROCESSES} client processes over two servers, against as many of plain transformers",
        1 / ours,
        "tokens/s",
        reference=1 / theirs,
        ratio=theirs / ours,
        reach=1.5,
    )


def tokens_per_second(model: Any, prompts: list[int]) -> float:
    """Of all sessions together, while all of them decode."""
    return rate(run_sessions(model, prompts, TOKENS))


def run_sessions(model: Any, prompts: list[int], tokens: int) -> list[list[float]]:
    """One thread a session, begun together; when the tokens of each came."""
    times: list[list[float]] = [[] for _ in prompts]
    ready = threading.Barrier(len(prompts))

    def session(index: int) -> None:
        ready.wait()
        times[index] = generate_timed(model, prompt("mid", prompts[index], seed=index), tokens).times

    threads = [threading.Thread(target=session, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens per second in the time in which every session decodes."""
    begin = max(marks[1] for marks in times)
    end = min(marks[-1] for marks in times)
    count = sum(begin < at <= end for marks in times for at in marks[2:])
    return count / (end - begin)


# -- the processes -------------------------------------------------------------------------------------------------

PLAIN = "plain"


def rate_of(children: Sequence[Child]) -> float:
    """Tokens per second of processes that begin together."""
    begin = time.perf_counter() + 1.0  # one clock for all processes of a machine
    for one in children:
        one.tell(begin)
    return rate([one.answer() for one in children])


def generate_when_told(where: str, length: int) -> None:
    """In a process of its own: the model over a swarm, or ``plain``; one generation each time."""
    model = local_model("mid") if where == PLAIN else remote_model("mid", where)
    ids = prompt("mid", length)
    for begin in listen():
        time.sleep(max(0.0, begin - time.perf_counter()))
        say(generate_timed(model, ids, TOKENS).times)


if __name__ == "__main__":
    generate_when_told(sys.argv[1], int(sys.argv[2]))
