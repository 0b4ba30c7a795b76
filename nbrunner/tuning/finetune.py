"""`nbrunner.finetune` and `nbrunner.resume`: everything is checked here, before anything starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbrunner.client.inputs import position_limit
from nbrunner.client.receipt import model_facts
from nbrunner.client.tokenizers import load_tokenizer
from nbrunner.client.tracing import tokenizer_of
from nbrunner.errors import UserInputError
from nbrunner.tuning.data import Examples, Label, read_examples
from nbrunner.tuning.encoding import Encoding
from nbrunner.tuning.folder import ADAPTER, HISTORY_FILE, LEARNED_FILE, RunFolder
from nbrunner.tuning.history import History
from nbrunner.tuning.hooks import StepHook
from nbrunner.tuning.methods import Taught, is_classifier, teach
from nbrunner.tuning.model_source import model_source
from nbrunner.tuning.progress import TrainingResult
from nbrunner.tuning.run import TrainingRun
from nbrunner.tuning.samples import Answers
from nbrunner.tuning.settings import LORA_OPTIONS, Settings
from nbrunner.tuning.together_hook import TogetherHook

MAY_CHANGE = ("lr", "epochs", "max_steps", "samples", "sample_tokens", "eval_every", "checkpoint_every")
"""What a run that goes on may do otherwise than before; the rest is what its checkpoint was made with."""

_PACKAGES = ("nbrunner", "torch", "transformers", "peft")


def finetune(
    model: Any,
    data: Any,
    *,
    method: str = "lora",
    eval_data: Any = None,
    tokenizer: Any = None,
    adapter: str | Path | TrainingRun | TrainingResult | None = None,
    out_dir: str | Path | None = None,
    together: str | None = None,
    together_options: Mapping[str, Any] | None = None,
    hooks: Sequence[StepHook] = (),
    **options: Any,
) -> TrainingRun:
    """Teach a model, in the background; the weights on the servers stay as they are.

    Parameters
    ----------
    model
        From ``AutoDistributedModelFor….from_pretrained``, which stays as it is: the run has a twin of it. Or a
        model of transformers, or of PEFT.
    data, eval_data
        A list of texts or of dicts (``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}``,
        ``{"text", "label"}``), a DataFrame, a ``datasets.Dataset``, a `pathlib.Path` to JSON lines or lines.
    method
        ``lora``: adapters of the weights in the blocks. ``prompt``: virtual tokens in front of every text.
        ``p-tuning``: the same, made by a small network while it is trained. ``deep-prompt``: virtual tokens in
        every block. ``classify``: a head for labels, with a trained prompt, or with LoRA if ``rank`` is given.
    tokenizer
        By default the one saved with the model.
    adapter
        Directory of a PEFT adapter to go on with, or a run that has taught one, or its result.
    out_dir
        Where the run is kept; by default a new folder in ``nbrunner-runs``.
    together
        A name under which others of the swarm teach the same adapter: what each has learned is averaged. Whoever
        comes later goes on from what the others have, and at the end all have the same.
    together_options
        ``every_steps``, ``member`` (your name, shown to the others), ``patience``, ``farewell``…: see
        `nbrunner.tuning.together.Together`.
    hooks
        Who takes part in each step.
    **options
        ``lr``, ``epochs``, ``max_steps``, ``batch_size``, ``gradient_accumulation``, ``rank``, ``alpha``,
        ``dropout``, ``target_modules``, ``prompt_tokens``, ``max_length``, ``schedule``, ``warmup_steps``,
        ``weight_decay``, ``max_grad_norm``, ``seed``, ``eval_every``, ``checkpoint_every``, ``samples``,
        ``sample_tokens``: see `nbrunner.tuning.settings.Settings`.

    Returns
    -------
    TrainingRun
        It runs already.

    Raises
    ------
    UserInputError
        Before anything starts: data with the first bad row, options, modules or methods that do not go.

    Examples
    --------
    ::

        run = nbrunner.finetune(model, facts, rank=8, epochs=4, samples=["The capital of Velmora is"])
        run.pause(); run.set_lr(5e-4); run.resume()
        run.result().adapter
    """
    settings = Settings.of(method=method, **options)
    adapter = _adapter_folder(adapter)
    _check_brought(model, adapter, options)
    labelled = method == "classify"
    examples = read_examples(data, labelled=labelled)
    evaluation = read_examples(eval_data, labelled=labelled, name="eval_data") if eval_data is not None else None
    classes = _classes(model, examples) if labelled else ()
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(model)
    taught = teach(model, settings, classes=classes, adapter=adapter)
    # encoded before a folder is made: what is wrong with a row must leave nothing behind
    encoding = _encoding(taught, tokenizer, settings, classes)
    encoded = encoding.encode(examples)
    encoded_evaluation = encoding.encode(evaluation) if evaluation is not None else None
    with _joined(together, model, taught, settings, together_options) as joined:
        folder = RunFolder.create(out_dir, method)
        facts = {**_facts(model, settings, classes), "adapter": None if adapter is None else str(adapter)}
        folder.write(facts, examples, evaluation)
        run = TrainingRun(
            taught,
            tokenizer,
            settings,
            encoded,
            encoded_evaluation,
            classes=classes,
            folder=folder,
            hooks=[*hooks, *joined],
        )
        run.start()
    return run


def _adapter_folder(adapter: Any) -> Path | None:
    if adapter is None:
        return None
    if isinstance(adapter, TrainingResult):
        return adapter.adapter
    if isinstance(adapter, TrainingRun):
        folder = adapter.folder.path / ADAPTER
        found = folder if folder.is_dir() else adapter.folder.last_checkpoint
        if found is None:
            raise UserInputError("this run has no checkpoint yet: run.checkpoint().result() writes one.")
        return found
    if not isinstance(adapter, (str, os.PathLike)):
        raise UserInputError(
            f"adapter is {type(adapter).__name__}; give the directory of a PEFT adapter, or a run."
        )
    return Path(adapter)


def _check_brought(model: Any, adapter: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse numbers of LoRA for what has its own."""
    given = next((name for name in LORA_OPTIONS if options.get(name) is not None), None)
    if given is None or (adapter is None and not hasattr(model, "peft_config")):
        return
    what = f"the adapter in {adapter}" if adapter is not None else "this PEFT model"
    raise UserInputError(f"{what} has its own {given}: leave it out.")


