"""Activation patching over a grid: which state of which token carries what makes the difference.

Method: a run on a *corrupted* text is repeated, each time with one state taken from the run on a *clean* text; what
of the metric comes back says how much that state carries (causal tracing, Meng et al. 2022, arXiv:2202.05262).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbrunner.blocks.lens import Lens
from nbrunner.client.edits import Positions, resolve_positions
from nbrunner.client.trace import Trace, token_id
from nbrunner.errors import UserInputError

if TYPE_CHECKING:
    from nbrunner.client.model import DistributedModel

Metric = Callable[[torch.Tensor], torch.Tensor]
"""[rows, vocabulary] float32 logits at the last position → [rows]."""

BATCH_TOKENS = 4096
"""Tokens of one request. A server takes 8192 at most by default, and its answers must fit a frame."""


@dataclass(eq=False)
class PatchGrid:
    """What `patch_grid` gives.

    Attributes
    ----------
    values : array [layers, positions] float32
        (metric patched - metric corrupted) / (metric clean - metric corrupted): 0 where the patch changes nothing,
        1 where it brings all of it back.
    layers, positions : list of int
        The states (numbered as in `Trace`) and positions patched.
    clean, corrupted : Trace
    clean_metric, corrupted_metric : float
    seconds : float
    blocks_run, blocks_naive : int
        Blocks times rows that were run, and that a full run for each cell would have been.
    """

    values: NDArray[np.float32]
    layers: list[int]
    positions: list[int]
    clean: Trace
    corrupted: Trace
    clean_metric: float
    corrupted_metric: float
    seconds: float
    blocks_run: int
    blocks_naive: int

    @property
    def tokens(self) -> list[str]:
        """The corrupted text's tokens at the patched positions."""
        return [self.corrupted.tokens[one] for one in self.positions]

    def best(self) -> tuple[int, int]:
        """(layer, position) of the cell that brings most back."""
        row, column = np.unravel_index(int(np.argmax(self.values)), self.values.shape)
        return self.layers[int(row)], self.positions[int(column)]

    def figure(self, *, dark: bool = False) -> Any:
        """The grid as a plain plotly ``Figure``; it paints its own background, ``dark`` or light."""
        from nbrunner.client.figures import grid_figure

        return grid_figure(self, dark=dark)

    def __repr__(self) -> str:
        layer, position = self.best()
        return (
            f"<PatchGrid {len(self.layers)} states × {len(self.positions)} positions; most comes back at state "
            f"{layer}, token {self.corrupted.tokens[position]!r}: {self.values.max():.2f}>"
        )


def patch_grid(
    clean: Trace | str,
    corrupted: Trace | str,
    metric: Metric | Sequence[int | str],
    *,
    model: DistributedModel | None = None,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
) -> PatchGrid:
    """Patch every state of a corrupted run with that of a clean one, and see how much of a metric comes back.

    For each layer only the blocks after it run, for all positions in one batch.

    Parameters
    ----------
    clean, corrupted
        Traces from ``model.trace`` with equally many tokens, or texts, with ``model``.
    metric
        A function of the logits at the last position, [rows, vocabulary] float32 → [rows]; or two tokens (ids, or
        texts of one token), right and wrong: the difference of their logits.
    layers
        States to patch; by default 0 to the last but one: after the last block only the last position counts.
    positions
        As in `Edit`; all by default.

    Raises
    ------
    UserInputError
        Texts of different length, traces without a model, a metric that does not tell the two runs apart.
    MissingBlocksError
    """
    began = time.perf_counter()
    good, bad = (one if isinstance(one, Trace) else _traced(model, one) for one in (clean, corrupted))
    model = bad.model or model
    if model is None or (good.model is not None and good.model is not model):
        raise UserInputError("both runs must be of one model that is still open: pass model=…")
    if len(good.ids) != len(bad.ids):
        raise UserInputError(
            f"the clean text has {len(good.ids)} tokens, the corrupted one {len(bad.ids)}: they must have equally "
            f"many, so that each has a counterpart ({good.tokens} and {bad.tokens})"
        )
    if good.edits or bad.edits:
        raise UserInputError("patch_grid compares two plain runs; these traces were made with edits")
    last = model.runner.num_blocks
    wanted = list(range(last)) if layers is None else [one + last + 1 if one < 0 else one for one in layers]
    if not wanted or wanted != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1] <= last:
        raise UserInputError(f"layers={layers!r}: give some of the states 0 to {last}, rising")
    places = resolve_positions(positions, len(bad.ids))
    measure = metric if callable(metric) else _difference(metric, bad.tokenizer)
    lens = Lens.of(model)
    with torch.no_grad():
        sources = _states(model, good, wanted)
        targets = _states(model, bad, wanted)
        ends = [float(_checked(measure, lens.logits(one[last][:, -1]))[0]) for one in (sources, targets)]
        if abs(ends[0] - ends[1]) < 1e-6:
            raise UserInputError(
                f"the metric is {ends[0]:.4g} for the clean text and {ends[1]:.4g} for the corrupted one: there is "
                "nothing to bring back"
            )
        rows = [
            _checked(measure, lens.logits(_patched_ends(model, layer, places, sources[layer], targets[layer])))
            for layer in wanted
        ]
    values = (torch.stack(rows) - ends[1]) / (ends[0] - ends[1])
    return PatchGrid(
        values=values.float().numpy(),
        layers=wanted,
        positions=places,
        clean=good,
        corrupted=bad,
        clean_metric=ends[0],
        corrupted_metric=ends[1],
        seconds=time.perf_counter() - began,
        blocks_run=2 * last + sum((last - layer) * len(places) for layer in wanted),
        blocks_naive=2 * last + last * len(places) * len(wanted),
    )


