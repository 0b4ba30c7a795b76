"""Can this architecture be split into blocks, and what has to cross a border between two of them?

`examine` builds the model without its layers, runs its own outer forward over placeholders and looks at what each
layer would have been given. No weights are read. Where the answer is no, the family is refused by name with the
reason, before anything is downloaded or loaded: a split that would compute something else must never start.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .architecture import (
    AbsentModuleError,
    Opaque,
    accepted_arguments,
    cache_slots,
    config_for,
    model_class,
    text_config,
    unsupported,
)
from .cache import SpanCache
from .outer import LayerCall, OuterModel
from .pruning import pruned_class, quiet_transformers

_BATCH, _TOKENS = 2, 3
_ANY_FAILURE = (
    ImportError,
    OSError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    LookupError,
    AssertionError,
)

# Families whose split is wrong in a way that running the outer forward cannot show. One line each, with the reason;
# tests/test_blocks_examine.py holds every entry to it.
DECLARED_UNSUPPORTED: dict[str, str] = {
    "recurrent_gemma": "its recurrent layers keep the state of a session in themselves, where sessions would mix",
}


@dataclass(frozen=True)
class Architecture:
    """What a span and a client have to know about a model beyond its config.

    Attributes
    ----------
    model_type : str
        transformers' name of the family.
    model_class : type
        Its ForCausalLM class.
    num_blocks : int
        Decoder layers.
    layers_path : str
        Dotted name of their list, such as ``"model.layers"``.
    outside : frozenset of str
        Modules outside the layers that run before or between them (rotary embeddings, position tables, ...): what a
        server needs besides its blocks.
    embedding_width : int
        Width of the token embeddings, which may differ from what enters block 0.
    hidden_shape : tuple of int
        Shape of what enters a block after ``[batch, tokens]``: ``(hidden,)``, or ``(streams, hidden)``.
    result_parts : int
        Into how many parts the outer model unpacks the result of a layer.
    carry : tuple of frozenset of int
        For each block, the parts (1, 2, ...) of the previous block's result that it takes besides the hidden state.
    slots : tuple of frozenset of int
        For each block, the cache slots it writes.
    cached : bool
        Whether the family keeps caches at all (openai-gpt does not).
    """

    model_type: str
    model_class: Any
    num_blocks: int
    layers_path: str
    outside: frozenset[str]
    embedding_width: int
    hidden_shape: tuple[int, ...]
    result_parts: int
    carry: tuple[frozenset[int], ...]
    slots: tuple[frozenset[int], ...]
    cached: bool


def examine(config: Any) -> Architecture:
    """Look at an architecture.

    Parameters
    ----------
    config : PretrainedConfig
        Of the whole model, as ``AutoConfig.from_pretrained`` gives it.

    Raises
    ------
    UnsupportedModelError
        When it cannot be split into blocks, with the reason.
    """
    with torch.random.fork_rng(devices=[]):
        return _examine(_Key(config))


class _Key:
    """A config that can be remembered: two that say the same are the same."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._text = f"{type(config).__module__}.{type(config).__name__} {config.to_json_string()}"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text


@lru_cache(maxsize=16)
def _examine(key: _Key) -> Architecture:
    _refuse_by_config(key.config)
    cls = model_class(key.config)
    config = config_for(cls, key.config)
    model = _without_layers(cls, config)
    pruned = model.nbrunner_layers
    base = pruned.found.base
    arguments = accepted_arguments(base)
    _refuse_by_structure(config, cls, model, arguments)
    slots = tuple(cache_slots(layer, index) for index, layer in enumerate(pruned.originals))
    width = getattr(model.get_input_embeddings(), "embedding_dim", None) or text_config(config).hidden_size
    cached = "past_key_values" in arguments

    ran: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    zeros = torch.zeros(_BATCH, _TOKENS, width)
    calls, parts = _run_over_placeholders(model, zeros, slots if cached else None)
    for hook in hooks:
        hook.remove()
    noise, _ = _run_over_placeholders(model, torch.randn(zeros.shape), slots if cached else None, parts)
    carry = tuple(_carried(config, index, call, noise[index]) for index, call in enumerate(calls))
    _refuse_if_later_tokens_are_seen(config, calls)
    hidden = calls[0].hidden
    if not isinstance(hidden, Tensor) or tuple(hidden.shape[:2]) != (_BATCH, _TOKENS):
        raise unsupported(config, "what enters its layers is not one tensor with a row per sequence and token")
    return Architecture(
        model_type=key.config.model_type,
        model_class=cls,
        num_blocks=pruned.num_blocks,
        layers_path=pruned.found.path,
        outside=frozenset(ran),
        embedding_width=width,
        hidden_shape=tuple(hidden.shape[2:]),
        result_parts=parts,
        carry=carry,
        slots=slots,
        cached=cached,
    )


def _refuse_by_config(config: Any) -> None:
    if config.model_type in DECLARED_UNSUPPORTED:
        raise unsupported(config, DECLARED_UNSUPPORTED[config.model_type])
    if getattr(config, "is_encoder_decoder", False):
        raise unsupported(config, "it has an encoder; only decoder-only language models are served")
    language = text_config(config)
    shared = getattr(language, "num_kv_shared_layers", None) or 0  # what releases before kv_sharing_modes have
    if shared > 0 or "reuse" in (getattr(language, "kv_sharing_modes", None) or []):
        raise unsupported(config, "some of its layers read the keys and values that other layers computed")


