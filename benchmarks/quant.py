"""Quantised blocks on a CPU against bfloat16: time of a step and memory; what they and 8 bits on the wire cost."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
import time
from typing import Any

from benchmarks.models import checkpoint, prompt, remote_model
from benchmarks.report import Report, Result, interleaved
from benchmarks.timing import seconds_per_token

STEPS = 16
TOKENS = 48
TEXTS = 40
KINDS = ("int8", "int4")
WIRE = "8 bits on the wire"


def run() -> Report:
    import torch

    torch.set_num_threads(1)
    results = [_over_a_server(), *_speed_and_memory(torch.bfloat16), *_accuracy()]
    return Report("quant", results, {"threads": 1, "model": "mid, tiny", "tokens": TOKENS})


def _over_a_server() -> Result:
    """What a client notices: its own part of a token, and the way to the server, are the same for both."""
    import nbrunner

    with contextlib.ExitStack() as stack:
        models = []
        for kind in ("none", "int8"):
            options = {"servers": 1, "dtype": "bfloat16", "quantize": kind}
            swarm = stack.enter_context(nbrunner.LocalSwarm(str(checkpoint("mid")), **options))
            models.append(remote_model("mid", swarm.invite, dtype="bfloat16"))
            stack.callback(models[-1].close)
        ids = prompt("mid", 16)
        plain, packed = interleaved([lambda model=model: seconds_per_token(model, ids, TOKENS) for model in models])
    return Result(
        "mid, decode over one server, int8 against bfloat16",
        1 / packed,
        "tokens/s",
        1 / plain,
        plain / packed,
        reach=1.3,
    )


def _speed_and_memory(dtype: Any) -> list[Result]:
    """Spans of all of ``mid``, in this process: what a server does of a step."""
    from nbrunner.blocks.checkpoint import resolve_checkpoint
    from nbrunner.blocks.span import BlockSpan

    found = resolve_checkpoint(checkpoint("mid"))
    spans = {
        kind: BlockSpan.load(found, 0, found.num_blocks, dtype=dtype, quantize=kind) for kind in ("none", *KINDS)
    }
    times = dict(zip(spans, interleaved([lambda span=span: _step(span) for span in spans.values()]), strict=True))
    results = [
        Result(
            f"mid, decode step of all blocks, {kind} against bfloat16",
            1000 * times[kind],
            "ms",
            1000 * times["none"],
            times["none"] / times[kind],
        )
        for kind in KINDS
    ]
    for kind in KINDS:
        ours, theirs = spans[kind].nbytes / 1e6, spans["none"].nbytes / 1e6
        reach = 0.6 if kind == "int8" else None
        results.append(
            Result(f"mid, memory of {kind} weights", ours, "MB", theirs, ours / theirs, reach, at_most=True)
        )
    return results


def _step(span: Any) -> float:
    import torch

    cache, hidden = span.new_cache(), torch.zeros(1, 16, *span.hidden_shape, dtype=span.dtype)
    span.forward(hidden, cache=cache)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        span.forward(hidden[:, :1], cache=cache)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _accuracy() -> list[Result]:
    """Perplexity of the bundled model on text of its own kind from another seed, and error of its logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nbrunner import tiny
    from nbrunner.blocks.checkpoint import resolve_checkpoint
    from nbrunner.blocks.span import BlockSpan
    from nbrunner.tiny.corpus import documents

    plain = AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    seed = random.Random("another than in training").randrange(2**31)
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in itertools.islice(documents(seed), TEXTS)]
    found, references, results = resolve_checkpoint("tiny"), [], []
    half = found.num_blocks // 2
    for kind in ("none", *KINDS, WIRE):
        ways = ((0, half), (half, found.num_blocks)) if kind == WIRE else ((0, found.num_blocks),)
        weights = "none" if kind == WIRE else kind
        spans = [BlockSpan.load(found, *way, dtype=torch.float32, quantize=weights) for way in ways]
        loss, count, error, size = 0.0, 0, 0.0, 0.0
        for number, ids in enumerate(texts):
            with torch.no_grad():
                hidden = plain.model.embed_tokens(ids)
                for span in spans:
                    hidden = span.forward(_rounded(hidden) if kind == WIRE else hidden).hidden
                hidden = _rounded(hidden) if kind == WIRE else hidden
                logits = plain.lm_head(plain.model.norm(hidden))
            if kind == "none":
                references.append(logits)
            error += float((logits - references[number]).square().sum())
            size += float(references[number].square().sum())
            loss += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        perplexity = math.exp(loss / count)
        if kind == "none":
            before = perplexity
        results.append(Result(f"tiny, perplexity, {kind}", perplexity, "", before))
        if kind != "none":
            results.append(Result(f"tiny, error of the logits, {kind}, relative", math.sqrt(error / size), ""))
    return results


def _rounded(hidden: Any) -> Any:
    """What arrives of hidden states that are sent with 8 bits a number."""
    from nbrunner.protocol.tensors import pack_8bit, take

    packed = {raw.spec.name: raw for raw in pack_8bit("hidden", hidden)}
    return take(packed, "hidden", dtype=hidden.dtype, shape=list(hidden.shape))
