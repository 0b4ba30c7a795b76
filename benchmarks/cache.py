"""Memory of keys and values that sessions hold, over what their tokens need."""

from __future__ import annotations

import random

from benchmarks.models import checkpoint
from benchmarks.report import Report, Result

SESSIONS = 32
LENGTHS = (24, 2048)
DECODED = 16


def run() -> Report:
    """``tiny8``, prompts of 24 to 2,048 tokens (as many short as long, by doublings), then 16 steps."""
    import torch

    from nbrunner.blocks.checkpoint import resolve_checkpoint
    from nbrunner.blocks.span import BlockSpan

    torch.set_num_threads(1)
    found = resolve_checkpoint(str(checkpoint("tiny8")))
    span = BlockSpan.load(found, 0, found.num_blocks, dtype="float32")
    config = span.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    per_token = 2 * heads * width * span.dtype.itemsize * span.num_blocks
    chosen = random.Random(1)
    low, high = LENGTHS
    lengths = [round(low * (high / low) ** chosen.random()) for _ in range(SESSIONS)]
    held = needed = 0
    worst = 0.0
    for length in lengths:
        cache = span.new_cache()
        assert cache is not None
        span.forward(torch.zeros(1, length, *span.hidden_shape), cache=cache)
        for _ in range(DECODED):
            span.forward(torch.zeros(1, 1, *span.hidden_shape), cache=cache)
        held += cache.nbytes()
        needed += per_token * cache.length
        worst = max(worst, cache.nbytes() / (per_token * cache.length))
    results = [
        Result("tiny8, held over needed", held / needed, "", reach=1.25, at_most=True),
        Result("tiny8, the worst of the sessions", worst, ""),
    ]
    return Report("cache", results, {"sessions": SESSIONS, "tokens": sum(lengths), "decoded": DECODED})
