"""The client's half of a model: the architecture's own class with all its layers replaced by one module.

This is what both sides share; who runs the layers is up to the module that the client puts in::

    class RemoteBlocks(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):   # what the outer model passes to its FIRST layer
            return hidden_states_after_the_last_layer         # a tensor of the same shape

    model = load_client_model(
        resolve_checkpoint("tiny"),                           # nbrunner.blocks.checkpoint
        "AutoModelForCausalLM",                               # or "AutoModel", "AutoModelForSequenceClassification"
        lambda num_blocks, like_layer: RemoteBlocks(),
        mixins=(DistributedMixin,),                           # classes to put before the architecture's own
    )
    skeleton = model.nbrunner_skeleton                        # base, remote, num_blocks, cache_argument, accepts

Only embeddings, final norm and head are read. Masks, positions, embedding scales, logit soft-caps, losses and
``generate`` are transformers' own code. What the outer model hands to its layers (4D masks, rotary tables) is of no
use to servers, which compute it themselves from the 2D mask, the positions and the caches' length: take those from
a forward pre-hook on ``skeleton.base``, whose arguments are named in ``skeleton.accepts``. Pass positions on as
they are, None included: the default differs between families, and servers compute the family's own.

The shape in which an outer model wants a layer's result (a tensor, or a tuple of two or three) is found by trying
once, after loading; `RemoteLayer` wraps the tensor accordingly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..errors import UserInputError
from .architecture import LayerList, Skip, accepted_arguments, find_layers, model_class, unsupported
from .checkpoint import Checkpoint
from .loading import as_dtype, load_part
from .pruning import changed_class, keep_present_ties
from .shadows import ShadowedLayers

_OTHER_INPUTS = ("pixel_values", "image", "video", "audio", "input_features")

LayersFactory = Callable[[int, nn.Module], nn.Module]
"""``factory(num_blocks, like_layer) -> module``; `like_layer` is the first, unloaded layer (on the meta device)."""


_given: ContextVar[Tensor | None] = ContextVar("nbrunner_given_state", default=None)


@contextmanager
def instead_of_layers(state: Tensor) -> Iterator[None]:
    """In here, in this thread, client models take `state` for what left their last layer, and run no layer."""
    token = _given.set(state)
    try:
        yield
    finally:
        _given.reset(token)


def layers_are_replaced() -> bool:
    """Whether we are inside of `instead_of_layers`."""
    return _given.get() is not None


class RemoteLayer(Skip):
    """The only member of the list of layers: runs the client's module, wraps its result as the outer model wants.

    What outer models read from a layer (``attention_type``) is read from the unloaded first layer.
    """

    def __init__(self, like: nn.Module, remote: nn.Module) -> None:
        super().__init__(like, 0)
        self.remote = remote
        self.result_style = 0  # 0: a tensor; n: a tuple of n
        self.probing = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _given.get()
        if given is not None:
            hidden: Tensor = given
        else:
            hidden = _first(args, kwargs) if self.probing else self.remote(*args, **kwargs)
        if self.result_style == 0:
            return hidden
        return (hidden,) + (None,) * (self.result_style - 1)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


@dataclass(frozen=True)
class Skeleton:
    """What a client finds at ``model.nbrunner_skeleton``.

    Attributes
    ----------
    base : PreTrainedModel
        The module whose ``forward`` runs the layers; hooks that want 2D masks and positions go here.
    layer : RemoteLayer
        The one member of its list of layers.
    layers : ShadowedLayers
        The list; by names it also holds a shadow of each block (`nbrunner.blocks.shadows`).
    remote : nn.Module
        What the factory returned.
    num_blocks : int
        How many layers it replaces.
    accepts : frozenset of str
        Names of the arguments of ``base.forward``.
    cached : bool
        Whether the family takes ``past_key_values``; without it every step sends the whole sequence.
    hidden_shape : tuple of int
        What follows ``[batch, tokens]`` in a hidden state.
    """

    base: Any
    layer: RemoteLayer
    layers: nn.ModuleList
    remote: nn.Module
    num_blocks: int
    accepts: frozenset[str]
    cached: bool
    hidden_shape: tuple[int, ...] = ()


def load_client_model(
    checkpoint: Checkpoint,
    task: str,
    factory: LayersFactory,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    mixins: tuple[type, ...] = (),
    shadows: bool = True,
) -> Any:
    """Build the architecture's own class for a task with its layers replaced, and load what is left of it.

    Parameters
    ----------
    checkpoint : Checkpoint
        From `nbrunner.blocks.checkpoint.resolve_checkpoint`.
    task : str
        ``"AutoModelForCausalLM"``, ``"AutoModel"`` or ``"AutoModelForSequenceClassification"``.
    factory : callable
        ``factory(num_blocks, like_layer)`` makes the module that stands for all layers.
    dtype : torch.dtype or str, optional
        Default: what the model was saved in.
    device : torch.device or str
        Of embeddings and head.
    mixins : tuple of type
        Classes that come before the architecture's own in the method resolution order.
    shadows : bool
        Whether PEFT is to find the blocks by their names (`nbrunner.blocks.shadows`).

    Returns
    -------
    PreTrainedModel
        In evaluation mode, with ``nbrunner_skeleton`` (a `Skeleton`) and the checkpoint's generation config.

    Raises
    ------
    UnsupportedModelError
        When the family cannot be split, before anything is read.
    CheckpointError
        When weights are missing. A new classification head is initialised, as transformers does.
    """
    architecture = checkpoint.architecture
    cls = model_class(checkpoint.config, task)
    built: list[tuple[LayerList, RemoteLayer]] = []

    def replace_layers(model: Any) -> None:
        found = find_layers(model)
        layer = RemoteLayer(found.layers[0], factory(len(found.layers), found.layers[0]))
        setattr(found.owner, found.attribute, nn.ModuleList([layer]))
        accepts = accepted_arguments(found.base)
        built.append((found, layer))
        model.nbrunner_skeleton = Skeleton(
            found.base,
            layer,
            nn.ModuleList(),
            layer.remote,
            len(found.layers),
            accepts,
            architecture.cached,
            tuple(architecture.hidden_shape),
        )
        keep_present_ties(model)

    model = load_part(
        changed_class(cls, replace_layers, mixins),
        checkpoint,
        dtype=as_dtype(dtype, checkpoint.config),
        device=device,
        new_weights=task == "AutoModelForSequenceClassification",
    )
    model.nbrunner_checkpoint = checkpoint
    # as from_pretrained leaves it: whoever has only the model finds its tokenizer by this
    model.name_or_path = model.config._name_or_path = checkpoint.source
    model.config._commit_hash = checkpoint.commit
    if hasattr(model, "generation_config"):
        saved = checkpoint.file("generation_config.json")
        if saved is not None:
            model.generation_config = GenerationConfig.from_pretrained(saved.parent)
    # after loading, which would look for the weights of whatever has a name
    found, layer = built[-1]
    layers = ShadowedLayers(list(found.layers) if shadows else [], layer)
    setattr(found.owner, found.attribute, layers)
    model.nbrunner_skeleton = replace(model.nbrunner_skeleton, layers=layers)
    _find_result_style(model.nbrunner_skeleton, model.config)
    _hand_masks_down(model, model.nbrunner_skeleton.base)
    return model


_mask_of_call: ContextVar[Any] = ContextVar("nbrunner_mask_of_call", default=None)


def _hand_masks_down(model: Any, base: Any) -> None:
    """Give the language model inside a model of several modalities the 2D mask that the whole model was given.

    Such models (gemma3, gemma4) make the masks of their layers themselves and pass a dict of them. Servers need the
    2D one. With images the dict would say more (image tokens see each other), so anything but text is refused.
    """
    names = list(inspect.signature(model.forward).parameters)
    inner = list(inspect.signature(base.forward).parameters)

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        other = [name for name, value in given.items() if name.startswith(_OTHER_INPUTS) and value is not None]
        if other:
            raise UserInputError(f"only text goes through the blocks of this model: leave out {', '.join(other)}")
        _mask_of_call.set(given.get("attention_mask"))

    def hand_down(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(inner, args, strict=False)), **kwargs}
        if isinstance(given.get("attention_mask"), dict):
            given["attention_mask"] = _mask_of_call.get()
        return (), given

    if base is not model and base is not getattr(model, model.base_model_prefix, None):
        model.register_forward_pre_hook(note, with_kwargs=True)
        base.register_forward_pre_hook(hand_down, with_kwargs=True)


@torch.no_grad()
def _find_result_style(skeleton: Skeleton, config: Any) -> None:
    """Try which shape of a layer's result the outer model takes.

    Tuples first: an outer model that wants a tuple would take the first ROW of a wrong tensor without complaint.
    """
    problem: Exception | None = None
    device = next(skeleton.base.parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    skeleton.layer.probing = True
    try:
        for style in (2, 1, 3, 0):
            skeleton.layer.result_style = style
            try:
                skeleton.base(input_ids=ids, use_cache=False)
            except (TypeError, AttributeError, ValueError) as error:
                problem = error
            else:
                return
    finally:
        skeleton.layer.probing = False
    raise unsupported(config, f"its forward takes no result of a layer that is known ({problem})") from problem
