"""What was taught so far, as a model to generate with: no file in between, and training waits for the answer."""

from __future__ import annotations

from typing import Any

from nbrunner.errors import SessionError, UserInputError
from nbrunner.tuning.run import TrainingRun


class TaughtModel:
    """As much of a model as `nbrunner.client.generation` needs, with a run's adapter in it.

    Raises
    ------
    UserInputError
        The run teaches labels.
    """

    def __init__(self, run: TrainingRun) -> None:
        if run.classes:
            raise UserInputError("this run teaches labels, which generate no text: run.sample(['…']) asks it.")
        self.run = run
        self._base = run.model.get_base_model()
        self.config, self.generation_config = self._base.config, self._base.generation_config

    @property
    def device(self) -> Any:
        return self._base.device

    @property
    def dtype(self) -> Any:
        return self._base.dtype

    @property
    def runner(self) -> Any:
        """Who runs the blocks; None for a model in this process."""
        return getattr(self._base, "runner", None)

    @property
    def swarm(self) -> Any:
        return getattr(self._base, "swarm", None)

    def __getattr__(self, name: str) -> Any:
        # A trained prompt stands before the text, where a session that counts its tokens knows nothing of it.
        if name == "inference_session" and not self.run.taught.virtual_tokens:
            return getattr(self._base, name)
        raise AttributeError(name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, between two steps."""
        try:
            with self.run.held() as model:
                return model.generate(*args, **kwargs)
        except TimeoutError:
            raise SessionError("a training step takes too long to wait for it; pause the run first.") from None
