"""One model at a time is built in a process."""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
"""Held while transformers builds or loads a model: it sets torch's default dtype for the whole process and puts
back what it found, so that two threads at once leave each other's behind (seen: a process in bfloat16 for good)."""
