"""Runs for tests to begin, which are ended after them, and a participant that pauses one where they like."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import wait_until
from tuning_models import FACTS

import nbrunner
from nbrunner.tuning.hooks import Participant
from nbrunner.tuning.run import TrainingRun

QUICK: dict[str, Any] = {"method": "prompt", "prompt_tokens": 4, "batch_size": 2, "max_steps": 6, "lr": 1e-2}


@pytest.fixture
def begin(tmp_path):
    """Start runs that are ended afterwards."""
    runs: list[TrainingRun] = []

    def start(model: Any, data: Any = FACTS, **options: Any) -> TrainingRun:
        folder = tmp_path / f"run{len(runs)}"
        runs.append(nbrunner.finetune(model, data, out_dir=folder, **{**QUICK, **options}))
        return runs[-1]

    start.keep = runs.append  # type: ignore[attr-defined]
    yield start
    for run in runs:
        run.stop()
        run.control.wait_for(lambda state: state in ("done", "stopped", "failed"), 30)


class PauseAt:
    """A participant that pauses the run when some step is done."""

    def __init__(self, step: int) -> None:
        self.step, self.run = step, None
        self.calls: list[str] = []

    def begin(self, parameters: Any, step: int) -> None:
        self.calls.append(f"begin {step}")

    def before_step(self, parameters: Any, step: int, samples: int) -> None:
        assert all(one.grad is not None for _, one in parameters)
        self.calls.append(f"before {step} {samples}")

    def after_step(self, parameters: Any, step: int, samples: int) -> None:
        self.calls.append(f"after {step}")
        if step == self.step:
            wait_until(lambda: self.run is not None)
            self.run.pause()

    def complete(self, parameters: Any) -> None:
        self.calls.append("complete")

    def stops(self) -> None:
        self.calls.append("stops")

    def waits(self, paused: bool) -> None:
        self.calls.append("waits" if paused else "goes on")

    def end(self, parameters: Any) -> None:
        self.calls.append("end")

    def participants(self) -> list[Participant]:
        return [Participant("me", "online", steps=3)]
