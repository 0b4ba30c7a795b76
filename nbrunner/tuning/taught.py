"""What was taught so far, as a model to generate with: no file in between, and training waits for the answer."""

from __future__ import annotations

from typing import Any

from nbrunner.client.remote_cache import RemoteCache
from nbrunner.client.step_times import StepTime
from nbrunner.errors import SessionError, UserInputError
from nbrunner.tuning.run import TrainingRun


class PromptedSession:
    """The caches of one generation behind a trained prompt: as much of a `Session` as a generation looks at."""

    def __init__(self, cache: RemoteCache) -> None:
        self.cache = cache

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        return list(getattr(self.cache.session, "chain", ()))

    @property
    def last_step(self) -> StepTime | None:
        return self.cache.last_step

    @property
    def queued(self) -> str:
        return str(getattr(self.cache.session, "queued", ""))

    @property
    def lost(self) -> list[tuple[str, str]]:
        return list(getattr(self.cache.session, "lost", ()))

    def __enter__(self) -> PromptedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()


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
        if name == "inference_session" and hasattr(self._base, name):  # a model in this process has none
            # A trained prompt stands before the text, where a session that counts its tokens knows nothing of it.
            return self._prompted if self.run.taught.virtual_tokens else getattr(self._base, name)
        raise AttributeError(name)

    def _prompted(self) -> PromptedSession:
        return PromptedSession(self._base.new_cache())

    def generate(self, *args: Any, session: Any = None, **kwargs: Any) -> Any:
        """As the model's, between two steps."""
        if isinstance(session, PromptedSession):
            kwargs["past_key_values"] = session.cache
        elif session is not None:
            kwargs["session"] = session
        try:
            with self.run.held() as model:
                return model.generate(*args, **kwargs)
        except TimeoutError:
            raise SessionError("a training step takes too long to wait for it; pause the run first.") from None
