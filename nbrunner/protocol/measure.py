"""What a request asks to be computed of the states it passes through, so that the states themselves can stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

MAX_TOP = 64
MAX_LAYERS = 1024
MAX_POSITIONS = 8192
MAX_TOKENS = 64

MAX_LENS_STATES = 16384
"""Layers × rows × positions that one request may have looked at through the lens: each costs about a block."""

MEASURED = "measured."
"""Before the name of each tensor that was measured, in the frame that brings it."""

_Layer = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_Position = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Measure(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is to be computed of states. All results are ``[layers, batch, positions, ...]``, in the order asked.

    "Lens" is the model's own final norm and head applied to a state (logit lens, nostalgebraist 2020), logarithms
    are natural, and everything is computed in float32.

    Attributes
    ----------
    layers
        State indices, rising: state ``i`` is what leaves block ``i - 1``, with the edits made at ``i``. A request
        over blocks ``[start, end)`` can be asked for ``start + 1`` to ``end``; the first is the asker's own.
    positions
        Rising; empty for all.
    norm
        ``norm`` float32: the Euclidean norm.
    similarity
        ``cos_previous`` float32: the cosine to the state one layer before; with ``final`` also ``cos_last``.
    top
        ``top_ids`` int32 and ``top_log_probs`` float32 ``[..., top]`` of the lens, the best first; ``entropy``
        float32 in nats. 0 for none of them.
    tokens
        ``token_log_probs`` float32 and ``token_ranks`` int32 ``[..., len(tokens)]`` of the lens; rank 0 is best.
    final
        The asker sends the last block's output as tensor ``final`` [batch, positions, ...]. Gives ``cos_last``
        with ``similarity``, and with a lens ``kl`` float32: KL(final ‖ this state) in nats.
    hidden
        ``hidden``: the states themselves, in the model's dtype.
    """

    layers: Annotated[list[_Layer], msgspec.Meta(max_length=MAX_LAYERS)]
    positions: Annotated[list[_Position], msgspec.Meta(max_length=MAX_POSITIONS)] = []
    norm: bool = False
    similarity: bool = False
    top: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP)] = 0
    tokens: Annotated[list[_Token], msgspec.Meta(max_length=MAX_TOKENS)] = []
    final: bool = False
    hidden: bool = False

    @property
    def needs_lens(self) -> bool:
        """Whether final norm and head are needed."""
        return bool(self.top or self.tokens)


def measured_shapes(
    measure: Measure, batch: int, positions: int, hidden_shape: Sequence[int], dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every result of a measure.

    Parameters
    ----------
    batch, positions
        How many rows; how many positions are measured.
    hidden_shape
        What follows ``[batch, tokens]`` in a hidden state.
    dtype
        Of hidden states, as in ``"bfloat16"``.
    """
    grid = (len(measure.layers), batch, positions)
    wanted = {
        "norm": (measure.norm, "float32", ()),
        "cos_previous": (measure.similarity, "float32", ()),
        "cos_last": (measure.similarity and measure.final, "float32", ()),
        "top_ids": (measure.top > 0, "int32", (measure.top,)),
        "top_log_probs": (measure.top > 0, "float32", (measure.top,)),
        "entropy": (measure.top > 0, "float32", ()),
        "token_log_probs": (bool(measure.tokens), "float32", (len(measure.tokens),)),
        "token_ranks": (bool(measure.tokens), "int32", (len(measure.tokens),)),
        "kl": (measure.needs_lens and measure.final, "float32", ()),
        "hidden": (measure.hidden, dtype, tuple(hidden_shape)),
    }
    return {name: (kind, grid + rest) for name, (is_wanted, kind, rest) in wanted.items() if is_wanted}


def measured_bytes(measure: Measure, batch: int, positions: int, hidden_shape: Sequence[int], dtype: str) -> int:
    """Bytes of the tensors that a measure gives; arguments as in `measured_shapes`."""
    shapes = measured_shapes(measure, batch, positions, hidden_shape, dtype)
    return sum(math.prod(shape) * (4 if kind in ("float32", "int32") else 2) for kind, shape in shapes.values())


def problem_of(measure: Measure, *, layers: tuple[int, int], tokens: int, vocabulary: int | None) -> str | None:
    """What is wrong with a measure, in words; None if it can be done.

    Parameters
    ----------
    layers
        First and last state that can be measured.
    tokens
        Of the sequence.
    vocabulary
        Size of the lens; None where there is none.
    """
    for what, values in (("layers", measure.layers), ("positions", measure.positions)):
        if any(after <= before for before, after in itertools.pairwise(values)):
            return f"the {what} to measure must rise"
    if not measure.layers:
        return "no layers to measure"
    if measure.layers[0] < layers[0] or measure.layers[-1] > layers[1]:
        return (
            f"states {measure.layers[0]} to {measure.layers[-1]} are asked for; "
            f"there are {layers[0]} to {layers[1]} here"
        )
    if measure.positions and measure.positions[-1] >= tokens:
        return f"position {measure.positions[-1]} of a sequence of {tokens} tokens"
    if measure.needs_lens and vocabulary is None:
        return "there is no final norm and head here: the server was started without --lens"
    if vocabulary is not None and max([measure.top - 1, *measure.tokens]) >= vocabulary:
        return f"a token beyond the vocabulary of {vocabulary}"
    return None
