"""What is compared between a split model and the plain one, and what came out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from nbrunner.blocks.architecture import model_class
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.errors import UnsupportedModelError

from .chain import local_model
from .families import VOCABULARY, tiny_config

TOLERANCE = 1e-5
_LARGEST = 20_000_000  # parameters; a family whose config cannot be made small is not run


@dataclass
class Outcome:
    """One check: the largest difference, or a sentence why there is none."""

    difference: float | None = None
    problem: str = ""
    plain_cannot: bool = False

    @property
    def equal(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCE


@dataclass
class Family:
    """What came out for one family."""

    name: str
    refused: str = ""
    not_run: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Equal to the plain model in everything that the plain model itself can do, and never different."""
        possible = [outcome for outcome in self.outcomes.values() if not outcome.plain_cannot]
        return bool(possible) and all(outcome.equal for outcome in possible)

    @property
    def equal_in_all(self) -> bool:
        """Equal in every single check."""
        return self.equal and not any(outcome.plain_cannot for outcome in self.outcomes.values())


class DifferentTokensError(AssertionError):
    """Two models that must choose the same tokens did not."""


def check_family(name: str, split: int, folder: Path) -> Family:
    """Compare one family, cut before block `split`, with the plain model.

    Parameters
    ----------
    name : str
        From `tests.parity.families.names`.
    split : int
        First block of the second span; taken modulo what the model has.
    folder : Path
        Empty; the checkpoint is written there.
    """
    family = Family(name)
    try:
        torch.manual_seed(0)
        config = tiny_config(name)
        size = _parameters(config)
    except (TypeError, ValueError, AttributeError, ImportError, KeyError, IndexError, RuntimeError) as error:
        family.not_run = f"no tiny config: {_short(error)}"
        return family
    if size > _LARGEST:
        family.not_run = f"no tiny config: {size / 1e6:.0f} million parameters"
        return family
    try:
        plain = save_plain(config, folder)
        checkpoint = resolve_checkpoint(folder)
        try:
            split = min(split, checkpoint.num_blocks - 1)
            ours = local_model(checkpoint, split)
        except UnsupportedModelError as error:
            family.refused = error.reason
            return family
    except (TypeError, ValueError, AttributeError, ImportError, KeyError, IndexError, RuntimeError) as error:
        family.not_run = _short(error)
        return family
    for model in (plain, ours):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    inputs = Inputs()
    for check in CHECKS:
        family.outcomes[check.__name__] = _compare(check, plain, ours, inputs)
    return family


def small_enough(config: Any) -> bool:
    """Whether a family's smallest config is small enough to be run."""
    return _parameters(config) <= _LARGEST


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def save_plain(config: Any, folder: Path) -> Any:
    """The plain model, weights large enough for every layer to matter, saved in many shards and loaded again."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100KB")
    return model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


class Inputs:
    """Two rows of twelve random tokens, eight to decode, and a mask that pads the first row on the left."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, VOCABULARY - 6, (2, 12), generator=generator)
        self.more = torch.randint(3, VOCABULARY - 6, (2, 8), generator=generator)
        self.mask = torch.ones(2, 12, dtype=torch.long)
        self.mask[0, :5] = 0


Check = Callable[[Any, Inputs], Any]


def prefill_and_decode(model: Any, inputs: Inputs) -> torch.Tensor:
    """Logits of the prompt and of eight steps of one token each."""
    pieces = [inputs.prompt, *inputs.more.split(1, dim=1)]
    return torch.cat(list(_steps(model, pieces)), dim=1)


def left_padding(model: Any, inputs: Inputs) -> Any:
    return _generate(model, inputs, attention_mask=inputs.mask, do_sample=False)


def sampling(model: Any, inputs: Inputs) -> Any:
    return _generate(model, inputs, do_sample=True, top_k=20)


def beam_search(model: Any, inputs: Inputs) -> Any:
    return _generate(model, inputs, num_beams=3, do_sample=False)


