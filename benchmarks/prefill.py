"""Time of a 512-token prompt against plain transformers."""

from __future__ import annotations

import itertools
import time
from typing import Any

from benchmarks.models import checkpoint, local_model, prompt, remote_model
from benchmarks.report import Report, Result, interleaved

TOKENS = 512
LONG = 2048

_seeds = itertools.count()


def run() -> Report:
    """``mid``, one and two servers, logits of the last position only, as generation asks for them."""
    import nbrunner

    local = local_model("mid")
    results = []
    for servers in (1, 2):
        with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=servers) as swarm:
            remote = remote_model("mid", swarm.invite)
            ours, theirs = interleaved(
                [lambda model=remote: prefill_seconds(model, TOKENS), lambda: prefill_seconds(local, TOKENS)]
            )
            remote.close()
        results.append(
            Result(
                f"mid, {servers} server{'s' if servers > 1 else ''}",
                TOKENS / ours,
                "tokens/s",
                reference=TOKENS / theirs,
                ratio=theirs / ours,
                reach=0.85,
            )
        )
    results.append(_pipelined())
    return Report("prefill", results, {"tokens": TOKENS, "batch": 1, "dtype": "float32", "threads": 1})


def _pipelined() -> Result:
    """A long prompt in parts, so that both servers work at once, over the same in one part."""
    import nbrunner
    from nbrunner.client import travel

    usual = travel.PIPELINE_TOKENS
    with nbrunner.LocalSwarm(model=str(checkpoint("mid")), servers=2) as swarm:
        remote = remote_model("mid", swarm.invite)

        def seconds(least: int) -> float:
            travel.PIPELINE_TOKENS = least  # there is no switch for it: nobody would want it
            try:
                return prefill_seconds(remote, LONG)
            finally:
                travel.PIPELINE_TOKENS = usual

        parts, whole = interleaved([lambda: seconds(usual), lambda: seconds(LONG)])
        remote.close()
    case = f"mid, 2 servers, {LONG} tokens in parts over in one"
    return Result(case, LONG / parts, "tokens/s", LONG / whole, whole / parts, reach=1.5)


def prefill_seconds(model: Any, tokens: int) -> float:
    """Of a prompt that nobody has seen: of one that is still held by a session that ends, nothing is computed."""
    import torch

    ids = prompt("mid", tokens, seed=next(_seeds))
    with torch.inference_mode():
        began = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
        return time.perf_counter() - began
