"""transformers' Trainer, told what to do between its steps, and going on where the swarm let it down.

What training *is* stays Trainer's: batches, losses, accumulation, clipping, optimiser, schedule, evaluation, what a
checkpoint holds. Here is only what a notebook needs of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState

from nbrunner.blocks.compat import printer_callback
from nbrunner.client.watch import PassWatch, watching
from nbrunner.errors import SwarmError, TrainingError
from nbrunner.protocol.finite import all_finite
from nbrunner.tuning.control import StopRun
from nbrunner.tuning.folder import HISTORY_FILE, LEARNED_FILE, checkpoint_name
from nbrunner.tuning.randomness import own_random_numbers
from nbrunner.tuning.settings import Settings

T = TypeVar("T")

making = threading.Lock()
"""Held while a trainer is made or prepared: what accelerate keeps for the process may be in pieces meanwhile."""


def arguments(settings: Settings, *, folder: Path, device: torch.device, classify: bool) -> Any:
    """What Trainer is to do, and what it leaves to us: evaluating and saving are asked for step by step."""
    made = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=not classify,
        dataloader_pin_memory=False,
        accelerator_config={"use_configured_state": _is_set_up_for(device)},
    )
    made._n_gpu = min(made.n_gpu, 1)  # more would split the model's batches by threads, each with its own copy
    return made


class RunTrainer(transformers.Trainer):  # type: ignore[misc]
    """Trainer for a `nbrunner.tuning.run.TrainingRun`.

    Parameters
    ----------
    run
        Whose control, folder, history and settings are used.
    """

    def __init__(self, run: Any, **kwargs: Any) -> None:
        self.run = run
        self.watch = PassWatch()
        self.step_tokens = self.step_rows = 0
        self._staging: Path | None = None
        with own_random_numbers():  # Trainer seeds everything there is when it is made
            super().__init__(**kwargs)
        self.remove_callback(printer_callback())
        accelerator = self.accelerator
        accelerator.state = _of_its_own(accelerator.state)
        self.args.distributed_state = _of_its_own(self.args.distributed_state)
        self._gradients = accelerator.gradient_state = _of_its_own(accelerator.gradient_state)
        self._gradients._dataloader_references_ref = [None]
        self._draws = any(
            isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
            for module in self.model.modules()
        )

    # accelerate keeps one state for all trainers of a process: whether gradients are to be applied now, which batch
    # is the last, and what there is at all, which it forgets whenever another Trainer is made. With it, two runs
    # spoil each other's evaluations (measured: the second digit of the loss) or end with an AttributeError.

    def get_train_dataloader(self) -> Any:
        with own_random_numbers():
            return self._with_own_state(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with own_random_numbers():
            return self._with_own_state(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with own_random_numbers():  # each pass over the data draws one, which nobody uses
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with making:
            if not AcceleratorState._shared_state:  # somebody's TrainingArguments() came in between
                AcceleratorState._shared_state.update(self.accelerator.state.__dict__)
            prepared = super()._prepare_for_training(*args, **kwargs)
        self._with_own_state(self.optimizer)
        return prepared

    def _with_own_state(self, part: T) -> T:
        if hasattr(part, "gradient_state"):
            part.gradient_state = self._gradients
        if hasattr(part, "accelerator_state"):
            part.accelerator_state = self.accelerator.state
        return part

    # -- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer; what the swarm could not do is done again once somebody says so."""
        mask = inputs.get("attention_mask")
        tokens, rows = int(mask.sum()) if mask is not None else 0, len(inputs["input_ids"])
        before = [(one, None if one.grad is None else one.grad.clone()) for _, one in self.run.parameters]

        def put_back() -> None:
            for parameter, gradient in before:
                parameter.grad = None if gradient is None else gradient.clone()

        loss: torch.Tensor = self._with_swarm(
            lambda: super(RunTrainer, self).training_step(model, dict(inputs), num_items_in_batch), put_back
        )
        self._check_numbers(loss)
        self.step_tokens += tokens
        self.step_rows += rows
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer, between which the run can be paused and stopped as well."""
        self.run.control.gate()
        return self._with_swarm(lambda: super(RunTrainer, self).prediction_step(model, inputs, *args, **kwargs))

    def _with_swarm(self, work: Callable[[], T], put_back: Callable[[], None] = lambda: None) -> T:
        while True:
            try:
                with watching(self.watch), self._random_numbers():
                    return work()
            except SwarmError as error:
                put_back()
                self.run.swarm_failed(error)
            except (concurrent.futures.CancelledError, KeyboardInterrupt):
                put_back()
                if self.run.control.stopping:
                    raise StopRun from None
                self.run.control.gate()

    def _check_numbers(self, loss: torch.Tensor) -> None:
        gradients = [one.grad for _, one in self.run.parameters if one.grad is not None]
        if all_finite(loss) and all(all_finite(one) for one in gradients):
            return
        self.model.zero_grad()
        raise TrainingError(
            f"the loss of step {self.state.global_step + 1} is no number any more, so that the step was not made. "
            "The learning rate is the usual reason.",
            step=self.state.global_step,
        )

    @contextlib.contextmanager
    def _random_numbers(self) -> Iterator[None]:
        """Dropout depends on the seed, the step and the pass alone, not on what other cells draw."""
        if not self._draws:
            yield
            return
        passes = self.step_rows // max(self.run.settings.batch_size, 1)
        with own_random_numbers(hash((self.run.settings.seed, self.state.global_step, passes)) & (2**63 - 1)):
            yield

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: see `_random_numbers`. The notebook's own generators stay as they are."""

    # -- what is written down ------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.run.taught.save_adapter(folder)
        self.run.taught.save_learned(folder / LEARNED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to load: the run has made its model from that checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer, in one piece or not at all."""
        with self.run.folder.writing(checkpoint_name(self.state.global_step)) as staged:
            self._staging = staged
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            inner = next(staged.glob("checkpoint-*"))
            for file in list(inner.iterdir()):
                shutil.move(str(file), staged / file.name)
            inner.rmdir()
            (staged / HISTORY_FILE).write_text(json.dumps(self.run.dump()), "utf-8")
        self.run.saved()

    def set_lr(self, lr: float) -> None:
        """Have the schedule go on at another height, from the next step on."""
        scheduler = self.lr_scheduler
        if hasattr(scheduler, "base_lrs") and hasattr(scheduler, "lr_lambdas"):
            scheduler.base_lrs = [lr] * len(scheduler.base_lrs)
            for group, rate in zip(self.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = lr, lr * rate(scheduler.last_epoch)


class RunCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells the run what Trainer does, and Trainer what the run wants."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._began = 0.0
        self._rate = 0.0

    @property
    def _trainer(self) -> RunTrainer:
        trainer: RunTrainer = self._run.trainer
        return trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.control.gate()
        self._run.begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.control.gate()
        self._trainer.watch.take()
        self._trainer.step_tokens = self._trainer.step_rows = 0
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        self._rate = trainer.optimizer.param_groups[0]["lr"]
        self._run.before_step(state.global_step, trainer.step_rows)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.after_step(state.global_step + 1, self._trainer.step_rows)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        seconds = time.perf_counter() - self._began - self._run.take_waited()
        self._run.stepped(state, trainer.watch.take(), seconds, trainer.step_tokens)
        control.should_log = True
        if self._run.wants_evaluation(state):
            control.should_evaluate = True
        if self._run.wants_checkpoint(state):
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self._run.learned(state, float(logs["loss"]), lr=self._rate, grad_norm=_number(logs.get("grad_norm")))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        self._run.evaluated(state, metrics)


def _is_set_up_for(device: torch.device) -> bool:
    """Whether what accelerate keeps for the process will do for a run on a device.

    Otherwise Trainer forgets it and makes it anew, under the feet of a run that is on its way: measured, one in
    seventy of three runs that were started at once ended with an error of accelerate's.
    """
    partial, whole = PartialState._shared_state, AcceleratorState._shared_state
    on = partial.get("device")
    usual = partial.get("distributed_type") == "NO" and whole.get("_mixed_precision", "no") == "no"
    return on is not None and on.type == device.type and usual


def _of_its_own(state: Any) -> Any:
    """A copy of an object whose class shares one dictionary among all of its objects; None for None."""
    if state is None:
        return None
    copy = object.__new__(type(state))
    copy.__dict__ = dict(state.__dict__)
    return copy


def _number(value: Any) -> float | None:
    found = float(value) if value is not None else None
    return found if found is None or math.isfinite(found) else None
