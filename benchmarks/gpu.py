"""Spans on a GPU, in one process: decoding and batches, against plain transformers and the memory's bandwidth.

It needs torch, transformers and a checkout of nbrunner, nothing else (bitsandbytes for nf4), and no network:

    python -m benchmarks gpu --json

A step of ours begins and ends in this machine's memory, as in a server, which gets states from the network and
sends them on; one of plain transformers ends with a look at its result, as ``generate`` must before it goes on.
A model of which not all blocks fit is measured on those that do: what a block takes of a step is then what counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.gpu_models import Blocks, blocks_that_fit, make_blocks
from benchmarks.report import NotHereError, Report, Result, interleaved, versions
from nbrunner.blocks.batching import Batcher, Joining, Layout, SpanStep
from nbrunner.blocks.passes import SpanOutput, outputs_on_host

SHAPES: dict[str, dict[str, int]] = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}

LAYOUTS: tuple[Layout, ...] = ("packed", "padded")

MEMORY_SHARE = 0.85
"""Of the free memory, for blocks and caches; the rest is for what a pass needs for a moment."""

CACHES = 6
"""Cases whose caches are there at the same time."""


@dataclass(frozen=True)
class Setup:
    """What is run where.

    Attributes
    ----------
    kinds
        How weights are kept: ``none`` for as they are in ``dtype``, or ``nf4``.
    rows
        Sequences that decode at the same time.
    context, steps
        Tokens that each has before, and decodes in one measurement.
    copied
        Bytes of the copy that the memory's bandwidth is taken from.
    backend
        Of ``torch.compile``.
    """

    device: str = "cuda:0"
    dtype: torch.dtype = torch.bfloat16
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: SHAPES)
    kinds: Sequence[str] = ("none", "nf4")
    rows: Sequence[int] = (1, 8, 32)
    context: int = 128
    steps: int = 32
    rounds: int = 5
    copied: int = 1 << 30
    backend: str = "inductor"


Case = Callable[[], float]
"""Decodes once from the same context on; seconds a step."""


def run(setup: Setup | None = None) -> Report:
    """7B- and 70B-shaped, bfloat16 and nf4, 1, 8 and 32 sequences.

    Raises
    ------
    NotHereError
        There is no CUDA GPU.
    """
    setup = setup or Setup()
    device = torch.device(setup.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NotHereError("torch finds no CUDA GPU on this machine, so there is nothing to measure")
    bandwidth = copy_bandwidth(device, setup.copied)
    results: list[Result] = []
    missing: list[str] = []
    with torch.inference_mode():
        for name, shape in setup.shapes.items():
            for kind in setup.kinds:
                if kind == "nf4" and not _has_bitsandbytes(device):
                    missing.append(f"{name} in nf4 (bitsandbytes does not run here)")
                    continue
                results += _one_model(setup, name, shape, kind, bandwidth, missing)
    conditions = {
        **describe(device),
        "copied GB/s": round(bandwidth / 1e9, 1),
        "context": setup.context,
        "steps": setup.steps,
        "rounds": setup.rounds,
        "weights": "random; a block takes a step over the blocks held; its bound is bytes over bandwidth",
    }
    if missing:
        conditions["left out"] = "; ".join(missing)
    return Report("gpu", results, conditions)


def _one_model(
    setup: Setup, name: str, shape: Mapping[str, int], kind: str, bandwidth: float, missing: list[str]
) -> list[Result]:
    device = torch.device(setup.device)
    cached = CACHES * max(setup.rows) * (setup.context + setup.steps) * 5 // 4
    count = shape["num_hidden_layers"]
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
        count = blocks_that_fit(shape, kind, setup.dtype, free, cached_tokens=cached)
    blocks = make_blocks(shape, count, kind, setup.dtype, device)
    weights = str(setup.dtype).removeprefix("torch.") if kind == "none" else kind
    title = f"{name} shape, {weights}, {count} of {shape['num_hidden_layers']} blocks"
    results = []
    for rows in setup.rows:
        case = f"{title}, {rows} {'rows' if rows > 1 else 'row'}"
        results += _rows(case, rows, _times(setup, blocks, kind, rows, case, missing), blocks, bandwidth)
        _forget(device)
    del blocks
    _forget(device)
    return results


def _times(setup: Setup, blocks: Blocks, kind: str, rows: int, title: str, missing: list[str]) -> dict[str, float]:
    """Seconds a step of each case, measured in turn."""
    cases: dict[str, Case] = {"plain": _plain(blocks, setup, rows), "one": _one_session(blocks, setup, rows)}
    if rows > 1:
        cases |= {layout: _sessions(blocks, setup, rows, layout) for layout in LAYOUTS}
    if kind == "none":  # bitsandbytes' kernels cannot be compiled into anything
        wished = {"compiled": _compiled(blocks, setup, rows), "graphs": _static(blocks, setup, rows)}
        cases |= _those_that_run(wished, title, missing)
    return dict(zip(cases, interleaved(list(cases.values()), setup.rounds), strict=True))


def _rows(title: str, rows: int, times: Mapping[str, float], blocks: Blocks, bandwidth: float) -> list[Result]:
    names = {
        "one": "one session",
        "packed": f"{rows} sessions joined, packed",
        "padded": f"{rows} sessions joined, padded",
        "compiled": "one session, what is beside attention compiled",
        "graphs": "plain transformers with static caches, compiled, in CUDA graphs",
    }
    plain = times["plain"]
    results = [
        Result(f"{title}: {names[one]}", rows / seconds, "tokens/s", rows / plain, plain / seconds)
        for one, seconds in times.items()
        if one in names
    ]
    bound = blocks.nbytes / bandwidth
    each = 1e6 / blocks.count
    results.append(
        Result(
            f"{title}: a block's part of a step of one session, over reading its weights once",
            each * times["one"],
            "µs",
            each * bound,
            bound / times["one"],
        )
    )
    return results


# -- cases ---------------------------------------------------------------------------------------------------------


def _one_session(blocks: Blocks, setup: Setup, rows: int) -> Case:
    """One session of so many rows, as a server runs it."""
    span, batcher = blocks.span, Batcher(blocks.span)
    cache, hidden, prompt = span.new_cache(), _states(setup, blocks, rows, 1), _states(setup, blocks, rows)
    assert cache is not None
    span.forward(prompt, cache=cache)

    def step(number: int) -> None:
        _run(batcher, [SpanStep(hidden, cache, None, _positions(setup, number))])

    return _timed(setup, step, lambda: cache.crop(setup.steps))


def _sessions(blocks: Blocks, setup: Setup, rows: int, layout: Layout) -> Case:
    """So many sessions of one row, joined in one pass, as a server does with steps that wait at the same time."""
    span, batcher = blocks.span, Batcher(blocks.span, Joining(layout))
    caches = [span.new_cache() for _ in range(rows)]
    hidden, prompt = _states(setup, blocks, 1, 1), _states(setup, blocks, 1)
    for cache in caches:
        span.forward(prompt, cache=cache)

    def step(number: int) -> None:
        positions = _positions(setup, number)
        _run(batcher, [SpanStep(hidden, cache, None, positions) for cache in caches if cache is not None])

    def back() -> None:
        if batcher.joined != batcher.steps:
            raise RuntimeError(f"steps were not joined as {layout}")
        for cache in caches:
            if cache is not None:
                cache.crop(setup.steps)

    return _timed(setup, step, back)


def _plain(blocks: Blocks, setup: Setup, rows: int) -> Case:
    """The same blocks, called by plain transformers with its own caches."""
    device, cache = torch.device(setup.device), DynamicCache(config=blocks.plain.config)
    hidden, positions = _on_device(setup, blocks, rows)
    blocks.plain(inputs_embeds=_states(setup, blocks, rows).to(device), past_key_values=cache)

    def step(number: int) -> None:
        found = blocks.plain(inputs_embeds=hidden, past_key_values=cache, position_ids=positions[number])
        found.last_hidden_state[0, -1, 0].item()

    return _timed(setup, step, lambda: cache.crop(-setup.steps))


def _compiled(blocks: Blocks, setup: Setup, rows: int) -> Case:
    """One session; what of a block does not deal with caches is compiled, once for all blocks."""
    plainly = _one_session(blocks, setup, rows)
    parts = [
        part
        for index in range(blocks.count)
        for part in blocks.span.block(index).children()
        if not any(hasattr(module, "layer_idx") for module in part.modules())
    ]
    kinds = {
        kind: torch.compile(kind.forward, backend=setup.backend, dynamic=True) for kind in set(map(type, parts))
    }

    def case() -> float:
        for part in parts:
            part.forward = kinds[type(part)].__get__(part)
        try:
            return plainly()
        finally:
            for part in parts:
                del part.forward

    return case


def _static(blocks: Blocks, setup: Setup, rows: int) -> Case:
    """What CUDA graphs can give at most: transformers' blocks in one graph, which takes caches that never grow."""
    device = torch.device(setup.device)
    prompt = _states(setup, blocks, rows).to(device)
    hidden, positions = _on_device(setup, blocks, rows)
    cache = StaticCache(config=blocks.plain.config, max_cache_len=setup.context + setup.steps)
    graphs = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    compiled = torch.compile(blocks.plain.forward, backend=setup.backend, dynamic=False, **graphs)  # type: ignore[call-overload]

    def fill() -> None:
        cache.reset()
        blocks.plain(inputs_embeds=prompt, past_key_values=cache)

    def step(number: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(inputs_embeds=hidden, past_key_values=cache, position_ids=positions[number])
        found.last_hidden_state[0, -1, 0].item()

    fill()
    return _timed(setup, step, fill)


def _run(batcher: Batcher, steps: Sequence[SpanStep]) -> None:
    """One pass, as `nbrunner.server.stepping` does it: in from this machine's memory, and out to it."""
    outcomes = batcher.forward(steps)
    outputs = [one for one in outcomes if isinstance(one, SpanOutput)]
    for one in outcomes:
        if isinstance(one, Exception):
            raise one
    outputs_on_host(outputs)


def _timed(setup: Setup, step: Callable[[int], None], back: Callable[[], None]) -> Case:
    """Some steps, and then ``back`` to where they began, which is not timed."""

    def case() -> float:
        _synchronize(torch.device(setup.device))
        began = time.perf_counter()
        for number in range(setup.steps):
            step(number)
        _synchronize(torch.device(setup.device))
        seconds = (time.perf_counter() - began) / setup.steps
        back()
        return seconds

    return case


def _those_that_run(cases: Mapping[str, Case], where: str, missing: list[str]) -> dict[str, Case]:
    """Without those that fail: what compiles here and what does not depends on drivers and compilers."""
    found = {}
    for name, case in cases.items():
        try:
            case()
        except Exception as error:  # noqa: BLE001 - said in the conditions
            missing.append(f"{where}, {name} ({type(error).__name__}: {str(error).splitlines()[0][:120]})")
        else:
            found[name] = case
    return found


def _states(setup: Setup, blocks: Blocks, rows: int, tokens: int = 0) -> Tensor:
    """Random states in this machine's memory; of a prompt, if no tokens are given."""
    shape = (rows, tokens or setup.context, *blocks.span.hidden_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setup.dtype)


def _on_device(setup: Setup, blocks: Blocks, rows: int) -> tuple[Tensor, list[Tensor]]:
    """States and positions of the steps, where plain transformers has its own."""
    device = torch.device(setup.device)
    positions = [_positions(setup, number).to(device) for number in range(setup.steps)]
    return _states(setup, blocks, rows, 1).to(device), positions


def _positions(setup: Setup, number: int) -> Tensor:
    return torch.tensor([[setup.context + number]])


# -- the device ----------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second that the device's memory reads and writes while something is copied; the best of ten."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * nbytes / best


def describe(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {"device": str(device)}
    facts = torch.cuda.get_device_properties(device)
    memory = f"{facts.total_memory / 2**30:.0f} GiB"
    return {"device": facts.name, "memory": memory, "cuda": torch.version.cuda, **versions(["bitsandbytes"])}


def _has_bitsandbytes(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
