"""Steps of several sessions in one pass through a span: weights are read once for all of them.

A step of one token is bound by reading the weights, so eight together cost little more than one. Which way of
joining is right depends on the architecture, and is found by trying (`nbrunner.blocks.batching_probe`):

``packed``
    All tokens side by side in one row, whatever their number; attention takes each session by itself.
``concat``
    The same, for layers that change keys and values after the cache.
``padded``
    One row for each row of a session, the shorter sessions padded on the left; steps of equally many tokens.
``serial``
    One after the other.

Outputs are those of one-by-one execution but for the rounding of larger matrix products (about 1e-7 in float32).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .adapters import Adapting, SpanAdapter
from .batching_attention import Segment, attention_configs, joined_attention
from .batching_caches import PackedCache, PaddedCache, state_shapes
from .cache import SpanCache
from .edits import Edits
from .host_copies import to_device
from .outer import PreparedStep
from .passes import SpanOutput
from .prefix_attention import LONG_TOKENS, can_attend_in_pieces
from .ropes import length_dependent_ropes
from .span import BlockSpan

logger = logging.getLogger(__name__)

Layout = Literal["packed", "concat", "padded", "serial"]

_Join = Callable[[Sequence[Tensor]], Tensor]
"""Makes one tensor of one for each step."""

_Own = Callable[[Tensor, int], Tensor]
"""A step's part of a joined tensor."""


@dataclass(frozen=True)
class SpanStep:
    """One session's step through all blocks of its cache; arguments as of `BlockSpan.forward`.

    Its tensors may lie in this machine's memory: those of all steps go to a GPU in one copy.
    """

    hidden: Tensor
    cache: SpanCache
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    carry: Mapping[int, Tensor] = field(default_factory=dict)
    collect: bool = False
    edits: Edits | None = None
    adapter: SpanAdapter | None = None
    prepared: PreparedStep | None = None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def tokens(self) -> int:
        return self.hidden.shape[1]

    def positions(self) -> Tensor:
        """``[rows, tokens]``, those that follow from the length where none were given."""
        given = self.position_ids
        if given is None:
            given = torch.arange(self.cache.length, self.cache.length + self.tokens)[None]
        return given.expand(self.rows, self.tokens)


@dataclass(frozen=True)
class Joining:
    """How steps may be joined on a span.

    Attributes
    ----------
    layout
    modules
        By block, the linear modules that are given every token of a joined pass: only these can be adapted for some
        of its sessions.
    counts_positions
        Whether a step without position ids is one whose positions follow from the session's length.
    """

    layout: Layout = "serial"
    modules: Mapping[int, frozenset[str]] = field(default_factory=dict)
    counts_positions: bool = True


