"""The cache that transformers sees: no tensors, only a length and the changes the servers have still to make."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import Cache

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lora import Learned
from nbrunner.client.edits import Edit
from nbrunner.client.runner import BlockRunner, RunnerSession, StepResult
from nbrunner.client.step_times import StepTime
from nbrunner.errors import SessionError, UserInputError
from nbrunner.protocol.steps import CacheOp


class _Holder:
    """The session apart from the cache, so that a finalizer of the cache can close it."""

    def __init__(self) -> None:
        self.session: RunnerSession | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True
        session, self.session = self.session, None
        if session is not None:
            session.close()


def session_opener(runner: BlockRunner) -> Callable[[Edits | None, SpanAdapter | None], RunnerSession]:
    """Opens sessions over all blocks of a runner."""
    return lambda edits, adapter: runner.open_session(edits, adapter=adapter)


class RemoteCache(Cache):  # type: ignore[misc]
    """Caches that live on the servers of a chain.

    ``generate`` and the models ask it how long it is, and tell it to crop, to pick rows or to forget; it notes that
    and sends it along with the next step. Its session opens with the first step, and closes when the cache is
    closed or garbage collected.

    Attributes
    ----------
    ids : torch.Tensor or None
        [rows, length], the tokens in the caches; None if any entered as embeddings.
    planned_edits : tuple of Edit
        What to edit, as the user said it.
    edits : Edits or None
        The same once the prompt's length is known: fixed with the first step.
    timings : deque
        What the servers said about the last steps, oldest first.
    last_step : StepTime or None
        The same of the last one, with the time it took seen from here.
    """

    def __init__(
        self,
        open_session: Callable[[Edits | None, SpanAdapter | None], RunnerSession],
        num_blocks: int,
        *,
        length: int = 0,
        planned_edits: Sequence[Edit] = (),
    ) -> None:
        super().__init__(layers=[])
        self._open_session = open_session
        self._num_blocks = num_blocks
        self._length = length
        self._rows = 0
        self._ops: list[CacheOp] = []
        self._repeat_next = 1
        self._unfilled = ""
        self._learned: Hashable = None
        self.ids: torch.Tensor | None = None
        self.planned_edits = tuple(planned_edits)
        self.edits: Edits | None = None
        self.timings: deque[Sequence[Any]] = deque(maxlen=4096)
        self.last_step: StepTime | None = None
        self._holder = _Holder()
        self._finalizer = weakref.finalize(self, self._holder.close)

    # -- what transformers asks ----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._length > 0

    def activate_past_recording(self) -> None:
        """Nothing to do: a session can always be rolled back (see `crop`)."""

    def is_recording_past(self, layer_idx: int) -> bool:
        return True

    def __len__(self) -> int:
        return self._num_blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        raise SessionError(
            "caches on servers cannot be copied. To go on twice from the same prompt, use a session and set its "
            "position back, or give the prompt to each call."
        )

    def __reduce__(self) -> str:
        raise SessionError("caches on servers cannot be pickled")

    def __repr__(self) -> str:
        state = "closed" if self._holder.closed else f"{self._length} tokens"
        return f"<RemoteCache {state} in {self._num_blocks} blocks>"

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_blocks

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._num_blocks

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._num_blocks

    @property
    def batch_size(self) -> int:
        return self._rows or -1

    # -- changes, sent with the next step ------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens. Transformers counts them below zero: ``crop(-3)`` drops three."""
        if tokens_to_remove > 0:
            raise UserInputError(
                f"crop({tokens_to_remove}): the number of tokens to drop is given below zero, as transformers does"
            )
        self.keep(max(self._length + tokens_to_remove, 0))

    def keep(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length >= self._length:
            return
        if length == 0:
            self.reset()
            return
        self._length = length
        self.ids = None if self.ids is None else self.ids[:, :length]
        if self._ops and self._ops[-1].kind == "crop":
            self._ops.pop()
        self._ops.append(CacheOp("crop", length))

    def reset(self) -> None:
        self._length, self._rows, self._repeat_next = 0, 0, 1
        self.ids = None
        self._ops = [CacheOp("reset")] if self._holder.session is not None else []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        rows = [int(row) for row in indices.tolist()]
        if not self._length or rows == list(range(self._rows)):
            return
        self._rows = len(rows)
        self.ids = None if self.ids is None else self.ids[rows]
        self._ops.append(CacheOp("select", rows=rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, neighbours together."""
        if not self._length or repeats == 1:
            return
        self._rows *= repeats
        self.ids = None if self.ids is None else self.ids.repeat_interleave(repeats, dim=0)
        self._ops.append(CacheOp("repeat", repeats))

    def expect_copies(self, copies: int) -> None:
        """The first step's rows will come as groups of ``copies`` equal ones (beams): one of each is computed."""
        self._repeat_next = copies

    def leave_unfilled(self, reason: str) -> None:
        """No step will fill this cache; whoever uses it is told why."""
        self._unfilled = reason

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def session(self) -> RunnerSession | None:
        """The session, once a step has opened it."""
        return self._holder.session

    @property
    def closed(self) -> bool:
        return self._holder.closed

    def step(
        self,
        hidden: torch.Tensor,
        *,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        capture: bool,
        learned: Learned | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Append tokens; parameters as in `RunnerSession.step`, and ``ids`` [rows, tokens] if they are known.

        ``learned`` is what adapts the blocks now; it must be the same at every step.
        """
        session = self._ready(hidden, learned)
        length, tokens = self._length, hidden.shape[1]
        copies = self._copies(hidden, mask, positions) if length == 0 else 1
        began = time.perf_counter()
        result: StepResult = session.step(
            hidden[::copies],
            ops=tuple(self._ops),
            mask=None if mask is None else mask[::copies],
            positions=positions if positions is None or positions.shape[0] == 1 else positions[::copies],
            capture=capture,
        )
        # only a step that has arrived counts: one that was interrupted leaves everything as it was
        self._ops = [CacheOp("repeat", copies)] if copies > 1 else []
        self._repeat_next = 1
        self._rows, self._length = hidden.shape[0], length + tokens
        self._remember(ids, length)
        self.timings.append(result.timings)
        self.last_step = StepTime(began, time.perf_counter(), result.timings)
        captured = result.captured
        if copies > 1:
            grown = result.hidden.repeat_interleave(copies, dim=0)
            return grown, captured and [state.repeat_interleave(copies, dim=0) for state in captured]
        return result.hidden, captured

    def close(self) -> None:
        """Free the caches on the servers; the cache cannot be used any more."""
        self._finalizer()

    def _ready(self, hidden: torch.Tensor, learned: Learned | None) -> RunnerSession:
        if self._unfilled:
            raise SessionError(self._unfilled)
        if self._holder.closed:
            raise SessionError("this cache is closed: its generate() call or session has ended")
        if self._length and self._rows != hidden.shape[0]:
            raise UserInputError(f"the cache holds {self._rows} rows, the input has {hidden.shape[0]}")
        signature = None if learned is None else learned.signature
        if self._holder.session is None:
            between = self.edits and self.edits.within(1, self._num_blocks)
            adapter = None if learned is None else learned.copied()
            for one in adapter.blocks.values() if adapter is not None else ():
                _ = one.digest  # here, because hashing takes its time
            self._holder.session = self._open_session(between or None, adapter)
            self._learned = signature
        elif signature != self._learned:
            raise SessionError(
                "these caches were begun with another adapter, or the adapter has been trained since: begin new "
                "ones (generate without session, or open another with model.inference_session())"
            )
        return self._holder.session

    def _copies(self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> int:
        copies = self._repeat_next
        if copies == 1 or hidden.shape[0] % copies:
            return 1
        for tensor in (hidden, mask, positions):
            if tensor is None or tensor.shape[0] == 1:
                continue
            groups = tensor.view(-1, copies, *tensor.shape[1:])
            if not bool((groups == groups[:, :1]).all()):
                return 1
        return copies

    def _remember(self, ids: torch.Tensor | None, length: int) -> None:
        if ids is None or (length and self.ids is None):
            self.ids = None
        elif self.ids is None or not length:
            self.ids = ids.cpu().clone()
        else:
            self.ids = torch.cat([self.ids, ids.cpu()], dim=1)
