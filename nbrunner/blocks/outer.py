"""The outer model's own forward over placeholders: what it gives each of its layers.

Masks, rotary tables, alibi slopes and sliding windows are the outer model's. None of it depends on the hidden
states (`nbrunner.blocks.examine` refuses architectures of which that is not true), so the outer model can be run
without its layers: before them, and for the next step of a session before anybody has sent it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architecture import Opaque, Skip
from .cache import SpanCache
from .pruning import PrunedLayers


class _EndOfRun(BaseException):
    """Ends a forward on purpose at its last layer; no error, so that no ``except Exception`` stops it."""


@dataclass(frozen=True)
class LayerCall:
    """What the outer model gives to one layer, with `Opaque` for what the layer before would have returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    @property
    def others(self) -> dict[str, Any]:
        """All but the hidden state, by name."""
        named = {f"argument {position}": value for position, value in enumerate(self.args[1:], 1)}
        return {
            **named,
            **{name: value for name, value in self.kwargs.items() if self.args or name != "hidden_states"},
        }

    def run(self, layer: nn.Module, hidden: Tensor, carry: Mapping[int, Tensor]) -> Any:
        """Call the layer; ``carry`` holds what it takes of the previous result besides the hidden state."""
        args = [carry.get(value.part) if isinstance(value, Opaque) else value for value in self.args]
        kwargs = {
            name: carry.get(value.part) if isinstance(value, Opaque) else value
            for name, value in self.kwargs.items()
        }
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        return layer(*args, **kwargs)


@dataclass(frozen=True)
class PreparedStep:
    """What the blocks of a session's cache are given at its next step of one token; see `BlockSpan.prepare`.

    It holds for as long as nothing is done to the cache.
    """

    cache: SpanCache
    length: int
    rows: int
    calls: list[LayerCall]

    def fits(self, cache: SpanCache | None, rows: int, tokens: int, start: int, end: int) -> bool:
        """Whether it is for this step, if the step has no padding and positions that count its tokens."""
        return (
            cache is self.cache
            and (rows, tokens) == (self.rows, 1)
            and (self.cache.length, start, end) == (self.length, self.cache.start, self.cache.end)
        )


class OuterModel:
    """A model's forward without its layers.

    Parameters
    ----------
    pruned
        The model's layers.
    parts
        Into how many parts the outer model unpacks the result of a layer.
    """

    def __init__(self, pruned: PrunedLayers, parts: int) -> None:
        self._found = pruned.found
        self._note: Callable[[int, LayerCall], None] | None = None
        self._end = 0
        self._placeholders = _View(
            [_Placeholder(layer, index, parts, self._called) for index, layer in enumerate(pruned.originals)]
        )

    def forward(self, arguments: Mapping[str, Any], end: int, note: Callable[[int, LayerCall], None]) -> None:
        """Run up to where it calls layer ``end - 1``, and tell ``note`` what each layer is given."""
        found = self._found
        self._note, self._end = note, end
        found.owner._modules[found.attribute] = self._placeholders
        try:
            found.base(**arguments)
        except _EndOfRun:
            pass
        finally:
            found.owner._modules[found.attribute] = found.layers
            self._note = None  # it may know a session's cache

    def calls(self, arguments: Mapping[str, Any], start: int, end: int) -> list[LayerCall]:
        """What the layers ``[start, end)`` are given."""
        found: list[LayerCall] = []
        self.forward(arguments, end, lambda index, call: found.append(call) if index >= start else None)
        if len(found) != end - start:
            raise RuntimeError(f"the model's forward ended before block {end - 1}")
        return found

    def _called(self, index: int, call: LayerCall) -> None:
        if self._note is not None:
            self._note(index, call)
        if index == self._end - 1:
            raise _EndOfRun


class _Placeholder(Skip):
    """Stands for a layer, and tells what it is given."""

    def __init__(self, like: nn.Module, index: int, parts: int, tell: Callable[[int, LayerCall], None]) -> None:
        super().__init__(like, index, parts)
        self._tell = tell

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._tell(self.index, LayerCall(args, kwargs))
        return super().forward()


class _View(nn.ModuleList):
    """A list of layers of which outer models take all, as in ``layers[:n]``: no new list for each (0.05 ms)."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)
