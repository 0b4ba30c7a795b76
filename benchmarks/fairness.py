"""Two peers on one server, one with one session and one with eight: does anybody get less than its share?

With two peers a fair share is half of the server: half of the tokens per second that a peer would have alone. What
a peer gets beyond it, because the other cannot use it, is taken from nobody, so a share counts to 1 at most.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time

from benchmarks.children import Child, child, listen, say
from benchmarks.models import checkpoint, remote_model
from benchmarks.report import Report, Result

SESSIONS = (1, 8)
SECONDS = 12.0
ROUNDS = 5
PEERS = 2


def run() -> Report:
    """``mid``, one server with all blocks and one thread; each peer a process of its own."""
    import nbrunner

    together: list[list[float]] = [[], []]
    alone: list[list[float]] = [[], []]
    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=1) as swarm, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(child("benchmarks.fairness", swarm.invite, str(count))) for count in SESSIONS]
        for _ in range(ROUNDS):
            for index, one in enumerate(peers):
                alone[index].append(measure([one])[0])
            for index, rate in enumerate(measure(peers)):
                together[index].append(rate)
    rates = [statistics.median(measured) for measured in together]
    fair = [statistics.median(measured) / PEERS for measured in alone]
    shares = [min(1.0, rate / half) for rate, half in zip(rates, fair, strict=True)]
    names = [f"mid, the peer with {count} session{'s' if count > 1 else ''}" for count in SESSIONS]
    results = [
        Result(f"{name}: beside the other, over half of alone", rate, "tokens/s", reference=half, ratio=rate / half)
        for name, rate, half in zip(names, rates, fair, strict=True)
    ]
    results += [
        Result("mid, smaller share over larger, each 1 at most", min(shares) / max(shares), "", reach=0.8),
        Result(
            "mid, tokens of the peer with one session over one session's of the other", 8 * rates[0] / rates[1], ""
        ),
        Result("mid, tokens of the one peer over the other's", rates[0] / rates[1], ""),
    ]
    return Report("fairness", results, {"seconds": SECONDS, "rounds": ROUNDS, "dtype": "float32", "threads": 1})


def measure(peers: list[Child]) -> list[float]:
    """Tokens per second of peers that decode at the same time."""
    begin = time.time() + 2.0
    for peer in peers:
        peer.tell([begin, begin + SECONDS])
    return [float(peer.answer()) for peer in peers]


def serve_rounds(invite: str, sessions: int) -> None:
    """In the peer's process: decode from one time to another, as often as asked, from the same lengths on."""
    import threading

    import torch

    from benchmarks.models import prompt

    model = remote_model("mid", invite)
    lengths = [16 + 24 * index for index in range(sessions)]
    hidden = [torch.randn(1, 1, model.config.hidden_size) for _ in range(sessions)]
    opened = [model.blocks.inference_session() for _ in range(sessions)]
    embed = model.get_input_embeddings()
    with torch.inference_mode():
        for length, session in zip(lengths, opened, strict=True):
            session.step(embed(prompt("mid", length, seed=length)))
    for begin, end in listen():
        for length, session in zip(lengths, opened, strict=True):
            session.position = length
        counts = [0] * sessions

        def decode(index: int, begin: float = begin, end: float = end, counts: list[int] = counts) -> None:
            time.sleep(max(0.0, begin - time.time()))
            with torch.inference_mode():
                while time.time() < end:
                    opened[index].step(hidden[index])
                    counts[index] += 1

        threads = [threading.Thread(target=decode, args=(index,)) for index in range(sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(sum(counts) / (end - begin))


if __name__ == "__main__":
    serve_rounds(sys.argv[1], int(sys.argv[2]))
