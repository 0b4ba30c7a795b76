"""Shadows of the blocks that run elsewhere: modules with names and shapes, and no weights.

PEFT changes a model by looking for modules by name and putting its own in their place. A client has no such
modules: its blocks are on servers. So its list of layers, which in a forward pass has one member, also holds a
shadow of every block: the architecture's own layer, whose parameters are all one number seen through strides of
zero (4 bytes, any shape). PEFT finds ``model.layers.3.self_attn.q_proj``, wraps it, makes real parameters for what
is to be learned, and saves them under the names that every other program knows. Nobody ever runs a shadow.

Not on the meta device: PEFT puts its parameters where the weights of the wrapped module are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

REMOTE = "remote"
"""Name in the list of layers of the one member that runs."""


_MARK = "_nbrunner_hollow"


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor is one of a shadow's that still is a shape without content."""
    return getattr(tensor, _MARK, False) and tensor.untyped_storage().nbytes() <= tensor.element_size()


def hollow(layer: nn.Module) -> nn.Module:
    """Give up the content of a layer's parameters and buffers, in place; they may be on the meta device."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _marked(nn.Parameter(_shape_of(parameter), requires_grad=False))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _marked(_shape_of(buffer))
    return layer


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


T = TypeVar("T", bound=Tensor)


def _marked(tensor: T) -> T:
    setattr(tensor, _MARK, True)
    return tensor


@dataclass(frozen=True)
class Slot:
    """A place in a shadow where a module is, and the one that was there in the beginning.

    Attributes
    ----------
    block : int
    name : str
        Of the module, inside the block.
    """

    block: int
    name: str
    _siblings: Mapping[str, nn.Module | None]
    _key: str
    _original: nn.Module

    @property
    def put_there(self) -> nn.Module | None:
        """What somebody has put into the module's place; None if it is still there."""
        found = self._siblings.get(self._key)
        return None if found is self._original else found


class ShadowedLayers(nn.ModuleList):
    """The list of layers of a client's model: one to run, and by name a shadow of each block.

    What iterates over it, counts or indexes sees the one layer that runs. What goes by names (``named_modules``,
    ``get_submodule``) sees the shadows too. Their hollow parameters are never moved, converted or saved.

    Attributes
    ----------
    slots : list of Slot
        Every module of every shadow, in the order of the blocks.
    weights : list of (str, nn.Parameter)
        The hollow parameters by name.
    """

    def __init__(self, shadows: Sequence[nn.Module], remote: nn.Module) -> None:
        super().__init__()
        for index, shadow in enumerate(shadows):
            self._modules[str(index)] = hollow(shadow)
        self._modules[REMOTE] = remote
        self.slots = [slot for index in range(len(shadows)) for slot in self._slots_of(index)]
        self.weights = [(name, weight) for name, weight in self.named_parameters() if is_hollow(weight)]
        self.register_load_state_dict_post_hook(_expect_no_shadows)  # type: ignore[no-untyped-call]

    def _slots_of(self, index: int) -> Iterator[Slot]:
        layer = self._modules[str(index)]
        assert layer is not None  # noqa: S101 - put there by __init__
        yield Slot(index, "", self._modules, str(index), layer)
        for path, parent in layer.named_modules():
            for key, child in parent._modules.items():
                if child is not None:
                    yield Slot(index, f"{path}.{key}".lstrip("."), parent._modules, key, child)

    @property
    def shadows(self) -> list[nn.Module]:
        """One for each block of the whole model."""
        return [layer for name, layer in self._modules.items() if name != REMOTE and layer is not None]

    @property
    def hollow_names(self) -> frozenset[str]:
        """Names of the parameters and buffers without content, from the list on."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return frozenset(name for name, tensor in named if is_hollow(tensor))

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self._modules[REMOTE]])

    def __getitem__(self, index: Any) -> Any:
        return [self._modules[REMOTE]][index]

    def __contains__(self, module: object) -> bool:
        return module is self._modules[REMOTE]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShadowedLayers:
        # the parameters that PEFT has put there are moved like any other
        super()._apply(lambda tensor: tensor if is_hollow(tensor) else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As of any module, without the shadows."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in self.hollow_names:
            state.pop(prefix + name, None)
        return state


def _expect_no_shadows(layers: nn.Module, incompatible: Any) -> None:
    """What is not saved is not missing when a state is loaded."""
    if isinstance(layers, ShadowedLayers):
        names = tuple(layers.hollow_names)
        missing = [name for name in incompatible.missing_keys if not name.endswith(names)]
        incompatible.missing_keys[:] = missing
