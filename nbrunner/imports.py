"""Importing torch, transformers and hivemind: one thread at a time, and without the garbage collector.

They take three seconds of processor time, so there is nearly always something that can be done beside. But two
threads that import packages which import each other may meet half-way, and Python then hands one of them a module
that is not complete.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_one_at_a_time = threading.RLock()


@contextmanager
def importing() -> Iterator[None]:
    """Import in here what takes long. Nothing is collected meanwhile: what imports make stays (3.0 s for 3.8)."""
    with _one_at_a_time:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                if not gc.get_freeze_count():
                    # To the oldest generation, without a look at any of it: else it is all young, and the very next
                    # collection goes through a million objects, for 0.2 s.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