class Batcher:
    """Runs steps on a span, joined where they can be.

    Attributes
    ----------
    steps, joined
        How many were run, and how many of them together with others.
    """

    def __init__(self, span: BlockSpan, joining: Joining | None = None) -> None:
        self.span = span
        self.joining = joining or Joining()
        self.steps = self.joined = 0
        self._configs = attention_configs(span.model)
        self._implementation = str(span.config._attn_implementation or "eager")
        self._ropes = length_dependent_ropes(span.model)
        self._in_pieces = can_attend_in_pieces(span.device, span.dtype, self._implementation)

    @property
    def layout(self) -> Layout:
        return self.joining.layout

    @property
    def tables_change(self) -> bool:
        """Whether tables of positions depend on how long a session is."""
        return bool(self._ropes)

    def forward(self, steps: Sequence[SpanStep]) -> list[SpanOutput | Exception]:
        """Run steps of different sessions, each of which `BlockSpan.check_step` has let pass.

        Returns
        -------
        list of SpanOutput or Exception
            For each step. Those that were joined fail together; caches of a failed step are of no more use.
        """
        outcomes: list[SpanOutput | Exception | None] = [None] * len(steps)
        groups: dict[Hashable, list[int]] = {}
        for index, step in enumerate(steps):
            key = self.key(step)
            groups.setdefault((index,) if key is None else key, []).append(index)
        for members in groups.values():
            self.steps += len(members)
            self.joined += len(members) if len(members) > 1 else 0
            found: Sequence[SpanOutput | Exception]
            try:
                found = self._run([steps[index] for index in members])
            except Exception as error:  # noqa: BLE001 - handed to the sessions it concerns
                found = [error] * len(members)
            for index, outcome in zip(members, found, strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def key(self, step: SpanStep) -> Hashable | None:
        """Steps of an equal key can run as one; None: this one runs alone."""
        layout = self.layout
        if layout == "serial" or not self._adapter_fits(step):
            return None
        if step.position_ids is None and (step.attention_mask is not None or not self.joining.counts_positions):
            return None
        side = self._side(step)
        if side is None:
            return None
        blocks = (step.cache.start, step.cache.end)
        if layout != "padded":
            return (blocks, side)
        return (blocks, side, step.tokens, state_shapes(step.cache))

    def _adapter_fits(self, step: SpanStep) -> bool:
        if step.adapter is None:
            return True
        for block, adapter in step.adapter.blocks.items():
            if not self.joining.modules.get(block, frozenset()).issuperset(adapter.modules):
                return False
            if adapter.prompt is not None and step.cache.length < adapter.prompt.shape[0]:
                return False
        return True

    def _side(self, step: SpanStep) -> Hashable | None:
        """Which tables of positions a step uses; None where they are those of its own length only."""
        if not self._ropes:
            return ()
        longest = int(step.positions().max()) + 1
        sides = []
        for limit, own_beyond in self._ropes:
            if longest > limit and own_beyond:
                return None
            sides.append(longest > limit)
        return tuple(sides)

    # -- running ---------------------------------------------------------------------------------------------------

    def _run(self, steps: Sequence[SpanStep]) -> Sequence[SpanOutput]:
        one = steps[0]
        if len(steps) == 1 and not self._gains_alone(one):
            return [
                self.span.forward(
                    one.hidden,
                    cache=one.cache,
                    attention_mask=one.attention_mask,
                    position_ids=one.position_ids,
                    carry=one.carry or None,
                    collect=one.collect,
                    edits=one.edits,
                    adapters=one.adapter,
                    prepared=one.prepared,
                )
            ]
        return self._padded(steps) if self.layout == "padded" else self._packed(steps)

    def _gains_alone(self, step: SpanStep) -> bool:
        """Whether a step is better run as those of several sessions are: it then need not copy its prefix."""
        if step.cache.prefix.tokens * step.rows < LONG_TOKENS or step.tokens > 1:
            return False
        return self._in_pieces and self.layout == "packed" and self.key(step) is not None

    def _packed(self, steps: Sequence[SpanStep]) -> list[SpanOutput]:
        device = self.span.device
        segments, begin = [], 0
        for step in steps:
            mask = step.attention_mask
            hides = mask is not None and not bool((mask != 0).all())
            segments.append(
                Segment(
                    begin,
                    step.rows,
                    step.tokens,
                    to_device(mask, device, torch.bool) if hides and mask is not None else None,
                )
            )
            begin = segments[-1].end
        cache = PackedCache(
            [step.cache for step in steps],
            segments,
            self._implementation,
            concatenated=self.layout == "concat",
            in_pieces=self._in_pieces,
        )
        places = [(segment.begin, segment.end) for segment in segments]

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return to_device(torch.cat([part.flatten(0, 1).unsqueeze(0) for part in parts], 1), device)

        def own(whole: Tensor, index: int) -> Tensor:
            step, (first, end) = steps[index], places[index]
            return whole[:, first:end].reshape(step.rows, step.tokens, *whole.shape[2:])

        with joined_attention(self._configs, cache):
            return self._joined(steps, cache, joined, own, mask=None, adapting=_adapting(steps, places, -2))

    def _padded(self, steps: Sequence[SpanStep]) -> list[SpanOutput]:
        device, rows = self.span.device, [step.rows for step in steps]
        cache = PaddedCache([step.cache for step in steps], rows)
        ends = torch.tensor(rows).cumsum(0).tolist()
        places = list(zip([0, *ends[:-1]], ends, strict=True))
        longest = cache.length + steps[0].tokens
        masks = []
        for step in steps:
            length = step.cache.length + step.tokens
            mask = torch.ones(step.rows, length) if step.attention_mask is None else step.attention_mask
            masks.append(nn.functional.pad(mask.bool(), (longest - length, 0)))

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return to_device(torch.cat(list(parts)), device)

        def own(whole: Tensor, index: int) -> Tensor:
            first, end = places[index]
            return whole[first:end]

        return self._joined(steps, cache, joined, own, mask=torch.cat(masks), adapting=_adapting(steps, places, 0))

    def _joined(
        self,
        steps: Sequence[SpanStep],
        cache: PackedCache | PaddedCache,
        joined: _Join,
        own: _Own,
        *,
        mask: Tensor | None,
        adapting: Adapting | None,
    ) -> list[SpanOutput]:
        output = self.span.forward_joined(
            joined([step.hidden.to(self.span.dtype) for step in steps]),
            cache,
            attention_mask=mask,
            position_ids=joined([step.positions() for step in steps]),
            carry={part: joined([step.carry[part] for step in steps]) for part in steps[0].carry},
            collect=any(step.collect for step in steps),
            edits=_JoinedEdits(steps, own, joined) if any(step.edits for step in steps) else None,
            adapting=adapting,
        )
        cache.finish([step.tokens for step in steps])
        return [
            SpanOutput(
                own(output.hidden, index),
                {part: own(tensor, index) for part, tensor in output.carry.items()},
                [own(state, index) for state in output.collected] if step.collect else [],
            )
            for index, step in enumerate(steps)
        ]


class _JoinedEdits:
    """The edits of each session, made in its own part of the joined states; stands in for `Edits` in a run."""

    def __init__(self, steps: Sequence[SpanStep], own: _Own, joined: _Join) -> None:
        self._steps, self._own, self._joined = steps, own, joined

    def touches(self, layer: int) -> bool:
        return any(step.edits is not None and step.edits.touches(layer) for step in self._steps)

    def apply(self, hidden: Tensor, layer: int, _position: int) -> Tensor:
        parts = [self._own(hidden, index) for index in range(len(self._steps))]
        edited = [
            part if step.edits is None else step.edits.apply(part, layer, step.cache.length)
            for step, part in zip(self._steps, parts, strict=True)
        ]
        return self._joined(edited)


def _adapting(steps: Sequence[SpanStep], places: Sequence[tuple[int, int]], axis: int) -> Adapting | None:
    if all(step.adapter is None for step in steps):
        return None
    each = [step.adapter for step, (first, end) in zip(steps, places, strict=True) for _ in range(first, end)]
    return Adapting(each, len(each), axis)
