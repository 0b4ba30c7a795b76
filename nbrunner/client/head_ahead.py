"""The head of one group of rows, computed while servers work on the other groups of the batch.

A model's forward runs its head on the whole batch, once all of it is back. Here norm and head are run on most of
it before, and the model's own call of the head, a moment later, is given what they made: nothing else of that
forward is different, whatever loss follows. The way back is shortened too, as some groups can set out when the head
has been followed back for them alone. Of a step of `mid` over two servers, 4 × 64 tokens, a fifth is the head with
its loss.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nbrunner.blocks.skeleton import Skeleton, instead_of_layers

LATE = 4
"""What has come is followed when no more than one part in so many is still out. Not as it comes: a product of 216
rows takes 0.46 ms for each and one of 72 takes 0.59, and until then servers of this machine can use its cores."""


class BatchAhead:
    """Norm and head of one batch, run on its groups as they come."""

    def __init__(self, base: Any, head: nn.Linear, rows: int) -> None:
        self._base, self._head = base, head
        self._rows = self._left = rows
        self._come: list[tuple[slice, Tensor]] = []
        self._states: Tensor | None = None
        self._pieces: list[tuple[slice, Tensor]] = []
        self.logits: Tensor | None = None
        self.unused = False

    def follow(self, rows: slice, states: Tensor) -> None:
        """Take what left the last block for a group, ``[rows, tokens, ...]``; run norm and head when it is time."""
        for joined, entry in self._due(rows, states):
            ids = torch.zeros(entry.shape[:2], dtype=torch.long, device=entry.device)
            # the embedding of nothing may have a dropout, which must not take random numbers from anybody
            with instead_of_layers(entry), torch.random.fork_rng([entry.device] if entry.is_cuda else []):
                normed: Tensor = self._base(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
            self._add(joined, normed)

    def end(self) -> None:
        """All groups have come: what was made of them is the head's, for its next call in this thread."""
        if self._pieces:
            _waiting.batch, self.unused = self, True

    def take(self, states: Tensor) -> Tensor | None:
        """The logits, once, if these are the states that left the base."""
        known, self._states = self._states, None
        rows, pieces = zip(*self._pieces, strict=True)
        self._pieces = []
        if known is None or known.shape != states.shape or not torch.equal(known, states):
            return None
        self.unused = False
        logits: Tensor = _Whole.apply(self, rows, *pieces)  # type: ignore[no-untyped-call]
        return logits

    def _due(self, rows: slice, states: Tensor) -> list[tuple[slice, Tensor]]:
        """Groups that are to be followed now, joined where they can."""
        self._come.append((rows, states))
        self._left -= len(states)
        if self._left > max(self._rows // LATE, len(states)):
            return []
        come, self._come = sorted(self._come, key=lambda one: one[0].start), []
        runs: list[list[tuple[slice, Tensor]]] = []
        for one in come:
            if runs and runs[-1][-1][0].stop == one[0].start:
                runs[-1].append(one)
            else:
                runs.append([one])
        return [(slice(run[0][0].start, run[-1][0].stop), torch.cat([states for _, states in run])) for run in runs]

    def _add(self, rows: slice, states: Tensor) -> None:
        """What left the base for some rows."""
        if self._states is None or self.logits is None:
            self._states = states.new_empty(self._rows, *states.shape[1:])
            self.logits = states.new_empty(self._rows, *states.shape[1:-1], self._head.out_features)
        self._states[rows] = states.detach()
        # .data: for autograd a tensor of its own, which the writing of the other pieces does not change; in a list,
        # because what goes into an operation as a tensor cannot come out of it
        place = self.logits.data[rows]
        piece: Tensor = _Piece.apply(states, self._head, [place])  # type: ignore[no-untyped-call]
        self._pieces.append((rows, piece))


class _Piece(torch.autograd.Function):
    """A head's product, written where the whole batch's logits are: they are a model's largest tensor."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: nn.Linear, place: list[Tensor]) -> Tensor:
        ctx.weight = head.weight
        (piece,) = place
        torch.mm(states.flatten(0, -2), head.weight.t(), out=piece.view(-1, head.out_features))
        return piece if head.bias is None else piece.add_(head.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: BatchAhead, rows: tuple[slice, ...], *pieces: Tensor) -> Tensor | None:
        ctx.rows = rows
        logits, batch.logits = batch.logits, None
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *(grad[rows] for rows in ctx.rows)


class _Waiting(threading.local):
    batch: BatchAhead | None = None


_waiting = _Waiting()


class AheadLinear(nn.Linear):
    """A head that need not compute what was computed ahead in this thread."""

    def forward(self, states: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` to ``[batch, tokens, vocabulary]``."""
        batch, _waiting.batch = _waiting.batch, None
        ready = batch.take(states) if batch is not None else None
        return ready if ready is not None else super().forward(states)


class HeadAhead:
    """What there is to run ahead in a model.

    Nothing is, once something was made that nobody used: whoever calls the model without its head, or the head on
    other states than those that left the base, would pay for it twice.
    """

    def __init__(self, model: Any, head: AheadLinear) -> None:
        skeleton: Skeleton = model.nbrunner_skeleton
        self._head, self._base = head, skeleton.base
        self._output_embeddings = model.get_output_embeddings
        self._last: BatchAhead | None = None
        self._useless = False

    @classmethod
    def of(cls, model: Any) -> HeadAhead | None:
        """None for a model whose head is not a plain linear layer."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if type(head) is nn.Linear:
            head.__class__ = AheadLinear  # a copy of it, as PEFT makes to train it, is one too
        return cls(model, head) if isinstance(head, AheadLinear) else None

    def begin(self, rows: int) -> BatchAhead | None:
        """For a batch of so many rows; None if it is better left alone."""
        self._useless = self._useless or (self._last is not None and self._last.unused)
        self._last = _waiting.batch = None
        if self._useless or not self._is_plain():
            return None
        self._last = BatchAhead(self._base, self._head, rows)
        return self._last

    def _is_plain(self) -> bool:
        """Hooks would be called for each group, and PEFT may have put something around the head."""
        head = self._head
        return not (
            head._forward_hooks
            or head._forward_pre_hooks
            or any(parameter.requires_grad for parameter in head.parameters())
            or torch.is_autocast_enabled(head.weight.device.type)
            or self._output_embeddings() is not head
        )
