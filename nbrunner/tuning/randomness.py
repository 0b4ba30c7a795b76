"""Random numbers of a run, apart from those of the notebook it runs in."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

_drawing = threading.RLock()
"""Torch, numpy and Python have one generator each for all threads; runs use them one after the other."""


@contextlib.contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """Whatever is seeded or drawn inside depends on the seed alone, and the notebook's generators do not notice."""
    with _drawing:
        python, numbers = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            try:
                if seed is not None:
                    torch.manual_seed(seed)
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numbers)
