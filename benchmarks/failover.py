"""How long a generation stalls when a server of its chain is killed in the middle."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from benchmarks.models import SHAPES, checkpoint, local_model, prompt, remote_model
from benchmarks.report import Report, Result
from benchmarks.timing import TokenClock

TOKENS = 64
PROMPT = 128
ROUNDS = 5


def run() -> Report:
    """``mid`` over two spans with a spare for the second; kill -9 of the one in use after half of the tokens."""
    import nbrunner

    ids = prompt("mid", PROMPT)
    half = SHAPES["mid"]["num_hidden_layers"] // 2
    spans = [f"0:{half}", f"{half}:{2 * half}", f"{half}:{2 * half}"]
    again = Recomputing(half)
    stalls, computing = [], []
    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=spans) as swarm:
        remote = remote_model("mid", swarm.invite)
        for _ in range(ROUNDS):
            stalls.append(stall_seconds(remote, swarm, ids))
            computing.append(again.seconds())
            swarm.add_server(spans[1])
        remote.close()
    recompute = statistics.median(computing)
    beyond = statistics.median(stalls) - recompute
    return Report(
        "failover",
        [
            Result("mid, kill -9 of the second server: stall", statistics.median(stalls), "s"),
            Result("mid: recomputing the lost caches", recompute, "s"),
            Result("mid: stall beyond recomputing", beyond, "s", reach=1.0, at_most=True),
        ],
        {"prompt": PROMPT, "tokens": TOKENS, "rounds": ROUNDS, "worst stall": round(max(stalls), 3)},
    )


class Recomputing:
    """Plain transformers: the tokens held at the kill, through the lost blocks."""

    def __init__(self, blocks: int) -> None:
        import torch

        self.model = local_model("mid").model
        self.model.layers = self.model.layers[:blocks]
        self.hidden = torch.randn(1, PROMPT + TOKENS // 2, SHAPES["mid"]["hidden_size"])
        self.seconds()

    def seconds(self) -> float:
        import torch

        with torch.inference_mode():
            began = time.perf_counter()
            self.model(inputs_embeds=self.hidden, use_cache=True)
            return time.perf_counter() - began


def stall_seconds(model: Any, swarm: Any, ids: Any) -> float:
    """The longest gap between two tokens of a generation whose second server is killed, less a usual gap."""
    import torch

    class Killer(TokenClock):
        def put(self, value: Any) -> None:
            super().put(value)
            if len(self.times) == TOKENS // 2:
                peer = session.chain[-1][0]
                victim = next(server for server in swarm.servers if server.peer_id == peer)
                threading.Thread(target=victim.kill).start()

    clock = Killer()
    with torch.inference_mode(), model.inference_session() as session:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            session=session,
            streamer=clock,
        )
    return max(clock.gaps) - statistics.median(clock.gaps)
