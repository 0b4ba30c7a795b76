"""The methods as PEFT has them: which parameters of the client's learn, on top of a model that stays as it is."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from nbrunner.client.deep_prompts import add_deep_prompts, load_deep_prompts
from nbrunner.client.load import classifier_of
from nbrunner.client.model import DistributedModel
from nbrunner.client.path_model import twin_of
from nbrunner.errors import UserInputError
from nbrunner.tuning.data import Label
from nbrunner.tuning.randomness import own_random_numbers
from nbrunner.tuning.settings import Settings

# bitsandbytes, which PEFT imports, complains about an optional package that nobody here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# transformers, each time a trained prompt stands before a text to classify: our padding is where it expects it
logging.getLogger("transformers.modeling_layers").addFilter(
    lambda record: "will not detect padding tokens" not in record.getMessage()
)


_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Where experts are kept in one tensor, PEFT takes these names for parts of it, which servers cannot adapt."""

_STATE_SPACE = ("falcon_h1", "nemotron_h")
"""Whose ``out_proj`` PEFT refuses: fused kernels of the architecture go past what it puts there."""

_KINDS = {
    "lora": ("LORA",),
    "prompt": ("PROMPT_TUNING",),
    "p-tuning": ("P_TUNING",),
    "deep-prompt": ("PROMPT_TUNING",),
    "classify": ("LORA", "PROMPT_TUNING"),
}
"""What PEFT calls the adapters of a method."""


@dataclass(frozen=True)
class Taught:
    """A model with what it is taught.

    Attributes
    ----------
    model : peft.PeftModel
        What is trained.
    base : PreTrainedModel
        What was given; kept, because a twin of it lives no longer than it does.
    """

    model: Any
    base: Any

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that learn, by name."""
        return [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]

    @property
    def size(self) -> int:
        """How many numbers learn."""
        return sum(one.numel() for _, one in self.parameters)

    @property
    def virtual_tokens(self) -> int:
        """Tokens of a trained prompt that stand before each row."""
        config = self.model.peft_config[self.model.active_adapter]
        return int(config.num_virtual_tokens) if config.is_prompt_learning else 0

    def save_adapter(self, folder: Path) -> None:
        """Write what was learned as a PEFT directory, with the prompts of blocks beside it if there are any."""
        # without looking for changed embeddings, which nobody trains here: PEFT would ask the hub for the model
        self.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        prompts = getattr(getattr(self.model.get_base_model(), "_layers", None), "prompts", None)
        if prompts is not None:
            prompts.save(folder)

    def save_learned(self, path: Path) -> None:
        """Everything that learns, for going on with it: a PEFT directory holds only what comes out of it."""
        safetensors.torch.save_file({name: one.detach().cpu().contiguous() for name, one in self.parameters}, path)

    @torch.no_grad()
    def load_learned(self, path: Path) -> None:
        """Undo whatever was learned since `save_learned`.

        Raises
        ------
        UserInputError
            The file is missing, or of another model or method.
        """
        try:
            found = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserInputError(f"{path} cannot be read: {error}") from None
        learns = dict(self.parameters)
        if found.keys() != learns.keys() or any(found[name].shape != learns[name].shape for name in found):
            raise UserInputError(f"{path} holds what another model or method learned.")
        for name, parameter in learns.items():
            parameter.copy_(found[name])


def teach(
    model: Any,
    settings: Settings,
    *,
    classes: Sequence[Label] = (),
    adapter: str | Path | None = None,
    weights: bool = True,
) -> Taught:
    """Put what a method trains into a model.

    A distributed model itself stays as it is: its twin gets the adapter. A model of another kind is changed, as
    PEFT does. A PEFT model is trained as it is.

    Parameters
    ----------
    model
        Distributed, or of transformers, or of PEFT.
    settings
        The method and its numbers; the seed of what starts at random.
    classes
        For ``classify``.
    adapter
        Directory of a PEFT adapter to go on with, instead of a new one.
    weights
        Whether its numbers are taken as well, and not only its configuration.

    Raises
    ------
    UserInputError
        A model without parameters that could learn this way, modules that it does not have, a directory without an
        adapter.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        return _as_it_is(model, settings, classes)
    base = _prepared(model, settings, classes)
    if adapter is not None:
        made = _continued(base, Path(adapter), settings, weights=weights)
    else:
        made = _peft_model(base, peft_config(base, settings), settings)
    if settings.method == "deep-prompt":
        _add_deep_prompts(made, Path(adapter) if adapter is not None and weights else None)
    return Taught(made, model)


