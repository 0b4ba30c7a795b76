"""What servers measured, checked and joined; and what they could not measure, measured here from their states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from nbrunner.blocks.lens import Lens
from nbrunner.blocks.measuring import join_layers, measure_states
from nbrunner.errors import BadPeerDataError, UserInputError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import MAX_FRAME_BYTES, Limits
from nbrunner.protocol.measure import (
    MAX_LENS_STATES,
    MEASURED,
    Measure,
    measured_bytes,
    measured_shapes,
    problem_of,
)
from nbrunner.protocol.tensors import DTYPE_NAMES, DTYPES, take

MAX_ASKED_BYTES = 256 << 20
"""What one pass may bring back besides its output. More is refused before anything is sent."""

LensSource = Callable[[], Lens]


@dataclass(frozen=True)
class MeasuredPart:
    """Measurements of some layers.

    Attributes
    ----------
    asked
        What the server was asked for, which is less than what is wanted where it has no lens.
    results
        As `nbrunner.protocol.measure.measured_shapes` says of ``asked``.
    """

    asked: Measure
    results: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """What a forward pass is to be measured for.

    Attributes
    ----------
    measure
        Of the whole pass.
    final
        [batch, positions, ...], with ``measure.final``.
    """

    measure: Measure
    final: torch.Tensor | None = None

    def ask(self, start: int, end: int, *, has_lens: bool) -> Measure | None:
        """What a server with blocks ``[start, end)`` is asked for; None if nothing."""
        layers = [layer for layer in self.measure.layers if start < layer <= end]
        if not layers:
            return None
        asked = msgspec.structs.replace(self.measure, layers=layers)
        if self.measure.needs_lens and not has_lens:
            asked = msgspec.structs.replace(
                asked, top=0, tokens=[], final=asked.final and asked.similarity, hidden=True
            )
        return asked

    def own(self, layer: int) -> Measure:
        """What is measured at once of a state that is in our hands."""
        return msgspec.structs.replace(
            self.measure,
            layers=[layer],
            top=0,
            tokens=[],
            final=self.measure.similarity and self.measure.final,
            hidden=self.measure.hidden or self.measure.needs_lens,
        )


def check_size(measure: Measure, like: torch.Tensor, *, lenses: bool, limit: int) -> None:
    """`UserInputError` with the size if a measure of states like these would bring back too much.

    Parameters
    ----------
    like
        [batch, tokens, ...], the input of the first block.
    lenses
        Whether all servers that could be asked have a lens; where they have not, the states come here.
    limit
        Bytes.
    """
    batch, tokens = like.shape[:2]
    if measure.needs_lens and not lenses:
        measure = msgspec.structs.replace(measure, hidden=True)
    positions = len(measure.positions) or tokens
    size = measured_bytes(measure, batch, positions, like.shape[2:], DTYPE_NAMES[like.dtype])
    if size > limit:
        why = "" if lenses or not measure.needs_lens else " (no server there has a lens, so the states would come)"
        raise UserInputError(
            f"this would bring {size / 1e6:,.0f} MB over the network{why}, and {limit / 1e6:,.0f} MB are "
            "allowed: ask for fewer layers or positions. Nothing was sent."
        )


def check_request(measure: Measure, start: int, end: int, tokens: int) -> None:
    """`UserInputError` for layers or positions that there are not. State ``start`` is known only where it is 0."""
    problem = problem_of(
        measure,
        layers=(start + 1 if start else 0, end),
        tokens=tokens,
        vocabulary=2**31 if measure.needs_lens else None,
    )
    if problem is not None:
        raise UserInputError(problem)


def answer_bytes(measure: Measure, like: torch.Tensor) -> int:
    """Of one row's measurements."""
    positions = len(measure.positions) or like.shape[1]
    return measured_bytes(measure, 1, positions, like.shape[2:], DTYPE_NAMES[like.dtype])


def most_layers(measure: Measure, like: torch.Tensor, limits: Limits) -> int:
    """How many states of one row can be measured in one request, beside its output."""
    positions = len(measure.positions) or like.shape[1]
    row = like[0].numel() * like.element_size()
    each = answer_bytes(msgspec.structs.replace(measure, layers=[0]), like)
    room = min(limits.frame_bytes, MAX_FRAME_BYTES) - row
    most = room // max(each, 1)
    if measure.needs_lens:
        most = min(most, MAX_LENS_STATES // positions)
    return max(1, most)


def most_rows(measure: Measure, like: torch.Tensor) -> int:
    """How many rows may be looked at through a lens in one request."""
    if not measure.needs_lens:
        return like.shape[0]
    positions = len(measure.positions) or like.shape[1]
    return max(1, MAX_LENS_STATES // (positions * len(measure.layers)))


def take_measured(answer: Mapping[str, RawTensor], asked: Measure, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """A server's measurements of rows like these. `BadPeerDataError` if they are not what was asked for."""
    batch, tokens = like.shape[:2]
    shapes = measured_shapes(asked, batch, len(asked.positions) or tokens, like.shape[2:], DTYPE_NAMES[like.dtype])
    found = {
        name: take(answer, MEASURED + name, dtype=DTYPES[kind], shape=list(shape))
        for name, (kind, shape) in shapes.items()
    }
    for name in ("top_ids", "token_ranks"):
        if name in found and bool((found[name] < 0).any()):
            raise BadPeerDataError(f"{name} below 0")
    return found


def finish(parts: Sequence[MeasuredPart], request: Request, lens: LensSource | None) -> dict[str, torch.Tensor]:
    """All layers' measurements. Those that a server without a lens left out are made here."""
    wanted = request.measure
    complete = []
    for part in parts:
        results = dict(part.results)
        if wanted.needs_lens and not part.asked.needs_lens:
            if lens is None:
                raise UserInputError("no server has a lens here, and this model has no language-model head for one")
            states = dict(zip(part.asked.layers, results["hidden"], strict=True))
            rest = msgspec.structs.replace(
                wanted, layers=part.asked.layers, positions=[], norm=False, similarity=False, hidden=False
            )
            results |= measure_states(states, rest, lens=lens(), final=request.final)
        if not wanted.hidden:
            results.pop("hidden", None)
        complete.append(results)
    return join_layers(complete)
