"""Runs a path: runs of consecutive blocks by who runs the model's blocks, the user's modules in this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.lora import Learned, differentiable
from nbrunner.client.autograd import run_blocks
from nbrunner.client.path import BlockRun, Entry, parts_of
from nbrunner.client.path_session import PathSession
from nbrunner.client.runner import BlockRunner, ForwardOutput, Gradients, Pass, Segment, Tape
from nbrunner.errors import SessionError, UserInputError
from nbrunner.protocol.measure import Measure


class PathRunner:
    """`nbrunner.client.runner.BlockRunner` over a path; its blocks are the places of the path.

    Parameters
    ----------
    inner
        Runs the model's blocks. It stays the model's: closing a path closes only the path's sessions.
    entries
        The path.
    like
        A parameter of the client's model: modules are given hidden states of its dtype, on its device.
    """

    def __init__(self, inner: BlockRunner, entries: Sequence[Entry], like: torch.Tensor) -> None:
        self.inner = inner
        self.entries = tuple(entries)
        self._like = like
        self._sessions: weakref.WeakSet[PathSession] = weakref.WeakSet()
        self._closed = False

    @property
    def num_blocks(self) -> int:
        """Places of the path."""
        return len(self.entries)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, in and out."""
        return self.inner.dtype

    @property
    def swarm(self) -> Any:
        """The swarm of the model; None when something else runs its blocks."""
        return getattr(self.inner, "swarm", None)

    def find_adapter(self, name: str) -> Learned:
        """An adapter that servers of the model's blocks have by name."""
        find = getattr(self.inner, "find_adapter", None)
        if find is None:
            raise UserInputError("adapters are served by name in swarms only")
        found: Learned = find(name)
        return found

    def served_adapters(self) -> list[Any]:
        """Those of the model's blocks."""
        return list(getattr(self.inner, "served_adapters", list)())

    @property
    def trains(self) -> bool:
        """Whether any module between the blocks has parameters that want gradients."""
        return any(
            parameter.requires_grad
            for entry in self.entries
            if isinstance(entry, nn.Module)
            for parameter in entry.parameters()
        )

    def open_session(
        self,
        edits: Edits | None = None,
        start: int = 0,
        end: int | None = None,
        adapter: SpanAdapter | None = None,
    ) -> PathSession:
        """See `nbrunner.client.runner.BlockRunner.open_session`: one session for each run of blocks.

        Adapters go by the numbers of the model's own blocks, wherever those stand in the path.
        """
        self._check_open()
        session = PathSession(self.inner, parts_of(self.entries, start, end), self._like, edits, adapter)
        self._sessions.add(session)
        return session

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
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """As `nbrunner.client.autograd.run_blocks`; gradients reach the modules' parameters too.

        Edits of all states ``[start, end)`` are made.
        """
        self._check_open()
        captured: list[torch.Tensor] = []
        for part in parts_of(self.entries, start, end):
            if edits is not None:
                hidden = edits.apply(hidden, part.place)
            if isinstance(part, BlockRun):
                hidden, states = run_blocks(
                    self.inner,
                    hidden,
                    part.start,
                    part.end,
                    mask=mask,
                    positions=positions,
                    capture=capture,
                    edits=part.edits(edits, after_first=True),
                    learned=learned,
                )
                captured += states or ()
            else:
                captured.append(hidden)
                hidden = part(hidden.to(self._like)).to(hidden)
        return hidden, captured if capture else None

    def forward(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        measure: Measure | None = None,
        lens: Callable[[], Lens] | None = None,
    ) -> ForwardOutput:
        """See `nbrunner.client.runner.BlockRunner.forward`. Nothing is measured on the way: capture states."""
        self._check_open()
        if measure is not None:
            raise UserInputError("servers measure no paths: take the states (output_hidden_states=True)")
        tape = Tape((Segment(start, end, hidden),), mask, positions, edits, adapter)
        captured: list[torch.Tensor] = []
        passes: list[Pass] = []
        with torch.no_grad():
            for part in parts_of(self.entries, start, end):
                if isinstance(part, BlockRun):
                    output = self.inner.forward(
                        hidden,
                        part.start,
                        part.end,
                        mask=mask,
                        positions=positions,
                        capture=capture,
                        edits=part.edits(edits),
                        adapter=adapter and adapter.within(part.start, part.end),
                    )
                    hidden = output.hidden
                    captured += output.captured or ()
                    passes += [_placed(one, part) for one in output.passes]
                else:
                    hidden = edits.apply(hidden, part.place) if edits else hidden
                    captured.append(hidden)
                    hidden = part(hidden.to(self._like)).to(hidden)
        return ForwardOutput(hidden, captured if capture else None, tape, tuple(passes))

    def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
    ) -> Gradients:
        """See `nbrunner.client.runner.BlockRunner.backward`; runs the path again, for its inner states."""
        (whole,) = tape.segments
        learned = None if tape.adapter is None else differentiable(tape.adapter, adapter_grads)
        with torch.enable_grad():
            entered = whole.hidden.detach().requires_grad_()
            output, states = self.run(
                entered,
                whole.start,
                whole.end,
                mask=tape.mask,
                positions=tape.positions,
                capture=bool(captured),
                edits=tape.edits,
                learned=learned,
            )
            ends = [] if grad is None else [(output, grad)]
            ends += [(states[place - whole.start], one) for place, one in captured.items()] if states else []
            tensors = dict(learned.tensors) if learned is not None and adapter_grads else {}
            wanted = [entered, *tensors.values()]
            if not ends:
                found: Sequence[torch.Tensor] = [torch.zeros_like(one) for one in wanted]
            else:
                found = torch.autograd.grad(
                    [end for end, _ in ends],
                    wanted,
                    [one for _, one in ends],
                    allow_unused=True,
                    materialize_grads=True,
                )
        adapters: dict[int, dict[str, torch.Tensor]] = {}
        for (block, name), one in zip(tensors, found[1:], strict=True):
            adapters.setdefault(block, {})[name] = one
        return Gradients(found[0], adapters)

    def close(self) -> None:
        """Close the path's sessions; the model's swarm goes on."""
        self._closed = True
        for session in list(self._sessions):
            session.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("this path was closed; make another with model.path([…])")


def _placed(one: Pass, run: BlockRun) -> Pass:
    shift = run.place - run.start
    return replace(one, start=one.start + shift, end=one.end + shift)