def peft_config(model: Any, settings: Settings) -> Any:
    """The PEFT configuration of a method."""
    import peft

    task = peft.TaskType.SEQ_CLS if settings.method == "classify" else peft.TaskType.CAUSAL_LM
    if settings.lora_rank:
        return peft.LoraConfig(
            task_type=task,
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.dropout,
            target_modules=_targets(model, settings.target_modules),
        )
    # PEFT does not need it here, and refuses models that call it by a name that it does not know
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else None
    if settings.method == "p-tuning":
        return peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=settings.prompt_tokens, num_attention_heads=heads
        )
    # Starting from tokens of the vocabulary: numbers drawn at random are fifty times as large as any embedding.
    return peft.PromptTuningConfig(
        task_type=task,
        num_attention_heads=heads,
        num_virtual_tokens=settings.prompt_tokens,
        prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
    )


def modules_of(model: Any) -> list[str]:
    """Names of the linear modules in a model's blocks, as ``target_modules`` takes them."""
    from nbrunner.blocks.compat import Conv1D

    names: set[str] = set()
    left_out = {"out_proj"} if getattr(model.config, "model_type", None) in _STATE_SPACE else set()
    for path, module in model.named_modules():
        *above, name = path.split(".")
        if name == "experts" and any(one.ndim == 3 for one in module.parameters(recurse=False)):
            left_out |= _EXPERTS
        # a name that is a number would be that of a block too
        if isinstance(module, (nn.Linear, Conv1D)) and any(map(str.isdecimal, above)) and not name.isdecimal():
            names.add(name)
    return sorted(name for name in names - left_out if "router" not in name)


