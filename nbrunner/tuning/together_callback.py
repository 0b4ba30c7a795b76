"""Teaching together with `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from nbrunner.tuning.together import Together


class TogetherCallback(TrainerCallback):  # type: ignore[misc]
    """Joins when training begins, averages after optimiser steps, and meets the others at its end.

    Parameters
    ----------
    together
        Made from the parameters that the Trainer trains. It stays open at the end: close it, or use ``with``.
    """

    def __init__(self, together: Together) -> None:
        self.together = together

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.together.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.together.after_step(args.train_batch_size * args.gradient_accumulation_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.together.closed:
            self.together.finish()
