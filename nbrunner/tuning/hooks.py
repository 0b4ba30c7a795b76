"""Where others take part in a run: before and after each optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

NamedParameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Participant:
    """Somebody who teaches the same adapter, as the card shows it.

    Attributes
    ----------
    name
        As it calls itself; shown escaped.
    state
        ``online``, ``joining`` or ``offline``.
    steps, samples
        What it has contributed.
    note
        Anything else, in a few words.
    """

    name: str
    state: str
    steps: int = 0
    samples: int = 0
    note: str = ""


class StepHook(Protocol):
    """What a run calls, in its training thread if nothing else is said. An error of nbrunner raised here pauses it.

    `begin` and `end` once, and `complete` between them if all steps were made; `before_step` with this step's
    gradients in ``parameter.grad``, clipped, which may be changed; `after_step` when the optimiser has changed the
    parameters, which may be changed too.
    """

    def begin(self, parameters: NamedParameters, step: int) -> None:
        """The run starts, or goes on, after ``step`` steps."""

    def before_step(self, parameters: NamedParameters, step: int, samples: int) -> None:
        """``samples`` rows went into the gradients of the step after ``step`` others."""

    def after_step(self, parameters: NamedParameters, step: int, samples: int) -> None:
        """``step`` steps are done."""

    def complete(self, parameters: NamedParameters) -> None:
        """All steps are done. What the parameters are afterwards is what the run has taught."""

    def waits(self, paused: bool) -> None:
        """The run waits from now on, or goes on."""

    def stops(self) -> None:
        """The run is to stop: whoever waits for others in `complete` waits no longer. Called from any thread."""

    def end(self, parameters: NamedParameters) -> None:
        """The run is over, in whatever way."""

    def participants(self) -> Sequence[Participant]:
        """Who takes part now; called from any thread, and must not wait."""
        ...
