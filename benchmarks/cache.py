"""Memory of keys and values that sessions hold, over what their tokens need."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from benchmarks.models import checkpoint
from benchmarks.report import Report, Result

if TYPE_CHECKING:
    from nbrunner.blocks.span import BlockSpan

SESSIONS = 32
LENGTHS = (24, 2048)
DECODED = 16


SYSTEM = 512
OWN = (24, 512)


def run() -> Report:
    """``tiny8``, prompts of 24 to 2,048 tokens (as many short as long, by doublings), then 16 steps.

    Then 32 sessions that begin with the same 512 tokens and go on with 24 to 512 of their own: caches and
    transcripts, over those of the same sessions if each held all of it.
    """
    import torch

    from nbrunner.blocks.checkpoint import resolve_checkpoint
    from nbrunner.blocks.span import BlockSpan

    torch.set_num_threads(1)
    found = resolve_checkpoint(str(checkpoint("tiny8")))
    span = BlockSpan.load(found, 0, found.num_blocks, dtype="float32")
    config = span.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    per_token = 2 * heads * width * span.dtype.itemsize * span.num_blocks
    lengths = _lengths(*LENGTHS)
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
    own = _lengths(*OWN)
    shared, token_bytes = _bytes_shared(span, own), per_token + span.hidden_shape[0] * span.dtype.itemsize
    results = [
        Result("tiny8, held over needed", held / needed, "", reach=1.25, at_most=True),
        Result("tiny8, the worst of the sessions", worst, ""),
        Result(
            "tiny8, a common beginning of 512 tokens, held over needed",
            shared / (token_bytes * (SYSTEM + sum(own) + SESSIONS * DECODED)),
            "",
            reach=1.25,
            at_most=True,
        ),
        Result("tiny8, the same, over held by each for itself", shared / _bytes_shared(span, own, share=False), ""),
    ]
    return Report("cache", results, {"sessions": SESSIONS, "tokens": sum(lengths), "decoded": DECODED})


def _lengths(low: int, high: int) -> list[int]:
    chosen = random.Random(1)
    return [round(low * (high / low) ** chosen.random()) for _ in range(SESSIONS)]


def _bytes_shared(span: BlockSpan, own: list[int], *, share: bool = True) -> int:
    """What a server's sessions hold that begin alike and go on each with its own."""
    import torch

    from nbrunner.server.content import Content
    from nbrunner.server.session_memory import FrozenBytes, SessionMemory

    frozen = FrozenBytes()
    memories: list[SessionMemory] = []
    with torch.inference_mode():
        for length in own:
            cache = span.new_cache()
            assert cache is not None
            memory = SessionMemory(cache, Content(b""), frozen, "")
            memories.append(memory)
            if share and len(memories) > 1:
                memory.start_like(memories[0], SYSTEM)
            prompt = SYSTEM + length - cache.length
            for tokens in (prompt, *[1] * DECODED):
                output = span.forward(torch.zeros(1, tokens, *span.hidden_shape), cache=cache)
                memory.transcript.append({"hidden": output.hidden})
    return frozen.nbytes() + sum(memory.nbytes for memory in memories)