@contextlib.contextmanager
def _joined(
    name: str | None, model: Any, taught: Taught, settings: Settings, options: Mapping[str, Any] | None
) -> Iterator[list[StepHook]]:
    """Those who teach under a name, joined; left again if the run does not start."""
    if name is None:
        if options:
            raise UserInputError("together_options go with together=NAME.")
        yield []
        return
    hook = TogetherHook.join(name, model, taught.parameters, settings, options)
    try:
        yield [hook]
    except BaseException:
        hook.together.close()
        raise


def resume(
    path: str | Path,
    model: Any = None,
    *,
    tokenizer: Any = None,
    together: str | None = None,
    together_options: Mapping[str, Any] | None = None,
    hooks: Sequence[StepHook] = (),
    **changes: Any,
) -> TrainingRun:
    """Go on with a run from its last checkpoint: after a restart, after a failure, or for more epochs.

    It comes to the same losses as if it had never been interrupted.

    Parameters
    ----------
    path
        The run's folder.
    model
        The one it began with; in a notebook with ``%load_ext nbrunner`` it is found in the swarm.
    tokenizer, together, together_options, hooks
        As in `finetune`. Where others teach together already, it goes on from what they have by now.
    **changes
        ``lr``, ``epochs``, ``max_steps``, ``samples``, ``sample_tokens``, ``eval_every``, ``checkpoint_every``.

    Raises
    ------
    UserInputError
        No run there, one that is complete, one that is open elsewhere, or another model than it began with.
    """
    refused = sorted(changes.keys() - set(MAY_CHANGE))
    if refused:
        raise UserInputError(f"a run cannot go on with another {refused[0]}; it can with {', '.join(MAY_CHANGE)}.")
    folder = RunFolder.open(path)
    try:
        return _resume(folder, model, tokenizer, hooks, changes, together, together_options)
    except BaseException:
        folder.unlock()
        raise


