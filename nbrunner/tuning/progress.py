"""What there is to know of a training run while it is on its way, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbrunner.tuning.control import State
from nbrunner.tuning.costs import Costs
from nbrunner.tuning.history import History
from nbrunner.tuning.hooks import Participant
from nbrunner.tuning.samples import Answers


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a run.

    Attributes
    ----------
    steps
        Done in all.
    loss, eval_loss, eval_accuracy
        The last ones; None where there is none.
    adapter
        A PEFT directory: ``PeftModel.from_pretrained(model, adapter)``.
    """

    state: State
    steps: int
    loss: float | None
    eval_loss: float | None
    eval_accuracy: float | None
    seconds: float
    tokens: int
    adapter: Path
    history: History
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Progress:
    """A run at one moment, for a card or a program.

    Attributes
    ----------
    costs
        Of the last steps.
    left
        Seconds until the end; None while nothing is known.
    memory
        Bytes of this process.
    """

    state: State
    step: int
    steps: int
    epoch: float
    lr: float
    costs: Costs
    total: Costs
    left: float | None
    memory: int
    error: str
    note: str
    checkpoint: str
    participants: tuple[Participant, ...]
