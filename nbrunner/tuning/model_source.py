"""Who finds the model of a run that goes on without one: the notebook's magics say so when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ModelSource = Callable[[str], tuple[Any, Any]]

_source: ModelSource | None = None


def set_model_source(source: ModelSource | None) -> None:
    """``source``: a model's name → (model, tokenizer)."""
    global _source
    _source = source


def model_source() -> ModelSource | None:
    """Whoever was set; None outside of notebooks."""
    return _source