def _resume(
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    hooks: Sequence[StepHook],
    changes: dict[str, Any],
    together: str | None,
    together_options: Mapping[str, Any] | None,
) -> TrainingRun:
    facts = folder.read()
    settings = Settings.of(**{**facts["settings"], **changes})
    classes: tuple[Label, ...] = tuple(facts.get("classes", ()))
    if model is None:
        model, tokenizer = _find_model(facts, tokenizer)
    _check_model(model, facts)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(model)
    examples, evaluation = folder.data(labelled=bool(classes))
    checkpoint = folder.last_checkpoint
    history, answers = _kept(checkpoint)
    adapter = checkpoint or facts.get("adapter")
    taught = teach(model, settings, classes=classes, adapter=adapter, weights=checkpoint is None)
    if checkpoint is not None:
        taught.load_learned(checkpoint / LEARNED_FILE)
    encoding = _encoding(taught, tokenizer, settings, classes)
    with _joined(together, model, taught, settings, together_options) as joined:
        run = TrainingRun(
            taught,
            tokenizer,
            settings,
            encoding.encode(examples),
            encoding.encode(evaluation) if evaluation is not None else None,
            classes=classes,
            folder=folder,
            hooks=[*hooks, *joined],
            checkpoint=checkpoint,
            history=history,
            answers=answers,
        )
        if run.step >= run.steps:
            raise UserInputError(
                f"this run is complete after {run.step} steps; more epochs go on with it: "
                f"nbrunner.resume({str(folder.path)!r}, model, epochs={settings.epochs * 2:g})"
            )
        if "lr" in changes and checkpoint is not None:
            run.ask_lr(settings.learning_rate)
        run.start()
    return run


def _kept(checkpoint: Path | None) -> tuple[History, list[Answers]]:
    """The history and the answers that a checkpoint keeps."""
    if checkpoint is None:
        return History(), []
    try:
        kept = json.loads((checkpoint / HISTORY_FILE).read_text("utf-8"))
        answers = [Answers(**{**one, "texts": tuple(one["texts"])}) for one in kept["answers"]]
        return History.load(kept["history"]), answers
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"the checkpoint {checkpoint} cannot be read: {error!r}") from None


def _find_model(facts: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    name = str(facts.get("model", {}).get("name", ""))
    source = model_source()
    if source is None:
        raise UserInputError(
            f"give the model that this run teaches ({name}): nbrunner.resume(path, model). In a notebook, after "
            "%load_ext nbrunner, it is found in the swarm."
        )
    model, found = source(name)
    return model, tokenizer if tokenizer is not None else found


def _check_model(model: Any, facts: dict[str, Any]) -> None:
    began = facts.get("model", {})
    now = model_facts(model)
    if began.get("uid") and now["uid"] and began["uid"] != now["uid"]:
        raise UserInputError(f"this run teaches {began['uid']}, and the model given is {now['uid']}.")
    if began.get("type") != now["type"]:
        raise UserInputError(f"this run teaches a {began.get('type')}, and the model given is a {now['type']}.")


def _facts(model: Any, settings: Settings, classes: Sequence[Label]) -> dict[str, Any]:
    """What `run.json` says. Nothing that lets anybody into a swarm."""
    return {
        "settings": settings.as_dict(),
        "model": model_facts(model),
        "classes": list(classes),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _classes(model: Any, examples: Examples) -> tuple[Label, ...]:
    """The labels in the order of the head's outputs: a head's own order where it has these names."""
    found = examples.labels
    named = getattr(model.config, "id2label", None) or {}
    if is_classifier(model) and all(str(one) in {str(name) for name in named.values()} for one in found):
        by_name = {str(one): one for one in found}
        ordered = [by_name.get(str(named[index]), str(named[index])) for index in sorted(named)]
        return tuple(ordered)
    if len(found) < 2:
        raise UserInputError(f"all rows have the label {found[0]!r}: there is nothing to tell apart.")
    return tuple(found)


def _tokenizer(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = tokenizer_of(base)
    return found if found is not None else load_tokenizer(base.config._name_or_path)


def _encoding(taught: Taught, tokenizer: Any, settings: Settings, classes: Sequence[Label]) -> Encoding:
    inner = taught.model.get_base_model()
    most, _ = position_limit(inner, inner.config)
    room = (most or 1 << 20) - taught.virtual_tokens
    if room < 1:
        raise UserInputError(
            f"a prompt of {taught.virtual_tokens} tokens leaves no room for a text: the model takes {most}; "
            "give fewer prompt_tokens."
        )
    return Encoding(
        tokenizer,
        most_tokens=room,
        max_length=settings.max_length,
        classes=tuple(classes),
    )
