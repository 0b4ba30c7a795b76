"""What comes out of a span: results, gradients, and a pass whose graph is kept until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserInputError
from .adapters import RowAdapters, SpanAdapter
from .host_copies import to_host


@dataclass(frozen=True)
class SpanOutput:
    """What comes out of a span.

    Attributes
    ----------
    hidden : Tensor
        ``[batch, tokens, *hidden_shape]``, the span's dtype.
    carry : dict of int to Tensor
        What the next block takes besides the hidden state, by the part of the result it is; empty for most
        families.
    collected : list of Tensor
        With ``collect=True``, what entered each block that ran, in order.
    """

    hidden: Tensor
    carry: dict[int, Tensor] = field(default_factory=dict)
    collected: list[Tensor] = field(default_factory=list)


def outputs_on_host(outputs: Sequence[SpanOutput]) -> list[SpanOutput]:
    """The same in this machine's memory; a GPU is waited for once."""
    tensors = to_host([one for out in outputs for one in (out.hidden, *out.carry.values(), *out.collected)])
    found = []
    for output in outputs:
        hidden, *rest = tensors[: 1 + len(output.carry) + len(output.collected)]
        tensors = tensors[1 + len(rest) :]
        carry = dict(zip(output.carry, rest[: len(output.carry)], strict=True))
        found.append(SpanOutput(hidden, carry, rest[len(carry) :]))
    return found


@dataclass(frozen=True)
class SpanGradient:
    """Gradients with respect to what entered a span: the hidden state, and the carry where there is one.

    Attributes
    ----------
    hidden : Tensor
    carry : dict of int to Tensor
    adapters : dict of int to dict of str to Tensor
        By block, then by the tensor's name (`nbrunner.blocks.adapters.BlockAdapter.tensors`).
    """

    hidden: Tensor
    carry: dict[int, Tensor] = field(default_factory=dict)
    adapters: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Leaves:
    """What gradients are wanted of, as leaves of a graph."""

    hidden: Tensor
    carry: dict[int, Tensor]
    adapter: RowAdapters
    adapter_tensors: dict[tuple[int, str], Tensor]

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        carry: Mapping[int, Tensor],
        adapter: SpanAdapter | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapter_grads: bool,
    ) -> Leaves:
        """Copies or views of these, on the span's device; those of integers stay as they are."""
        entering = hidden.detach().to(device, dtype).clone().requires_grad_(True)
        carried = {part: _differentiable(tensor, device) for part, tensor in carry.items()}
        found: dict[tuple[int, str], Tensor] = {}
        if adapter is not None and adapter_grads:
            blocks = {}
            for block, one in adapter.blocks.items():

                def leaf(name: str, tensor: Tensor, block: int = block) -> Tensor:
                    found[block, name] = tensor.detach().to(device).requires_grad_(True)
                    return found[block, name]

                blocks[block] = one.with_tensors(leaf)
            adapter = SpanAdapter(blocks, adapter.seed, adapter.first_row)
        return cls(entering, carried, adapter, found)


class TooMuchToKeepError(Exception):
    """The graph of a pass has more bytes than it may have."""


class SavedBytes:
    """Counts what autograd keeps of the operations inside, the model's own weights apart.

    Attributes
    ----------
    nbytes : int
        So far.
    """

    def __init__(self, weights: frozenset[int], limit: int | None) -> None:
        self.nbytes = 0
        self._seen = set(weights)
        self._limit = limit

    @contextmanager
    def counting(self) -> Iterator[None]:
        """`TooMuchToKeepError` as soon as it is over the limit."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        where = storage.data_ptr()
        if where not in self._seen:
            self._seen.add(where)
            self.nbytes += storage.nbytes()
            if self._limit is not None and self.nbytes > self._limit:
                raise TooMuchToKeepError
        return tensor


class KeptPass:
    """A finished forward pass with its graph: `backward` once, without running the blocks again.

    Attributes
    ----------
    output : SpanOutput
        Without the graph.
    nbytes : int
        Of what the graph holds, where that was counted.
    """

    def __init__(
        self,
        leaves: Leaves,
        hidden: Tensor,
        carry: dict[int, Tensor],
        collected: list[Tensor],
        nbytes: int = 0,
    ) -> None:
        self.nbytes = nbytes
        self._leaves, self._hidden, self._carry = leaves, hidden, carry
        self.output = SpanOutput(
            hidden.detach(),
            {part: tensor.detach() for part, tensor in carry.items()},
            [tensor.detach() for tensor in collected],
        )

    def backward(self, grad_output: Tensor, grad_carry: Mapping[int, Tensor] | None = None) -> SpanGradient:
        """Gradients; the graph is gone afterwards. `UserInputError` for a gradient of another shape."""
        if grad_output.shape != self._hidden.shape:
            raise UserInputError(
                f"the gradient has the shape {list(grad_output.shape)}, the hidden state {list(self._hidden.shape)}"
            )
        leaves = self._leaves
        outputs, gradients = [self._hidden], [grad_output.to(self._hidden.device, self._hidden.dtype)]
        for part, gradient in (grad_carry or {}).items():
            output = self._carry.get(part)
            if output is not None and output.requires_grad:
                outputs.append(output)
                gradients.append(gradient.to(output.device, output.dtype))
        carried = {part: tensor for part, tensor in leaves.carry.items() if tensor.requires_grad}
        wanted = [leaves.hidden, *carried.values(), *leaves.adapter_tensors.values()]
        with torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        adapters: dict[int, dict[str, Tensor]] = {}
        for (block, name), gradient_of, tensor in zip(
            leaves.adapter_tensors,
            found[1 + len(carried) :],
            leaves.adapter_tensors.values(),
            strict=True,
        ):
            adapters.setdefault(block, {})[name] = _or_zeros(gradient_of, tensor)
        by_part = zip(carried, found[1 : 1 + len(carried)], strict=True)
        return SpanGradient(
            _or_zeros(found[0], leaves.hidden),
            {part: gradient for part, gradient in by_part if gradient is not None},
            adapters,
        )


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _differentiable(tensor: Tensor, device: torch.device) -> Tensor:
    leaf = tensor.detach().to(device).clone()
    return leaf.requires_grad_(True) if leaf.is_floating_point() else leaf
