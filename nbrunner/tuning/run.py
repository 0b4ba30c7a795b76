"""A training run in the background: told what to do from any cell, looked at from any cell, never in their way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nbrunner.client.model import DistributedModel
from nbrunner.client.named_adapters import Offer
from nbrunner.client.watch import PassWatch
from nbrunner.errors import NBRunnerError, SessionError, SwarmError, TrainingError, UserInputError
from nbrunner.protocol.identity import short_peer
from nbrunner.server.status import resident_bytes
from nbrunner.swarm.loop import EngineLoop
from nbrunner.tuning.control import Control, State, StopRun
from nbrunner.tuning.costs import Costs, recent, seconds_left, step_costs
from nbrunner.tuning.data import Label
from nbrunner.tuning.encoding import Collator, EncodedExamples, pad_id
from nbrunner.tuning.folder import ADAPTER, RunFolder
from nbrunner.tuning.history import History
from nbrunner.tuning.hooks import StepHook
from nbrunner.tuning.methods import Taught
from nbrunner.tuning.progress import Progress, TrainingResult
from nbrunner.tuning.samples import Answers, When, answer, classify, evaluating
from nbrunner.tuning.settings import Settings

CHECKPOINT_SECONDS = 60.0
"""A run is never further than this from its last checkpoint, or than one step if steps take longer."""

_HEARTBEAT = 0.1

running: weakref.WeakSet[TrainingRun] = weakref.WeakSet()
"""Runs of this process that have not ended."""


class TrainingRun:
    """Made by `nbrunner.finetune` and `nbrunner.resume`.

    ``run.pause()``, ``run.resume()``, ``run.stop()``, ``run.checkpoint()``, ``run.sample()``, ``run.set_lr(1e-3)``;
    ``run.result()`` or ``await run`` wait for the end, and an interrupt while they wait pauses it.

    Attributes
    ----------
    model : peft.PeftModel
        What learns.
    tokenizer
        Of the model.
    settings : Settings
        How.
    history : History
        A table with a row for each step.
    answers : list of Answers
        What the sample prompts were answered with.
    folder : RunFolder
        Where it is kept.
    """

    def __init__(
        self,
        taught: Taught,
        tokenizer: Any,
        settings: Settings,
        data: EncodedExamples,
        evaluation: EncodedExamples | None,
        *,
        classes: Sequence[Label] = (),
        folder: RunFolder,
        hooks: Sequence[StepHook] = (),
        checkpoint: Path | None = None,
        history: History | None = None,
        answers: Sequence[Answers] = (),
    ) -> None:
        self.taught, self.model, self.tokenizer, self.settings = taught, taught.model, tokenizer, settings
        self.parameters: list[tuple[str, nn.Parameter]] = taught.parameters
        self.classes, self.folder, self.hooks = tuple(classes), folder, list(hooks)
        self.history = history if history is not None else History()
        self.answers = list(answers)
        self.control = Control()
        self.trainer: Any = None
        self.note = f"{data.cut} rows were cut to {settings.max_length} tokens" if data.cut else ""
        self.step = self.history.rows[-1].step if self.history.rows else 0
        self.epoch = self.history.rows[-1].epoch if self.history.rows else 0.0
        self._data, self._evaluation, self._checkpoint = data, evaluation, checkpoint
        batches = math.ceil(len(data) / settings.batch_size)
        self._steps_in_epoch = math.ceil(batches / settings.gradient_accumulation)
        self.steps = settings.max_steps or math.ceil(self._steps_in_epoch * settings.epochs)
        self._lr = settings.learning_rate
        self._costs: list[Costs] = []
        self._total = Costs()
        self._waited = 0.0
        self._saved_at, self._saved_step = time.monotonic(), self.step if checkpoint is not None else -1
        self._done: concurrent.futures.Future[TrainingResult] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._work, name="nbrunner-finetune", daemon=True)
        self._told_waits = False
        if self.hooks:
            self.control.on_change(self._tell_waits)

    # -- what it does --------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """``starting``, ``running``, ``pausing``, ``paused``, ``stopping``; ``stopped``, ``done``, ``failed``."""
        return self.control.state

    @property
    def error(self) -> BaseException | None:
        """Why it paused or failed by itself."""
        return self.control.error

    @property
    def lr(self) -> float:
        """The learning rate at the schedule's height."""
        return self._lr

    @property
    def progress(self) -> Progress:
        """What there is to know now."""
        last = self.folder.last_checkpoint
        return Progress(
            state=self.state,
            step=self.step,
            steps=self.steps,
            epoch=self.epoch,
            lr=self._lr,
            costs=recent(self._costs),
            total=self._total,
            left=seconds_left(self._costs, self.steps - self.step),
            memory=resident_bytes(),
            error=str(self.error or ""),
            note=self.note,
            checkpoint=last.name if last is not None else "",
            participants=tuple(one for hook in self.hooks for one in hook.participants()),
        )

    @property
    def model_name(self) -> str:
        """What to call the model."""
        uid = str(getattr(getattr(self.taught.base, "runner", None), "model", ""))
        return uid.partition("@")[0] or type(self.model.get_base_model()).__name__

    @property
    def server_names(self) -> dict[str, str]:
        """PeerID → how the directory knows that server."""
        swarm = getattr(self.taught.base, "swarm", None)
        if swarm is None:
            return {}
        return {
            peer: f"{entry.record.name or short_peer(peer)} [{entry.record.start}, {entry.record.end})"
            for peer, entry in swarm.directory.view.servers.items()
        }

    def __repr__(self) -> str:
        last = self.history.last
        loss = f", loss {last.loss:.4g}" if last is not None and last.loss is not None else ""
        trouble = f": {self.error}" if self.error is not None else ""
        return (
            f"<TrainingRun {self.settings.method}, {self.state}, step {self.step} of {self.steps}{loss}{trouble}>"
        )

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have a function called when the state changes or something new is there; it must return at once."""
        self.control.on_change(listener)

    # -- what it is told -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; once."""
        running.add(self)
        self._thread.start()

    def pause(self) -> None:
        """Wait after the step that is running. Nothing is held on any server meanwhile; a checkpoint is written."""
        if self.state in ("starting", "running"):
            self.control.pause()
            with contextlib.suppress(SessionError):  # it ended just now
                self.control.between_steps(self._save)

    def resume(self) -> None:
        """Go on; after an error, with the step that could not be made."""
        if self.control.ended:
            raise SessionError(
                f"this run is {self.state}; nbrunner.resume({str(self.folder.path)!r}, model) goes on with it."
            )
        self.control.resume()

    def stop(self) -> None:
        """End after the step that is running, with a checkpoint and the adapter as it is then. Again: at once.

        Where all steps are done and others are waited for, they are not any longer.
        """
        again = self.state == "stopping"
        self.control.stop()
        for hook in self.hooks:
            hook.stops()
        if again:
            EngineLoop.get().cancel_thread(self._thread)

    def checkpoint(self) -> concurrent.futures.Future[Path]:
        """Write a checkpoint before the next step; ``.result()`` is where."""
        return self.control.between_steps(self._save)

    def sample(self, prompts: str | Sequence[str] | None = None) -> concurrent.futures.Future[Answers]:
        """Answer the sample prompts, or these, before the next step."""
        given = (prompts,) if isinstance(prompts, str) else tuple(prompts or self.settings.samples)
        if not given:
            raise UserInputError(
                "there are no sample prompts: give some, run.sample(['…']), or samples=[…] from the start."
            )
        return self.control.between_steps(
            lambda: self._answer("during", given, keep=given == self.settings.samples)
        )

    def set_lr(self, lr: float) -> None:
        """Another learning rate, from the next step on; the schedule keeps its shape."""
        checked = Settings.of(lr=lr).learning_rate
        if checked == self._lr:
            return

        def change() -> None:
            if checked == self._lr:
                return
            self.trainer.set_lr(checked)
            self.history.mark(self.step, "lr", f"learning rate {self._lr:g} → {checked:g}")
            self._lr = checked

        self.control.between_steps(change)

    def offer(self, name: str) -> Offer:
        """Offer what it has taught by now to everybody in the swarm, under a name.

        As `DistributedModel.offer_adapter`: servers that were started with ``--accept-adapters`` serve it, and
        ``%%generate --adapter NAME`` uses it. Training waits meanwhile; what is learned later needs another offer.

        Raises
        ------
        UserInputError
            A model in no swarm, or a method of which servers would have only a part.
        """
        base = self.model.get_base_model()
        if not isinstance(base, DistributedModel):
            raise UserInputError("this run teaches a model in this process: there is no swarm to offer it to.")
        if self.classes or self.taught.virtual_tokens:
            what = "a head for labels" if self.classes else "a prompt in front of the text"
            raise UserInputError(
                f"servers can serve what LoRA changes in their blocks, and this run also teaches {what}: give "
                f"others its adapter, {self.folder.path / ADAPTER}."
            )
        with self.held():
            return base.offer_adapter(name)

    def withdraw(self, uid: str) -> list[str]:
        """Have what was offered served no longer; PeerIDs of the servers that let it go. ``uid``: of the offer."""
        base = self.model.get_base_model()
        return base.withdraw_adapter(uid) if isinstance(base, DistributedModel) else []

    @contextlib.contextmanager
    def held(self, timeout: float | None = 60.0) -> Iterator[Any]:
        """The model as it is between two steps, without dropout, for whatever it is wanted; training waits."""
        with self.control.held(timeout), evaluating(self.model):
            yield self.model

    # -- waiting -------------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> TrainingResult:
        """Wait for the end. An interrupt pauses the run.

        Raises
        ------
        NBRunnerError
            Why it failed, or why it had to pause: then ``run.resume()`` tries again.
        TimeoutError
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._over():
                left = _HEARTBEAT * 5 if deadline is None else min(deadline - time.monotonic(), _HEARTBEAT * 5)
                if left <= 0:
                    raise TimeoutError(f"the run is at step {self.step} of {self.steps}")
                self.control.wait_for(lambda _: self._over(), left)
        except KeyboardInterrupt:
            self.pause()
            raise
        return self._outcome()

    def __await__(self) -> Generator[Any, None, TrainingResult]:
        return self._await().__await__()

    async def _await(self) -> TrainingResult:
        try:
            while not self._over():  # noqa: ASYNC110
                # a beat, because a kernel's interrupt does not wake a sleeping loop: see `wait_async`
                await asyncio.sleep(_HEARTBEAT)
        except asyncio.CancelledError:
            self.pause()
            raise
        return self._outcome()

    def _over(self) -> bool:
        return self._done.done() or (self.state == "paused" and self.error is not None)

    def _outcome(self) -> TrainingResult:
        if self._done.done():
            return self._done.result()
        raise self.error or SessionError("the run is paused")

    # -- in the training thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        state: State = "done"
        error: BaseException | None = None
        try:
            self._train()
        except StopRun:
            state = "stopped"
        except BaseException as failure:  # noqa: BLE001 - kept, shown, and raised where the run is waited for
            state, error = "failed", failure
        try:
            error = self._conclude(state, error)
        finally:
            self.folder.unlock()
            running.discard(self)
        state = state if error is None else "failed"
        self.control.end(state, error)  # whoever listens is done with it before anybody who waits goes on
        if error is not None:
            self._done.set_exception(error)
        else:
            self._done.set_result(self._result(state))
        self.control.wake()

    def _train(self) -> None:
        from nbrunner.tuning.trainer import RunCallback, RunTrainer, arguments, making

        classifying = bool(self.classes)
        device = next(self.model.parameters()).device
        with making:
            self.trainer = RunTrainer(
                self,
                model=self.model,
                args=arguments(self.settings, folder=self.folder.path, device=device, classify=classifying),
                train_dataset=self._data,
                eval_dataset=self._evaluation,
                data_collator=Collator(pad_id(self.tokenizer), left=classifying),
                callbacks=[RunCallback(self)],
                compute_metrics=_accuracy if classifying else None,
            )
        self.trainer.train(resume_from_checkpoint=str(self._checkpoint) if self._checkpoint else None)
        if self.hooks:
            before = self.note
            self.note = "all steps are done; waiting for the others to finish (stop ends the wait)"
            self._each_hook(lambda hook: hook.complete(self.parameters))
            self.note = before

    def _conclude(self, state: State, error: BaseException | None) -> BaseException | None:
        """A last checkpoint, the adapter, the answers afterwards; the error to end with."""
        if self.trainer is not None and self.step > 0:
            try:
                if state == "done" and self.settings.samples:
                    self._answer("after", self.settings.samples)
                self._save()
                with self.folder.writing(ADAPTER) as staged:
                    self.taught.save_adapter(staged)
            except Exception as failure:  # noqa: BLE001 - a full disk must not hide why a run failed
                error = error or failure
        for hook in self.hooks:
            with contextlib.suppress(Exception):
                hook.end(self.parameters)
        return _with_advice(error, self.step, self.folder) if error is not None else None

    def _result(self, state: State) -> TrainingResult:
        def last(column: str) -> float | None:
            curve = self.history.curve(column)
            return curve[-1][1] if curve else None

        return TrainingResult(
            state,
            self.step,
            last("loss"),
            last("eval_loss"),
            last("eval_accuracy"),
            self._total.seconds,
            self._total.tokens,
            self.folder.path / ADAPTER,
            self.history,
            tuple(self.answers),
        )

    def begin(self, state: Any) -> None:
        """Trainer is about to make its first step."""
        self.steps, self.step = int(state.max_steps), int(state.global_step)
        scheduler = self.trainer.lr_scheduler
        wanted = self._lr
        self._lr = float(getattr(scheduler, "base_lrs", [wanted])[0])
        if self._checkpoint is not None:
            self.history.mark(self.step, "resumed", "resumed from a checkpoint")
            if self.settings.lr is not None and wanted != self._lr and self._asks_lr:
                self.set_lr(wanted)
        elif self.settings.samples:
            self._answer("before", self.settings.samples)
        if self._checkpoint is None and self._evaluation is not None:
            self.trainer.evaluate()
        self._each_hook(lambda hook: hook.begin(self.parameters, self.step))

    _asks_lr = False

    def ask_lr(self, lr: float) -> None:
        """Before a start from a checkpoint: go on with another learning rate than that of the checkpoint."""
        self._lr, self._asks_lr = lr, True

    def before_step(self, step: int, rows: int) -> None:
        self._each_hook(lambda hook: hook.before_step(self.parameters, step, rows))

    def after_step(self, step: int, rows: int) -> None:
        self._each_hook(lambda hook: hook.after_step(self.parameters, step, rows))

    def _each_hook(self, call: Callable[[StepHook], None]) -> None:
        for hook in self.hooks:
            while True:
                try:
                    call(hook)
                except SwarmError as error:
                    self.swarm_failed(error)
                else:
                    break

    def _tell_waits(self) -> None:
        waits = self.state == "paused"
        if waits != self._told_waits:
            self._told_waits = waits
            for hook in self.hooks:
                hook.waits(waits)

    def swarm_failed(self, error: SwarmError) -> None:
        """Other peers could not do what a step needs: wait, with a checkpoint, until somebody says to try again."""
        began = time.perf_counter()
        with contextlib.suppress(OSError, NBRunnerError):
            self._save()
        self.history.mark(self.step, "error", str(error))
        self.control.trouble(_paused(error, self.step, self.folder))
        self._waited += time.perf_counter() - began

    def take_waited(self) -> float:
        """Seconds of this step in which it waited for somebody; they are not the step's."""
        waited, self._waited = self._waited, 0.0
        return waited

    def stepped(self, state: Any, watch: PassWatch, seconds: float, tokens: int) -> None:
        """A step was made."""
        self.step, self.epoch = int(state.global_step), float(state.epoch or 0.0)
        costs = step_costs(watch, seconds, tokens)
        self._costs.append(costs)
        self._total += costs

    def learned(self, state: Any, loss: float, *, lr: float, grad_norm: float | None) -> None:
        """The loss of the step that was made."""
        costs = self._costs[-1]
        self.history.learned(
            self.step,
            loss,
            epoch=self.epoch,
            lr=lr,
            grad_norm=grad_norm,
            tokens=costs.tokens,
            seconds=costs.seconds,
            tokens_per_second=costs.tokens_per_second,
            client_seconds=costs.client,
            wire_seconds=costs.wire,
            server_seconds=sum(costs.servers.values()),
            servers=dict(costs.servers),
        )

    def evaluated(self, state: Any, metrics: Any) -> None:
        """An evaluation came to an end."""
        row = self.history.row(int(state.global_step))
        row.epoch = float(state.epoch or 0.0)
        row.eval_loss = float(metrics["eval_loss"])
        if "eval_accuracy" in metrics:
            row.eval_accuracy = float(metrics["eval_accuracy"])

    def wants_evaluation(self, state: Any) -> bool:
        """Whether this step is followed by one. Samples are answered then too."""
        step = int(state.global_step)
        every = self.settings.eval_every or self._steps_in_epoch
        if step % every and step < self.steps:
            return False
        if self.settings.samples and step < self.steps:
            self._answer("during", self.settings.samples)
        return self._evaluation is not None

    def wants_checkpoint(self, state: Any) -> bool:
        """Whether this step is followed by one; the last step's comes with the end."""
        step = int(state.global_step)
        if step >= self.steps:
            return False
        every = self.settings.checkpoint_every
        due = step % (every or self._steps_in_epoch) == 0
        if due or (every is None and time.monotonic() - self._saved_at > CHECKPOINT_SECONDS):
            self._saved_at = time.monotonic()
            return True
        return False

    def saved(self) -> None:
        """A checkpoint of this step is there."""
        self._saved_at, self._saved_step = time.monotonic(), self.step

    def _save(self) -> Path:
        if self._saved_step != self.step or self.folder.last_checkpoint is None:
            self.trainer._save_checkpoint(self.model, None)
        path = self.folder.last_checkpoint
        if path is None:
            raise OSError(f"no checkpoint is in {self.folder.path}")
        return path

    def _answer(self, when: When, prompts: Sequence[str], *, keep: bool = True) -> Answers:
        with evaluating(self.model):
            try:
                texts = tuple(self._one_answer(prompt) for prompt in prompts)
                made = Answers(self.step, when, texts)
            except NBRunnerError as error:  # no reason to give up a training
                made = Answers(self.step, when, (), str(error))
        if keep:
            self.answers.append(made)
        return made

    def _one_answer(self, prompt: str) -> str:
        if self.classes:
            return classify(self.model, self.tokenizer, prompt, self.classes)
        return answer(self.model, self.tokenizer, prompt, new_tokens=self.settings.sample_tokens)

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps besides Trainer's own files."""
        return {"history": self.history.dump(), "answers": [vars(one) for one in self.answers]}

    # -- pictures ------------------------------------------------------------------------------------------------

    def figure(self, *, dark: bool = False) -> Any:
        """The curves as a plotly figure."""
        from nbrunner.tuning.figure import run_figure

        return run_figure(self, dark=dark)


def _accuracy(prediction: Any) -> dict[str, float]:
    scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((scores.argmax(-1) == prediction.label_ids).mean())}


def _paused(error: SwarmError, step: int, folder: RunFolder) -> TrainingError:
    kept = folder.last_checkpoint
    where = f" Its checkpoint is {kept}." if kept is not None else ""
    paused = TrainingError(
        f"paused before step {step + 1}: {error}{where} run.resume() tries the step again.",
        step=step,
        checkpoint=str(kept or ""),
    )
    paused.__cause__ = error
    return paused


def _with_advice(error: BaseException, step: int, folder: RunFolder) -> BaseException:
    """An error of ours, with where to go on from; others as they are."""
    kept = folder.last_checkpoint
    if not isinstance(error, NBRunnerError) or kept is None:
        return error
    told = TrainingError(
        f"{error} Its last checkpoint is kept: nbrunner.resume({str(folder.path)!r}, model, lr=…) goes on after "
        f"step {step}.",
        step=step,
        checkpoint=str(kept),
    )
    told.__cause__ = error
    return told