def _traced(model: DistributedModel | None, text: str) -> Trace:
    if model is None:
        raise UserInputError("to patch texts say of which model: patch_grid(clean, corrupted, metric, model=model)")
    return model.trace(text, keep=("norm",))


def _states(model: DistributedModel, trace: Trace, layers: list[int]) -> dict[int, torch.Tensor]:
    """[1, tokens, ...] of the layers asked for and the last, from the trace if it kept them."""
    last = model.runner.num_blocks
    needed = sorted({*layers, last})
    kept = trace.hidden is not None and len(trace.positions) == len(trace.ids) and set(needed) <= set(trace.layers)
    if not kept:
        trace = model.trace(trace.ids, layers=needed, keep=("hidden",), tokenizer=trace.tokenizer)
    if trace.hidden is None:
        raise RuntimeError("a trace that keeps hidden states has none")
    return {layer: trace.hidden[trace.layers.index(layer)][None] for layer in needed}


def _patched_ends(
    model: DistributedModel, layer: int, positions: list[int], source: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """[positions, ...]: the last state at the last position, for each position patched in state ``layer``."""
    tokens, last = target.shape[1], model.runner.num_blocks
    size = max(1, BATCH_TOKENS // tokens)
    ends = []
    for at in range(0, len(positions), size):
        some = positions[at : at + size]
        rows = target.repeat(len(some), *[1] * (target.ndim - 1))
        index = torch.arange(len(some))
        rows[index, some] = source[0, some]
        if layer < last:
            learned = model._layers.learned()
            adapter = None if learned is None else learned.named().adapter.within(layer, last)
            rows = model.runner.forward(rows.to("cpu", model.runner.dtype), layer, last, adapter=adapter).hidden
        ends.append(rows[:, -1])
    return torch.cat(ends)


def _difference(tokens: Sequence[int | str], tokenizer: Any) -> Metric:
    if isinstance(tokens, str) or len(tokens) != 2:
        raise UserInputError(
            "the metric is a function of logits [rows, vocabulary], or two tokens: right and wrong"
        )
    right, wrong = (one if isinstance(one, int) else token_id(tokenizer, one) for one in tokens)
    return lambda logits: logits[:, right] - logits[:, wrong]


def _checked(metric: Metric, logits: torch.Tensor) -> torch.Tensor:
    found = torch.as_tensor(metric(logits)).float()
    if tuple(found.shape) != (logits.shape[0],):
        raise UserInputError(
            f"the metric must give one number a row, [{logits.shape[0]}], not {list(found.shape)}: it is given the "
            "logits [rows, vocabulary] of the last position"
        )
    return found
