"""Whether a model would fit on this machine and run faster here than over the swarm; then somebody should say so.

A decode step reads every weight once, so its time here is estimated as bytes of weights / speed at which this
machine's memory is read by a matrix-vector product (measured), and a fixed time per block for everything else
(measured with transformers on a CPU: 0.5 ms). The swarm's time is what was measured of the last tokens, or
what the directory leads to expect. Advice is only given where here is clearly faster.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbrunner.client.svg import clip, tidy

if TYPE_CHECKING:
    import torch

    from nbrunner.blocks.checkpoint import Checkpoint

BLOCK_SECONDS = 0.0005
"""Of one block in one decode step, apart from reading its weights."""

ROOM = 1.2
"""Memory a model takes, against its weights: caches and what is being computed."""

SURELY_FASTER = 1.25
"""How much faster here must be before it is said: the estimate is not better than that."""

_PROBE_BYTES = 32 << 20


@dataclass(frozen=True)
class Fit:
    """What is known of one model and this machine.

    Attributes
    ----------
    model
        As shown.
    weight_bytes
        Of the whole model in the dtype it runs in.
    blocks
        How many it has.
    device
        ``cpu`` or ``cuda:0``.
    free_bytes
        Memory that can be had there.
    bytes_per_second
        At which weights are read there.
    """

    model: str
    weight_bytes: int
    blocks: int
    device: str
    free_bytes: int
    bytes_per_second: float

    @property
    def local_seconds(self) -> float:
        """Estimate of one decode step here."""
        return self.weight_bytes / self.bytes_per_second + self.blocks * BLOCK_SECONDS


def advise(fit: Fit, swarm_seconds: float) -> str:
    """One line if the model fits here and would be clearly faster, else nothing.

    Parameters
    ----------
    fit
        The facts.
    swarm_seconds
        Of one token over the swarm.
    """
    needed = int(fit.weight_bytes * ROOM)
    if fit.weight_bytes <= 0 or fit.bytes_per_second <= 0 or needed > fit.free_bytes:
        return ""
    here = fit.local_seconds
    if swarm_seconds <= here * SURELY_FASTER:
        return ""
    return (
        f"{clip(tidy(fit.model), 40)} fits here: it needs {_size(needed)}, {_size(fit.free_bytes)} are free "
        f"({fit.device}); about {1 / here:.0f} tok/s in this process (estimated), {1 / swarm_seconds:.0f} over the "
        "swarm. Plain transformers would run it."
    )


class LocalFits:
    """What this process has found out about models and this machine, and of which it has spoken."""

    def __init__(self) -> None:
        self._facts: dict[str, tuple[str, int, int, Any, float]] = {}
        self._told: set[str] = set()

    def knows(self, uid: str) -> bool:
        """Whether `learn` has been here."""
        return uid in self._facts

    def learn(self, uid: str, checkpoint: Checkpoint, *, name: str = "") -> None:
        """Find out how big a model is and how fast this machine reads. A tenth of a second, once; then nothing."""
        if uid in self._facts:
            return
        from nbrunner.server.load import choose_placement

        placement = choose_placement(checkpoint, "auto", "auto")
        saved = getattr(checkpoint.config, "dtype", None) or placement.dtype
        size = int(stored_bytes(checkpoint) * placement.dtype.itemsize / saved.itemsize)
        speed = read_speed(placement.device, placement.dtype)
        shown = name or uid.partition("@")[0]
        self._facts[uid] = (shown, size, checkpoint.num_blocks, placement.device, speed)

    def fit(self, uid: str) -> Fit | None:
        """What is known of a model, with the memory that is free now."""
        from nbrunner.server.load import free_bytes

        facts = self._facts.get(uid)
        if facts is None:
            return None
        name, size, blocks, device, speed = facts
        return Fit(name, size, blocks, str(device), free_bytes(device), speed)

    def sentence(self, uid: str, swarm_seconds: float | None) -> str:
        """The advice, if there is any."""
        fit = self.fit(uid)
        return advise(fit, swarm_seconds) if fit is not None and swarm_seconds else ""

    def once(self, uid: str, swarm_seconds: float | None) -> str:
        """The same, but only the first time there is any for this model."""
        sentence = "" if uid in self._told else self.sentence(uid, swarm_seconds)
        if sentence:
            self._told.add(uid)
        return sentence


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all weights as stored, from what loading a client has fetched anyway; 0 if that does not tell."""
    from nbrunner.blocks.checkpoint import INDEX_FILE, LocalCheckpoint

    if isinstance(checkpoint, LocalCheckpoint) or len(set(checkpoint.weight_map.values())) == 1:
        return checkpoint.tensor_bytes(list(checkpoint.weight_map))
    index = checkpoint.file(INDEX_FILE)  # of a commit that is fixed: in the cache since its map was read
    total = json.loads(index.read_text("utf-8")).get("metadata", {}).get("total_size", 0) if index else 0
    return total if isinstance(total, int) and total > 0 else 0


def read_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes per second at which a matrix-vector product reads its matrix; the best of a few."""
    import torch

    rows = 4096
    matrix = torch.ones(rows, _PROBE_BYTES // (rows * dtype.itemsize), dtype=dtype, device=device)
    vector = torch.ones(matrix.shape[1], dtype=dtype, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            product = matrix @ vector
            float(product[0])  # waits for the device
            best = min(best, time.perf_counter() - began)
    return matrix.numel() * matrix.element_size() / max(best, 1e-9)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
