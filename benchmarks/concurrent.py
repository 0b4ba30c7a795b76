"""Several sessions on one server at once: their tokens per second together, over those of one session."""

from __future__ import annotations

import threading
from typing import Any

from benchmarks.models import checkpoint, prompt, remote_model
from benchmarks.report import Report, Result, interleaved
from benchmarks.timing import TokenClock, generate_timed

SESSIONS = 8
TOKENS = 48
PROMPTS = [16, 24, 40, 64, 96, 144, 200, 256]


def run() -> Report:
    """``mid``, one server with all blocks and one thread; greedy, prompts of 16 to 256 tokens."""
    import nbrunner

    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=1) as swarm:
        remote = remote_model("mid", swarm.invite)
        together, one = interleaved(
            [lambda: 1 / tokens_per_second(remote, PROMPTS), lambda: 1 / tokens_per_second(remote, [PROMPTS[4]])]
        )
        remote.close()
    result = Result(
        f"mid, {SESSIONS} sessions over one",
        1 / together,
        "tokens/s",
        reference=1 / one,
        ratio=one / together,
        reach=3.0,
    )
    return Report("concurrent", [result], {"tokens": TOKENS, "prompts": PROMPTS, "dtype": "float32", "threads": 1})


def tokens_per_second(model: Any, prompts: list[int]) -> float:
    """Of all sessions together, while all of them decode."""
    return rate(run_sessions(model, prompts, TOKENS))


def run_sessions(model: Any, prompts: list[int], tokens: int) -> list[TokenClock]:
    """One thread a session, begun together."""
    clocks: list[TokenClock | None] = [None] * len(prompts)
    ready = threading.Barrier(len(prompts))

    def session(index: int) -> None:
        ready.wait()
        clocks[index] = generate_timed(model, prompt("mid", prompts[index]), tokens)

    threads = [threading.Thread(target=session, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [clock for clock in clocks if clock is not None]


def rate(clocks: list[TokenClock]) -> float:
    """Tokens per second in the time in which every session decodes."""
    begin = max(clock.times[1] for clock in clocks)
    end = min(clock.times[-1] for clock in clocks)
    count = sum(begin < at <= end for clock in clocks for at in clock.times[2:])
    return count / (end - begin)
