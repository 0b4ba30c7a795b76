"""How a run trains: every number that was asked for, checked, and written down so that it can be continued."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nbrunner.errors import UserInputError

Method = Literal["lora", "prompt", "p-tuning", "deep-prompt", "classify"]
METHODS: tuple[str, ...] = get_args(Method)

Schedule = Literal["linear", "constant", "cosine"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

LORA_OPTIONS = ("rank", "alpha", "dropout", "target_modules")

LEARNING_RATES: Mapping[str, float] = {
    "lora": 1e-3,
    "prompt": 1e-2,
    "p-tuning": 1e-3,
    "deep-prompt": 1e-2,
    "classify": 5e-3,
}
"""Where nothing is asked for. Prompts are few numbers far from any text: they need larger steps than weights."""


@dataclass(frozen=True)
class Settings:
    """What `nbrunner.finetune` was asked for.

    Attributes
    ----------
    method : str
        ``lora``, ``prompt``, ``p-tuning``, ``deep-prompt`` or ``classify``.
    lr : float
        Learning rate at its highest; None takes `LEARNING_RATES`.
    epochs : float
        Passes over the data.
    max_steps : int or None
        Optimiser steps; instead of ``epochs``.
    batch_size, gradient_accumulation : int
        Rows of a pass through the model, and passes of an optimiser step.
    rank, alpha, dropout, target_modules
        Of LoRA. ``rank`` None: 8 for ``lora``, none for ``classify``. ``alpha`` None: twice the rank.
        ``target_modules`` None: what PEFT takes for the architecture.
    prompt_tokens : int
        Virtual tokens of a trained prompt.
    max_length : int or None
        Cut longer rows.
    schedule : str
        ``linear`` (to nothing at the end), ``constant`` or ``cosine``, after ``warmup_steps``.
    eval_every, checkpoint_every : int or None
        Optimiser steps; None: at the end of each epoch (and a checkpoint each minute).
    samples : tuple of str
        Prompts that are answered before, during and after.
    sample_tokens : int
        At most so many new tokens in an answer.
    """

    method: str = "lora"
    lr: float | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    prompt_tokens: int = 16
    max_length: int | None = None
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = None
    samples: tuple[str, ...] = ()
    sample_tokens: int = 24

    def __post_init__(self) -> None:
        """Raises `UserInputError` for the first value that cannot be used."""
        if self.method not in METHODS:
            raise UserInputError(f"there is no method {self.method!r}; choose one of {', '.join(METHODS)}.")
        if self.schedule not in SCHEDULES:
            raise UserInputError(f"there is no schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        for name in ("batch_size", "gradient_accumulation", "prompt_tokens", "sample_tokens"):
            _whole(name, getattr(self, name), least=1)
        for name in ("max_steps", "max_length", "rank", "eval_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        _whole("warmup_steps", self.warmup_steps, least=0)
        _whole("seed", self.seed, least=0)
        for name in ("lr", "alpha"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), above=0.0)
        _number("epochs", self.epochs, above=0.0)
        _number("max_grad_norm", self.max_grad_norm, above=0.0)
        _number("weight_decay", self.weight_decay, least=0.0)
        _number("dropout", self.dropout, least=0.0, below=1.0)
        lora = [name for name in LORA_OPTIONS if getattr(self, name)]
        if lora and not self.lora_rank:
            belongs = "belong" if lora[0].endswith("s") else "belongs"
            advice = "; with a rank it has LoRA too." if self.method == "classify" else "."
            raise UserInputError(f"{lora[0]} {belongs} to LoRA, and the method {self.method!r} trains none{advice}")
        if any(not isinstance(one, str) or not one.strip() for one in self.samples):
            raise UserInputError("samples are prompts: a list of texts that are not empty.")

    @property
    def learning_rate(self) -> float:
        """What was asked for, or what suits the method."""
        return self.lr if self.lr is not None else LEARNING_RATES[self.method]

    @property
    def lora_rank(self) -> int:
        """0: no LoRA."""
        if self.method == "lora":
            return self.rank or 8
        return (self.rank or 0) if self.method == "classify" else 0

    @property
    def lora_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.lora_rank

    @property
    def virtual_tokens(self) -> int:
        """Of a trained prompt; 0 without one."""
        return 0 if self.lora_rank else self.prompt_tokens

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """From what a caller gave: lists become tuples, one text a tuple of it.

        Raises
        ------
        UserInputError
            An option that there is not, or a value that cannot be used.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UserInputError(f"finetune has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        samples = values.get("samples")
        values["samples"] = (samples,) if isinstance(samples, str) else tuple(samples or ())
        targets = values.get("target_modules")
        if targets is not None and not isinstance(targets, str):
            values["target_modules"] = _names(targets)
        return cls(**values)


def _names(targets: Any) -> tuple[str, ...]:
    if not isinstance(targets, (Sequence, set, frozenset)) or not all(isinstance(one, str) for one in targets):
        raise UserInputError(f"target_modules are names of modules, such as ['q_proj', 'v_proj'], not {targets!r}.")
    return tuple(targets) if isinstance(targets, Sequence) else tuple(sorted(targets))


def _whole(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserInputError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def _number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, below: float | None = None
) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if fits and above is not None:
        fits = value > above
    if fits and least is not None:
        fits = value >= least
    if fits and below is not None:
        fits = value < below
    if not fits:
        bounds = [
            f"above {above:g}" if above is not None else "",
            f"of at least {least:g}" if least is not None else "",
            f"below {below:g}" if below is not None else "",
        ]
        raise UserInputError(
            f"{name} must be a number {' and '.join(one for one in bounds if one)}, not {value!r}."
        )
