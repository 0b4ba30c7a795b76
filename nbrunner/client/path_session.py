"""An inference session over a path: one session for each run of blocks, all of them always equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.client.journal import length_after
from nbrunner.client.path import BlockRun, Part
from nbrunner.client.runner import BlockRunner, RunnerSession
from nbrunner.errors import SessionError
from nbrunner.protocol.steps import CacheOp


@dataclass(frozen=True)
class PathStep:
    """`nbrunner.client.runner.StepResult` of all parts of a path together."""

    hidden: torch.Tensor
    captured: list[torch.Tensor] | None
    timings: list[Any] = field(default_factory=list)


class PathSession:
    """`nbrunner.client.runner.RunnerSession` over a path.

    A block that stands in the path twice has two caches. Modules between the blocks have none: they are given the
    tokens of a step, not those before. A step that fails anywhere leaves all parts as they were, because those that
    had taken it take it back.

    Parameters
    ----------
    inner
        Runs the model's blocks.
    parts
        Of the path.
    like
        Modules are given hidden states of its dtype, on its device.
    edits
        Of the path's states.
    adapter
        Of the model's blocks, by their own numbers.
    """

    def __init__(
        self,
        inner: BlockRunner,
        parts: Sequence[Part],
        like: torch.Tensor,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
    ) -> None:
        self.length = 0
        self._before = 0
        self._parts = tuple(parts)
        self._like = like
        self._edits = edits or Edits()
        self._sessions: dict[int, RunnerSession] = {
            part.place: inner.open_session(
                part.edits(edits), part.start, part.end, adapter and adapter.within(part.start, part.end)
            )
            for part in parts
            if isinstance(part, BlockRun)
        }
        self._closed = False

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each hop, in the path's order, with the model's own numbers of blocks."""
        return [hop for session in self._sessions.values() for hop in session.chain]

    @property
    def queued(self) -> str:
        """Where it waits for servers' memory just now, in words."""
        told = (getattr(session, "queued", "") for session in self._sessions.values())
        return " · ".join(line for line in told if line)

    @property
    def lost(self) -> list[tuple[str, str]]:
        """(PeerID, why) of every server that failed."""
        return [one for session in self._sessions.values() for one in getattr(session, "lost", ())]

    def step(
        self,
        hidden: torch.Tensor,
        *,
        ops: Sequence[CacheOp] = (),
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
    ) -> PathStep:
        """See `nbrunner.client.runner.RunnerSession.step`."""
        if self._closed:
            raise SessionError("this session is closed; open another with inference_session()")
        tokens, past = hidden.shape[1], length_after(self.length, ops)
        captured: list[torch.Tensor] = []
        timings: list[Any] = []
        done: list[RunnerSession] = []
        try:
            for part in self._parts:
                if isinstance(part, BlockRun):
                    session = self._sessions[part.place]
                    result = session.step(hidden, ops=ops, mask=mask, positions=positions, capture=capture)
                    done.append(session)
                    hidden = result.hidden
                    captured += result.captured or ()
                    timings += result.timings
                else:
                    hidden = self._edits.apply(hidden, part.place, past)
                    captured.append(hidden)
                    with torch.no_grad():
                        hidden = part(hidden.to(self._like)).to(hidden)
        except BaseException:
            for session in done:
                session.undo()
            raise
        self._before, self.length = self.length, past + tokens
        return PathStep(hidden, captured if capture else None, timings)

    def undo(self) -> None:
        """See `nbrunner.client.runner.RunnerSession.undo`."""
        for session in self._sessions.values():
            session.undo()
        self.length = self._before

    def close(self) -> None:
        """Free the caches."""
        self._closed = True
        for session in self._sessions.values():
            session.close()
