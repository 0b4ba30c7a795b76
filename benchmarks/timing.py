"""Timing of generation, token by token."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from benchmarks.report import interleaved


class TokenClock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def gaps(self) -> list[float]:
        """Seconds between new tokens; the prompt and the first token, which is the prefill's, left out."""
        marks = self.times[1:]
        return [b - a for a, b in itertools.pairwise(marks)]


def seconds_per_token(model: Any, ids: Any, tokens: int) -> float:
    """Median over one greedy generation."""
    return statistics.median(generate_timed(model, ids, tokens).gaps)


def decode_over_servers(name: str, servers: int, tokens: int) -> tuple[float, float]:
    """Seconds per token of a model over so many servers, and of plain transformers, measured in turn."""
    import nbrunner
    from benchmarks.models import checkpoint, local_model, prompt, remote_model

    local, ids = local_model(name), prompt(name, 16)
    with nbrunner.LocalSwarm(model=str(checkpoint(name)), servers=servers) as swarm:
        remote = remote_model(name, swarm.invite)
        ours, theirs = interleaved(
            [lambda: seconds_per_token(remote, ids, tokens), lambda: seconds_per_token(local, ids, tokens)]
        )
        remote.close()
    return ours, theirs


def generate_timed(model: Any, ids: Any, tokens: int) -> TokenClock:
    import torch

    clock = TokenClock()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    return clock
