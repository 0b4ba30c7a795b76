"""What the explorer asks of a model: a patched run, a steered text, the numbers of chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbrunner.errors import UserInputError

if TYPE_CHECKING:
    from nbrunner.client.trace import Trace

KEEP = ("norm", "similarity", "lens", "kl")
NEW_TOKENS = 16
MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class Cell:
    """A state: of which run, which layer, which position."""

    trace: int
    layer: int
    position: int


def read_cell(value: Any, traces: Sequence[Any], *, name: str = "cell") -> Cell:
    """A cell that a page sent.

    Raises
    ------
    UserInputError
        It is none, or not one of these runs.
    """
    if not isinstance(value, dict):
        raise UserInputError(f"choose a {name} first")
    numbers: list[Any] = [value.get(part) for part in ("trace", "layer", "position")]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in numbers):
        raise UserInputError(f"the {name} is not a run, a layer and a position: {numbers}")
    cell = Cell(*numbers)
    if not 0 <= cell.trace < len(traces):
        raise UserInputError(f"there is no run {cell.trace}")
    run = traces[cell.trace]
    if cell.layer not in run.layers or cell.position not in run.positions:
        raise UserInputError(f"run {cell.trace} has no cell at layer {cell.layer}, position {cell.position}")
    return cell


def model_of(traces: Sequence[Trace]) -> Any:
    """The model behind the runs."""
    if traces[0].model is None:
        raise UserInputError("these runs have no model any more; make them again to run something new")
    return traces[0].model


def patched(traces: Sequence[Trace], source: Cell, target: Cell) -> Trace:
    """The target's run again, with the source's state in place of the target's."""
    from nbrunner.client.edits import Edit

    run = traces[target.trace]
    value = traces[source.trace].state(source.layer, source.position)
    return again(run, edits=(*run.edits, Edit.set(target.layer, value, target.position)))


def again(run: Trace, *, edits: Sequence[Any] | None = None, tokens: Sequence[int] | None = None) -> Trace:
    """The same text traced once more, the same cells."""
    model: Any = model_of([run])
    found: Trace = model.trace(
        run.ids,
        layers=run.layers,
        positions=run.positions,
        keep=KEEP,
        top_k=run.top_ids.shape[-1] if run.top_ids is not None else 5,
        tokens=list(run.chosen if tokens is None else tokens) or None,
        edits=run.edits if edits is None else edits,
        tokenizer=run.tokenizer,
    )
    return found


def steered(traces: Sequence[Trace], source: Cell, target: Cell | None, strength: float) -> tuple[str, str]:
    """The text of the source's run continued: plain, and with the direction added at the source's layer."""
    from nbrunner.client.edits import Edit

    direction = traces[source.trace].state(source.layer, source.position)
    if target is not None:
        direction = direction - traces[target.trace].state(target.layer, target.position)
    run = traces[source.trace]
    return continued(run, ()), continued(run, [Edit.add(source.layer, direction, strength=strength)])


def continued(run: Trace, edits: Sequence[Any]) -> str:
    """What follows a run's text, the most likely token each time."""
    import torch

    model = model_of([run])
    ids = torch.tensor([run.ids])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, edits=[*run.edits, *edits])
    return "".join(run.token_text(one) for one in out[0, len(run.ids) :].tolist())