def _without_layers(cls: Any, config: Any) -> Any:
    """The model with its outer modules really built (randomly initialised) and no layers."""
    try:
        with quiet_transformers():
            model = pruned_class(cls, 0, 0).from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict={}, dtype=torch.float32
            )
    except _ANY_FAILURE as error:
        raise unsupported(config, f"it cannot be built without its layers ({_first_line(error)})") from error
    return model.eval()


def _refuse_by_structure(config: Any, cls: Any, model: Any, arguments: frozenset[str]) -> None:
    if "inputs_embeds" not in arguments:
        raise unsupported(config, "its forward takes no embeddings")
    if "past_key_values" not in arguments and "use_cache" in arguments:
        other = next((name for name in ("cache_params", "state") if name in arguments), "its own modules")
        raise unsupported(config, f"it keeps the state of a session in {other}, outside transformers' cache")
    path = model.nbrunner_layers.found.path
    with torch.device("meta"):
        whole = cls(copy.deepcopy(config))
    tied = getattr(whole, "all_tied_weights_keys", None) or {}
    inside = re.compile(rf"^{re.escape(path)}\.(\d+)\.")
    for target, source in tied.items():
        here, there = inside.match(target), inside.match(source)
        if (here or there) and (not here or not there or here[1] != there[1]):
            raise unsupported(config, f"its layers share weights ({target} is {source})")


def _run_over_placeholders(
    model: Any, embeddings: Tensor, slots: tuple[frozenset[int], ...] | None, parts: int | None = None
) -> tuple[list[LayerCall], int]:
    """Run the outer forward over layers that only note what they are given.

    Returns the notes, and into how many parts the outer model unpacks a result.
    """
    problem: Exception | None = None
    for tried in (2, 3, 4) if parts is None else (parts,):
        calls: list[tuple[int, LayerCall]] = []
        try:
            _run_once(model, embeddings, slots, tried, calls)
        except AbsentModuleError as error:
            reason = f"its outer forward needs more than the hidden states ({error})"
            raise unsupported(model.config, reason) from error
        except _ANY_FAILURE as error:
            problem = error
        order = [index for index, _ in calls]
        if order == list(range(model.nbrunner_layers.num_blocks)):
            return [call for _, call in calls], tried
        if not order:
            reason = f"its forward cannot be given embeddings and a cache ({_first_line(problem)})"
            raise unsupported(model.config, reason) from problem
        if len(order) > model.nbrunner_layers.num_blocks or order != list(range(len(order))):
            raise unsupported(model.config, "its forward does not run its layers once each, in order")
    raise unsupported(
        model.config, f"its forward does more between layers than hand over hidden states ({_first_line(problem)})"
    ) from problem


def _run_once(
    model: Any,
    embeddings: Tensor,
    slots: tuple[frozenset[int], ...] | None,
    parts: int,
    calls: list[tuple[int, LayerCall]],
) -> None:
    pruned = model.nbrunner_layers
    kwargs: dict[str, Any] = {"inputs_embeds": embeddings.clone()}
    if "attention_mask" in accepted_arguments(pruned.found.base):
        padded = torch.ones(embeddings.shape[:2], dtype=torch.long)
        padded[0, 0] = 0
        kwargs["attention_mask"] = padded
    if slots is not None:
        cache = SpanCache(text_config(model.config), frozenset().union(*slots), start=0, end=pruned.num_blocks)
        kwargs |= {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        OuterModel(pruned, parts).forward(
            kwargs, pruned.num_blocks, lambda index, call: calls.append((index, call))
        )


def _carried(config: Any, index: int, call: LayerCall, with_noise: LayerCall) -> frozenset[int]:
    """Which parts of the previous layer's result this layer takes besides the hidden state."""
    if index and not (isinstance(call.hidden, Opaque) and (call.hidden.layer, call.hidden.part) == (index - 1, 0)):
        raise unsupported(config, f"layer {index} does not get what layer {index - 1} returned")
    parts = set()
    for name, value in call.others.items():
        if name == "input_ids":
            raise unsupported(config, "its layers read the token ids")
        if isinstance(value, Opaque):
            if value.layer != index - 1:
                raise unsupported(config, f"layer {index} reads a result of layer {value.layer}")
            if value.part:
                parts.add(value.part)
                continue
            raise unsupported(
                config, f"its outer forward keeps the result of layer {value.layer} for layer {index}"
            )
        if any(isinstance(leaf, Opaque) for leaf in _leaves(value)):
            raise unsupported(config, f"its layers read the results of several earlier layers ({name})")
        if not _same(value, with_noise.others.get(name)):
            raise unsupported(
                config, f"its layers read the token embeddings, or something computed from them ({name})"
            )
    return frozenset(parts)


def _refuse_if_later_tokens_are_seen(config: Any, calls: list[LayerCall]) -> None:
    """An encoder's mask (bert, ...) lets a token see those after it, which no cache can give.

    The placeholder run pads the first token of row 0, so that outer models make a mask at all; row 1 has none. A
    mask of padding alone says nothing: openai-gpt's layers hide later tokens themselves.
    """
    for call in calls:
        for value in call.others.values():
            for mask in _leaves(value):
                if not (isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2:] == (_TOKENS, _TOKENS)):
                    continue
                visible = mask if mask.dtype == torch.bool else mask > -1e4
                ones = visible[-1, 0, 0]  # of the first query; a bool mask may say what is hidden instead
                if bool(visible.any()) and not bool(visible.all()) and bool(ones[0] == ones[-1]):
                    raise unsupported(config, "its layers see later tokens, as an encoder's do")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _same(first: Any, second: Any) -> bool:
    ours, theirs = _leaves(first), _leaves(second)
    return len(ours) == len(theirs) and all(
        torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else True
        for one, other in zip(ours, theirs, strict=True)
    )


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
