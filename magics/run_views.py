"""How a training run is shown as the value of a cell, and who finds the model of one that goes on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbrunner.magics.finetune import FinetuneMagics

_TYPE = ("nbrunner.tuning.run", "TrainingRun")


def set_run_views(shell: Any, finetune: FinetuneMagics) -> None:
    """A run shows its live card, in a kernel; `nbrunner.resume` finds models in the notebook's swarm."""
    if hasattr(shell, "kernel"):
        shell.display_formatter.ipython_display_formatter.for_type_by_name(*_TYPE, finetune.show)
    from nbrunner.tuning.model_source import set_model_source

    set_model_source(finetune.source)


def unset_run_views(shell: Any) -> None:
    """Undo `set_run_views`."""
    from nbrunner.tuning.model_source import set_model_source

    set_model_source(None)
    if not hasattr(shell, "kernel"):
        return
    formatter = shell.display_formatter.ipython_display_formatter
    formatter.deferred_printers.pop(_TYPE, None)
    module = sys.modules.get(_TYPE[0])
    if module is not None:
        formatter.type_printers.pop(module.TrainingRun, None)
