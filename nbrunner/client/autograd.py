"""Blocks on other machines as operations of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch.autograd.function import once_differentiable

from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lora import Learned
from nbrunner.client.micro_batches import Batch
from nbrunner.client.runner import BlockRunner, ForwardOutput, GroupedPass, Grouping
from nbrunner.errors import UserInputError


@runtime_checkable
class Composed(Protocol):
    """A runner of several parts, some of them in this process: autograd sees each by itself."""

    def run(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
        edits: Edits | None = None,
        learned: Learned | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]: ...

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted even where the input wants none."""


def run_blocks(
    runner: BlockRunner,
    hidden: torch.Tensor,
    start: int,
    end: int,
    *,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    capture: bool = False,
    edits: Edits | None = None,
    learned: Learned | None = None,
    follow: Callable[[slice, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Run blocks ``[start, end)`` without caches, differentiably.

    Parameters
    ----------
    hidden
        [batch, tokens, ...]; what comes back has its dtype and device, whatever the servers compute in.
    mask, positions
        As in `nbrunner.client.runner.RunnerSession.step`.
    capture
        Also return the input of every block, each differentiable too.
    edits
        Of states between the blocks, not of the first one, which the caller has in hand.
    learned
        Adapters of blocks; gradients reach their parameters.
    follow
        Called with rows and their output as groups of them come back, if the batch goes in several.

    Returns
    -------
    (torch.Tensor, list of torch.Tensor or None)
        Output of the last block, and the captured states.
    """
    if isinstance(runner, Composed):  # its parts are differentiable each, and so are the modules between them
        return runner.run(
            hidden, start, end, mask=mask, positions=positions, capture=capture, edits=edits, learned=learned
        )
    like, hidden = hidden, hidden.to("cpu", runner.dtype)
    learned = learned and learned.within(start, end)
    if torch.is_grad_enabled() and (hidden.requires_grad or (learned is not None and learned.trains)):
        tensors = () if learned is None else tuple(learned.tensors.values())
        if isinstance(runner, Grouping) and not capture:
            adapter = None if learned is None else learned.named().adapter
            begun = runner.begin(
                Batch(hidden.detach(), mask, positions, edits, adapter),
                start,
                end,
                adapter_grads=any(tensor.requires_grad for tensor in tensors),
                input_grad=hidden.requires_grad,
            )
            return _in_groups(begun, like, hidden, learned, tensors, follow), None
        output, *captured = _Blocks.apply(  # type: ignore[no-untyped-call]
            hidden, runner, start, end, mask, positions, capture, edits, learned and learned.named(), *tensors
        )
        # the first captured state is the input itself: autograd needs no detour for it
        return output.to(like), [like, *(state.to(like) for state in captured[1:])] if capture else None
    with torch.no_grad():
        result = runner.forward(
            hidden,
            start,
            end,
            mask=mask,
            positions=positions,
            capture=capture,
            edits=edits,
            adapter=None if learned is None else learned.named().adapter,
        )
    return result.hidden.to(like), result.captured and [state.to(like) for state in result.captured]


def no_gradient_through(hidden: torch.Tensor, output: torch.Tensor, learned: Learned | None = None) -> torch.Tensor:
    """``output`` of a cached step, which says so clearly if anybody wants a gradient from it."""
    tensors = () if learned is None else tuple(learned.tensors.values())
    result: torch.Tensor = _Cached.apply(output, hidden, *tensors)  # type: ignore[no-untyped-call]
    return result


def _in_groups(
    begun: GroupedPass,
    like: torch.Tensor,
    hidden: torch.Tensor,
    learned: Learned | None,
    tensors: tuple[torch.Tensor, ...],
    follow: Callable[[slice, torch.Tensor], None] | None,
) -> torch.Tensor:
    """The output of a batch, each group of which goes back as soon as its own gradient is known.

    In autograd's graph all groups hang on one operation at their entry, which waits for them, by a scalar each.
    """
    names = () if learned is None else tuple(learned.tensors)
    with begun:
        entries: tuple[torch.Tensor, ...] = _Entry.apply(hidden, begun, names, *tensors)  # type: ignore[no-untyped-call]
        outputs = list(entries)
        for index in begun.arriving():
            output: torch.Tensor = _Exit.apply(entries[index], begun, index)  # type: ignore[no-untyped-call]
            outputs[index] = output.to(like)
            if follow is not None and len(entries) > 1:
                follow(begun.rows[index], outputs[index])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        begun: GroupedPass,
        names: tuple[tuple[int, str], ...],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.begun, ctx.names = begun, names
        ctx.likes = [(tensor.device, tensor.dtype) for tensor in tensors]
        return tuple(torch.zeros(()) for _ in begun.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        found = ctx.begun.gradients()
        adapters = [
            found.adapters[block][name].to(*like) if wanted else None
            for (block, name), like, wanted in zip(ctx.names, ctx.likes, ctx.needs_input_grad[3:], strict=True)
        ]
        return (found.hidden if ctx.needs_input_grad[0] else None, None, None, *adapters)


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entry: torch.Tensor, begun: GroupedPass, index: int) -> torch.Tensor:
        ctx.begun, ctx.index = begun, index
        return begun.output(index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.begun.send_back(ctx.index, grad)
        return torch.zeros(()), None, None


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        runner: BlockRunner,
        start: int,
        end: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        capture: bool,
        edits: Edits | None,
        learned: Learned | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        result: ForwardOutput = runner.forward(
            hidden,
            start,
            end,
            mask=mask,
            positions=positions,
            capture=capture,
            edits=edits,
            adapter=None if learned is None else learned.adapter,
        )
        ctx.runner, ctx.start, ctx.tape = runner, start, result.tape
        ctx.learned = () if learned is None else tuple(learned.tensors)
        ctx.likes = [(tensor.device, tensor.dtype) for tensor in tensors]
        ctx.set_materialize_grads(False)
        return (result.hidden, *(state.clone() for state in result.captured or ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *captured: torch.Tensor | None) -> tuple[Any, ...]:
        used = {ctx.start + index: one for index, one in enumerate(captured) if one is not None}
        wants_input, wants_adapter = ctx.needs_input_grad[0], ctx.needs_input_grad[9:]
        if grad is None and not used:
            return (None,) * (9 + len(ctx.learned))
        found = ctx.runner.backward(ctx.tape, grad, used, adapter_grads=any(wants_adapter), input_grad=wants_input)
        adapters = [
            found.adapters[block][name].to(*like) if wanted else None
            for (block, name), like, wanted in zip(ctx.learned, ctx.likes, wants_adapter, strict=True)
        ]
        return (found.hidden if wants_input else None, *(None,) * 8, *adapters)


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        raise UserInputError(
            "gradients cannot flow through caches on servers: call the model with use_cache=False to train."
        )
