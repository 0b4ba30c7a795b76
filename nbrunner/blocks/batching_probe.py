"""Which way of joining sessions' steps is right on a loaded span, found by trying each beside one-by-one execution.

Nothing is known by name: a family whose layers do something of their own with positions, masks or caches gives
other numbers in a layout that does not suit it, and that layout is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batching import Batcher, Joining, Layout, SpanStep
from .cache import SpanCache
from .span import BlockSpan

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("packed", "concat", "padded")

# (rows, tokens, tokens padded on the left of row 0): a prompt each, of different lengths
_SESSIONS = ((1, 5, 0), (1, 3, 0), (2, 4, 2))
_MIXED = ((3, 1, 2), (1, 1, 1), (1, 1, 1))
_EQUAL = ((2, 2, 2), (1, 1, 1), (1, 1, 1))

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_COARSE = 0.1
"""Of what the blocks add to the states, where numbers have 8 or 11 bits; a wrong mask changes more than half."""


def choose_joining(span: BlockSpan) -> Joining:
    """Try the layouts on some blocks of the span, the most general first. Takes some ten short steps."""
    span.choose_products()
    if span.carry_at(span.start):
        return Joining()  # only a real predecessor can make the carry, so nothing can be tried
    end = _enough_blocks(span)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        if _new_cache(span, end) is None:
            return Joining()
        counts = _counts_positions(span, end)
        for layout in _LAYOUTS:
            plan = _Plan(span, end, _EQUAL if layout == "padded" else _MIXED)
            joining = Joining(layout, _every_linear(span), counts)
            problem = plan.problem_with(Batcher(span, joining))
            if problem is None:
                return Joining(layout, plan.modules_with_all_tokens(span), counts)
            logger.debug("steps cannot be joined as %s: %s", layout, problem)
    return Joining(counts_positions=counts)


class _Plan:
    """The same steps of a few sessions, one by one and joined."""

    def __init__(self, span: BlockSpan, end: int, later: Sequence[Sequence[int]]) -> None:
        self.span, self.end = span, end
        self.rounds = [[tokens for _, tokens, _ in _SESSIONS], *later]
        self.seen: dict[tuple[int, str], bool] = {}
        padded = later is _EQUAL
        self.inputs = [
            [self._random(rows, count) for (rows, _, _), count in zip(_SESSIONS, counts, strict=True)]
            for counts in self.rounds
        ]
        self.joins_prompts = not padded

    def problem_with(self, batcher: Batcher) -> str | None:
        alone = [_new_cache(self.span, self.end) for _ in _SESSIONS]
        joined = [_new_cache(self.span, self.end) for _ in _SESSIONS]
        with self._watched(batcher):
            for number, hidden in enumerate(self.inputs):
                expected = [self._alone(step) for step in self._steps(hidden, alone)]
                steps = self._steps(hidden, joined)
                if number == 0 and not self.joins_prompts:
                    outcomes = [batcher.forward([step])[0] for step in steps]
                else:
                    if len({batcher.key(step) for step in steps}) != 1:
                        return "these steps would not be joined"
                    self.total = sum(step.rows * step.tokens for step in steps)
                    self.rows = sum(step.rows for step in steps)
                    outcomes = batcher.forward(steps)
                    self.total = 0
                for step, outcome, right in zip(steps, outcomes, expected, strict=True):
                    if isinstance(outcome, Exception):
                        return f"{type(outcome).__name__}: {outcome}"
                    problem = self._difference(step, outcome, right)
                    if problem is not None:
                        return f"round {number}: {problem}"
        return None

    def modules_with_all_tokens(self, span: BlockSpan) -> dict[int, frozenset[str]]:
        """By block; blocks that were not tried are like one that was, module for module."""
        bad = {name for (_, name), whole in self.seen.items() if not whole}
        good = {name for (_, name), whole in self.seen.items() if whole} - bad
        return {block: frozenset(good & span.linears(block).keys()) for block in range(span.start, span.end)}

    def _random(self, rows: int, tokens: int) -> Tensor:
        shape = (rows, tokens, *self.span.hidden_shape)
        return torch.randn(shape).to(self.span.device, self.span.dtype)

    def _steps(self, hidden: Sequence[Tensor], caches: Sequence[Any]) -> list[SpanStep]:
        steps = []
        for (rows, _, left), states, cache in zip(_SESSIONS, hidden, caches, strict=True):
            mask = None
            positions = torch.arange(cache.length, cache.length + states.shape[1])[None]
            if left:
                mask = torch.ones(rows, cache.length + states.shape[1], dtype=torch.bool)
                mask[0, :left] = False
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -states.shape[1] :]
            steps.append(SpanStep(states, cache, mask, positions))
        return steps

    def _alone(self, step: SpanStep) -> Any:
        return self.span.forward(
            step.hidden, cache=step.cache, attention_mask=step.attention_mask, position_ids=step.position_ids
        )

    def _difference(self, step: SpanStep, outcome: Any, right: Any) -> str | None:
        visible = torch.ones(step.rows, step.tokens, dtype=torch.bool)
        if step.attention_mask is not None:
            visible = step.attention_mask[:, -step.tokens :]
        limit = _TOLERANCE.get(self.span.dtype, _COARSE)
        ours, theirs, before = (
            states[visible.to(states.device)].float() for states in (outcome.hidden, right.hidden, step.hidden)
        )
        added = float((theirs - before).norm())
        error = float((ours - theirs).norm())
        if not error <= limit * added:
            return f"the outputs differ by {error / added if added else error:.1e} of what the blocks add"
        for part, tensor in right.carry.items():
            other = outcome.carry.get(part)
            if other is None or other.shape != tensor.shape:
                return f"part {part} of the result has another form"
            scale = float(tensor.float().norm())
            if not float((other.float() - tensor.float()).norm()) <= limit * max(scale, 1e-6):
                return f"part {part} of the result differs"
        return None

    @contextmanager
    def _watched(self, batcher: Batcher) -> Iterator[None]:
        """Note which linear modules are given every token of a joined pass, in its rows if they are kept."""
        self.total = self.rows = 0
        padded = batcher.layout == "padded"

        def watch(block: int, name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                if not self.total or not args or not isinstance(args[0], Tensor):
                    return
                entered = args[0]
                whole = (
                    entered.ndim >= 3 and entered.shape[0] == self.rows
                    if padded
                    else entered.shape[-2] == self.total
                )
                self.seen[block, name] = self.seen.get((block, name), True) and whole

            return hook

        hooks = []
        for block in range(self.span.start, self.end):
            for name in self.span.linears(block):
                module = self.span.block(block).get_submodule(name)
                hooks.append(module.register_forward_pre_hook(watch(block, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _new_cache(span: BlockSpan, end: int) -> SpanCache | None:
    return span.new_cache(span.start, end)


def _every_linear(span: BlockSpan) -> dict[int, frozenset[str]]:
    return {block: frozenset(span.linears(block)) for block in range(span.start, span.end)}


def _counts_positions(span: BlockSpan, end: int) -> bool:
    """Whether positions that are not given are those that follow from the length, in later steps too."""
    outputs = []
    for given in (False, True):
        cache = span.new_cache(span.start, end)
        torch.manual_seed(1)
        for tokens in (3, 1):
            hidden = torch.randn(1, tokens, *span.hidden_shape).to(span.device, span.dtype)
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + tokens)[None] if given else None
            output = span.forward(hidden, cache=cache, position_ids=positions)
        outputs.append(output.hidden)
    return torch.equal(*outputs)


def _enough_blocks(span: BlockSpan) -> int:
    """The end of the shortest range from the span's start that has a block of each kind in it."""
    kinds: list[Hashable] = [_kind(span, block) for block in range(span.start, span.end)]
    last = max(kinds.index(kind) for kind in set(kinds))
    return int(span.start + last + 1)


def _kind(span: BlockSpan, block: int) -> Hashable:
    """What tells blocks of one architecture apart: their modules, and those modules' switches."""
    types = getattr(span.config, "layer_types", None)
    modules = [
        (
            name,
            type(module).__name__,
            tuple(
                sorted(
                    (key, value)
                    for key, value in vars(module).items()
                    if isinstance(value, (bool, str)) and key != "training"
                )
            ),
            getattr(module, "sliding_window", None) is not None,
        )
        for name, module in span.block(block).named_modules()
    ]
    return (types[block] if types else None, tuple(modules))