def rollback(model: Any, inputs: Inputs) -> torch.Tensor:
    """Logits of three tokens after four others were taken back; the plain model never saw those four."""
    kept, dropped, then = inputs.prompt[:, :9], inputs.more[:, :4], inputs.prompt[:, 9:]
    if not hasattr(model, "runner"):
        return list(_steps(model, [kept, *then.split(1, dim=1)]))[-1]
    position = 0
    cache = model.new_cache()
    for piece in (kept, dropped):
        model(input_ids=piece, past_key_values=cache, use_cache=True, **_positions(model, position, piece.shape[1]))
        position += piece.shape[1]
    cache.crop(-dropped.shape[1])
    position -= dropped.shape[1]
    for piece in then.split(1, dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, **_positions(model, position, 1))
        position += 1
    return output.logits


def gradients(model: Any, inputs: Inputs) -> torch.Tensor:
    """Gradient with respect to the embeddings, relative to its largest entry."""
    with torch.enable_grad():
        embeddings = model.get_input_embeddings()(inputs.prompt).detach().requires_grad_(True)
        model(inputs_embeds=embeddings, use_cache=False).logits.float().pow(2).mean().backward()
    gradient = embeddings.grad
    return gradient / gradient.abs().max()


def hidden_states(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    found = model(input_ids=inputs.prompt, use_cache=False, output_hidden_states=True).hidden_states
    if found is None:
        raise AttributeError("the model has no hidden states to give")
    return list(found)


CHECKS: tuple[Check, ...] = (
    prefill_and_decode,
    left_padding,
    sampling,
    beam_search,
    rollback,
    gradients,
    hidden_states,
)


def _generate(model: Any, inputs: Inputs, **options: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(
        inputs.prompt,
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def _steps(model: Any, pieces: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    cache, position = None, 0
    for piece in pieces:
        past = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=piece, use_cache=True, **past, **_positions(model, position, piece.shape[1]))
        cache, position = output.past_key_values, position + piece.shape[1]
        yield output.logits


def _positions(model: Any, start: int, count: int) -> dict[str, torch.Tensor]:
    """Positions as generate() gives them; bamba without them starts again at 0 in each step."""
    forward = model.forward if not hasattr(model, "runner") else type(model).__mro__[2].forward
    if "position_ids" not in inspect.signature(forward).parameters:
        return {}
    return {"position_ids": torch.arange(start, start + count).unsqueeze(0)}


def _compare(check: Check, plain: Any, ours: Any, inputs: Inputs) -> Outcome:
    with torch.no_grad(), _rope_as_new(plain):
        try:
            expected = check(plain, inputs)
        except Exception as error:  # whatever transformers cannot do itself is the finding
            return Outcome(problem=_short(error), plain_cannot=True)
        try:
            return Outcome(difference=_difference(expected, check(ours, inputs)))
        except Exception as error:  # reported as the finding for this family
            return Outcome(problem=_short(error))


@contextmanager
def _rope_as_new(plain: Any) -> Iterator[None]:
    """A plain model with dynamic rotary embeddings remembers its longest sequence; each check starts without."""
    buffers = [(module, dict(module._buffers), dict(vars(module))) for module in plain.modules()]
    try:
        yield
    finally:
        for module, own, values in buffers:
            module._buffers.update(own)
            for name in values:
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, values[name])


def _difference(expected: Any, found: Any) -> float:
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    elif hasattr(expected, "sequences"):
        if not torch.equal(expected.sequences, found.sequences):
            raise DifferentTokensError(f"{int((expected.sequences != found.sequences).sum())} tokens differ")
        expected, found = list(expected.logits), list(found.logits)
    if len(expected) != len(found):
        raise AssertionError(f"{len(found)} tensors, not {len(expected)}")
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise AssertionError(f"shape {list(other.shape)}, not {list(one.shape)}")
        # allclose's measure: what exceeds a relative 1e-5 counts in full
        excess = (one.float() - other.float()).abs() - TOLERANCE * one.float().abs()
        largest = max(largest, float(excess.max()))
    return largest


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:140]}" if lines else type(error).__name__