def is_classifier(model: Any) -> bool:
    """Whether a model has a head for labels."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith("ForSequenceClassification")


def _targets(model: Any, targets: tuple[str, ...] | str | None) -> list[str] | str | None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    names = modules_of(model)
    if not names:
        raise UserInputError(
            f"{type(model).__name__} has no linear modules in its blocks that LoRA could change; train a prompt."
        )
    if targets is None:
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        return [one for one in usual if one in names] if usual and any(one in names for one in usual) else names
    if targets == "all-linear":
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = [one for one in wanted if one.rpartition(".")[2] not in names]
    if missing:
        raise UserInputError(
            f"there is no module {missing[0]!r} in this model's blocks; target_modules can be {', '.join(names)}, "
            "or 'all-linear'."
        )
    return wanted


def _prepared(model: Any, settings: Settings, classes: Sequence[Label]) -> Any:
    """The model that PEFT may change."""
    classify = settings.method == "classify"
    if not isinstance(model, DistributedModel):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise UserInputError(f"there is nothing to teach in {type(model).__name__}; give a model.")
        if classify and not is_classifier(model):
            raise UserInputError(
                f"{type(model).__name__} has no head for labels: load it with AutoModelForSequenceClassification."
            )
        if classify:
            _name_classes(model, classes)
        _check_task(model, classify=classify)
        return model
    if classify and not is_classifier(model):
        with _quietly(settings.seed):
            made = classifier_of(model, **_class_names(classes))
    else:
        _check_task(model, classify=classify)
        made = twin_of(model)
        if classify:
            _name_classes(made, classes)
    made.config.use_cache = False  # some architectures ask for a cache themselves where the config says so
    return made


def _check_task(model: Any, *, classify: bool) -> None:
    if classify or not is_classifier(model):
        if not classify and (not hasattr(model, "generate") or model.get_output_embeddings() is None):
            raise UserInputError(
                f"{type(model).__name__} has no language-model head to teach texts with: load the model with "
                "AutoDistributedModelForCausalLM."
            )
        return
    raise UserInputError(f"{type(model).__name__} gives labels: teach it with method='classify'.")


def _class_names(classes: Sequence[Label]) -> dict[str, Any]:
    names = {index: str(one) for index, one in enumerate(classes)}
    return {"num_labels": len(classes), "id2label": names, "label2id": {one: index for index, one in names.items()}}


def _name_classes(model: Any, classes: Sequence[Label]) -> None:
    if int(model.config.num_labels) != len(classes):
        raise UserInputError(
            f"the data have {len(classes)} different labels and the model's head has {model.config.num_labels} "
            f"outputs: load the model with num_labels={len(classes)}."
        )
    for name, value in _class_names(classes).items():
        if name != "num_labels":
            setattr(model.config, name, value)


def _as_it_is(model: Any, settings: Settings, classes: Sequence[Label]) -> Taught:
    classify = settings.method == "classify"
    if classify != is_classifier(model):
        raise UserInputError(
            "this PEFT model was made for another task: "
            + ("it has no head for labels." if classify else "teach it with method='classify'.")
        )
    if classify:
        _name_classes(model.get_base_model(), classes)
    taught = Taught(model, model)
    if not taught.parameters:
        raise UserInputError("nothing in this PEFT model learns: load its adapter with is_trainable=True.")
    return taught


def _add_deep_prompts(model: Any, folder: Path | None) -> None:
    """A prompt for every block, as long as that in front of the text: new, or from an adapter's directory."""
    base = model.get_base_model()
    if not isinstance(base, DistributedModel):
        raise UserInputError(
            f"deep prompts go into the blocks of a distributed model, and this is {type(base).__name__}: "
            "use 'prompt'."
        )
    if folder is not None:
        load_deep_prompts(base, folder, is_trainable=True)
    else:
        add_deep_prompts(base, int(model.peft_config[model.active_adapter].num_virtual_tokens))


def _peft_model(base: Any, config: Any, settings: Settings) -> Any:
    import peft

    with _quietly(settings.seed):
        try:
            return peft.get_peft_model(base, config)
        except ValueError as error:
            raise UserInputError(f"PEFT cannot do this with {type(base).__name__}: {error}") from None


def _continued(base: Any, folder: Path, settings: Settings, *, weights: bool) -> Any:
    """A model with an adapter that exists. Not ``from_pretrained``: that loads trained prompts only to use them."""
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise UserInputError(f"there is no PEFT adapter in {folder}: adapter_config.json is missing.")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserInputError(f"the adapter in {folder} has no adapter_model.safetensors; no other format is read.")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserInputError(f"adapter_config.json in {folder} cannot be read: {error}") from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _KINDS[settings.method]:
        could = ", ".join(name for name, kinds in _KINDS.items() if kind in kinds) or "none"
        raise UserInputError(
            f"the adapter in {folder} is of the kind {kind}, with which the method {settings.method!r} cannot go "
            f"on: {could} could."
        )
    if weights and config.peft_type == peft.PeftType.P_TUNING:
        raise UserInputError(
            "a p-tuning adapter keeps what its network has made, and not the network: it cannot be taught further. "
            "A run can: nbrunner.resume(path, model)."
        )
    config.inference_mode = False
    made = _peft_model(base, config, settings)
    if not weights:
        return made
    try:
        found = safetensors.torch.load_file(file)
        told = peft.set_peft_model_state_dict(made, found)
    except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserInputError(f"the adapter in {folder} does not fit this model: {error}") from None
    unknown = [one for one in told.unexpected_keys if one != "prompt_embeddings"]  # those have a way of their own
    if unknown:
        raise UserInputError(f"the adapter in {folder} does not fit this model, which has no {unknown[0]}.")
    return made


@contextlib.contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """What starts at random starts from the seed, and the notebook's own generator does not notice."""
    with own_random_numbers(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at how PEFT asks about checkpointing
        yield
