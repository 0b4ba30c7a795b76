"""A `Trace` as few bytes for a browser: one buffer, a description of what lies where, a list of tokens' texts.

Half precision is enough for a colour and three digits. Token ids become indices into the list of tokens that occur,
so that two bytes hold them. 128 tokens × 64 layers × top-5 are about 250 kB.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbrunner.errors import UserInputError

MAX_CELLS = 128 * 65
"""States × positions that are shown at most; more are thinned out."""

MIN_ROWS = 9
_SAFE_NORM = 6e4
"""Below half precision's largest number; norms above it are scaled."""


class Traced(Protocol):
    """What is read of `nbrunner.Trace`."""

    model_name: str
    ids: list[int]
    tokens: list[str]
    layers: list[int]
    positions: list[int]
    num_blocks: int
    norm: Any
    cos_previous: Any
    cos_last: Any
    entropy: Any
    kl: Any
    top_ids: Any
    top_probs: Any
    chosen: list[int]
    chosen_probs: Any
    chosen_ranks: Any
    hops: Any
    seconds: float
    bytes_received: int

    def token_text(self, token: int) -> str:
        """A token as text."""
        ...


@dataclass(frozen=True)
class Packed:
    """``meta`` is plain JSON; ``meta["arrays"]`` says dtype, shape and byte offset of each array in ``buffer``."""

    meta: dict[str, Any]
    buffer: bytes

    def array(self, name: str) -> NDArray[Any]:
        """One array as the browser reads it."""
        one = self.meta["arrays"][name]
        count = int(np.prod(one["shape"]))
        found: NDArray[Any] = np.frombuffer(self.buffer, np.dtype(one["dtype"]), count, one["offset"])
        return found.reshape(one["shape"])

    def encoded(self) -> str:
        """The buffer for a page: gzip, then base64."""
        return base64.b64encode(gzip.compress(self.buffer, 6, mtime=0)).decode()


def strided(layers: Sequence[int], most: int) -> list[int]:
    """Indices into ``layers`` in equal steps, at most ``most``, always with the last.

    >>> strided(range(10), 4)
    [0, 3, 6, 9]
    >>> strided(range(9), 4)
    [2, 5, 8]
    """
    count = len(layers)
    step = max(1, -(-count // max(1, most)))
    return list(range((count - 1) % step, count, step))


def rows_for(positions: int) -> int:
    """How many states are shown for so many positions."""
    return max(MIN_ROWS, MAX_CELLS // max(1, positions))


def pack(trace: Traced, *, title: str = "", most_rows: int | None = None) -> Packed:
    """What the page needs of a trace.

    Raises
    ------
    UserInputError
        A trace without a lens: there is nothing to write into the cells.
    """
    if trace.top_ids is None or trace.top_probs is None:
        raise UserInputError("the explorer shows the lens: trace with keep=('norm', 'similarity', 'lens', 'kl')")
    rows = strided(trace.layers, most_rows or rows_for(len(trace.positions)))
    top_ids = np.asarray(trace.top_ids, np.int64)[rows]
    vocabulary = np.unique(np.concatenate([top_ids.ravel(), np.asarray(trace.chosen, np.int64)]))
    arrays: dict[str, NDArray[Any]] = {
        "top": np.searchsorted(vocabulary, top_ids).astype("<u2" if len(vocabulary) < 65536 else "<i4"),
        "probs": _half(np.asarray(trace.top_probs)[rows]),
    }
    scale = 1.0
    if trace.norm is not None:
        norm = np.asarray(trace.norm, np.float64)[rows]
        finite = norm[np.isfinite(norm)]
        scale = max(1.0, float(finite.max()) / _SAFE_NORM) if finite.size else 1.0
        arrays["norm"] = _half(norm / scale)
    for name in ("entropy", "kl", "cos_previous", "cos_last"):
        if (values := getattr(trace, name)) is not None:
            arrays[name] = _half(np.asarray(values)[rows])
    if trace.chosen and trace.chosen_probs is not None and trace.chosen_ranks is not None:
        with np.errstate(divide="ignore"):
            logs = np.log(np.asarray(trace.chosen_probs, np.float64)[rows])
        arrays["chosen_logs"] = _half(logs)
        arrays["chosen_ranks"] = np.asarray(trace.chosen_ranks)[rows].astype("<i4")
    described, parts, offset = {}, [], 0
    for name, values in arrays.items():
        data = values.tobytes()
        described[name] = {"dtype": values.dtype.str, "shape": list(values.shape), "offset": offset}
        padding = -len(data) % 4  # a typed array must begin at a multiple of its size
        parts.append(data + b"\0" * padding)
        offset += len(data) + padding
    meta = {
        "title": title,
        "model": trace.model_name,
        "ids": [int(one) for one in trace.ids],
        "tokens": list(trace.tokens),
        "layers": [int(trace.layers[row]) for row in rows],
        "thinned": len(trace.layers) - len(rows),
        "positions": [int(one) for one in trace.positions],
        "blocks": trace.num_blocks,
        "hops": [
            {"peer": str(one.peer), "start": one.start, "end": one.end, "seconds": float(one.seconds)}
            for one in trace.hops
        ],
        "seconds": float(trace.seconds),
        "received": int(trace.bytes_received),
        "vocabulary": [trace.token_text(int(one)) for one in vocabulary],
        "vocabulary_ids": [int(one) for one in vocabulary],
        "chosen": [int(np.searchsorted(vocabulary, one)) for one in trace.chosen],
        "norm_scale": scale,
        "arrays": described,
    }
    return Packed(meta, b"".join(parts))


@dataclass(frozen=True)
class Difference:
    """How two traces fit together; ``reason`` says in words why they cannot be subtracted, or what to mind."""

    comparable: bool
    reason: str


def compared(first: Traced, second: Traced) -> Difference:
    """Whether a map of differences makes sense: cell by cell, the same state and position."""
    if first.layers != second.layers:
        return Difference(False, "The two show different layers, so there is no map of differences.")
    if len(first.ids) != len(second.ids) or first.positions != second.positions:
        return Difference(
            False,
            f"The two tokenise differently ({len(first.ids)} and {len(second.ids)} tokens), so their cells do not "
            "correspond and there is no map of differences.",
        )
    other = [place for place, (one, two) in enumerate(zip(first.ids, second.ids, strict=True)) if one != two]
    if not other:
        return Difference(True, "")
    named = ", ".join(f"{place} ({first.tokens[place]!r} / {second.tokens[place]!r})" for place in other[:4])
    more = " …" if len(other) > 4 else ""
    return Difference(True, f"Same number of tokens; they differ at position {named}{more}.")


def changed_cells(before: Traced, after: Traced) -> list[tuple[int, int]]:
    """(layer, position) whose most probable token differs."""
    one, two = np.asarray(before.top_ids)[..., 0], np.asarray(after.top_ids)[..., 0]
    return [
        (int(before.layers[row]), int(before.positions[column])) for row, column in np.argwhere(one != two).tolist()
    ]


def _half(values: NDArray[Any]) -> NDArray[Any]:
    limits = np.finfo(np.float16)
    clipped = np.clip(values.astype(np.float64), float(limits.min), float(limits.max))
    return clipped.astype("<f2")
