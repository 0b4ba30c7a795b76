"""Parts of sessions in the compute thread: checked, run (several sessions' in one pass, or in pieces), recorded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.batching import SpanStep
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.passes import SpanOutput, outputs_on_host
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.steps import Step
from nbrunner.server.inputs import CARRY, Inputs, take_inputs
from nbrunner.server.session_memory import SessionMemory
from nbrunner.server.session_state import PartPlan

if TYPE_CHECKING:
    from nbrunner.server.host import Host


@dataclass(eq=False)
class PartWork:
    """A part on its way through the compute thread.

    Attributes
    ----------
    applied, started, computed
        How far it has come; it may fail in between. Once it has started, a failure leaves the caches useless.
    captured
        ``[blocks, rows, tokens, …]`` once it is computed, if the part asked for it.
    """

    host: Host
    memory: SessionMemory
    part: Step
    plan: PartPlan
    tensors: Mapping[str, RawTensor]
    ended: Callable[[], bool]
    edits: Edits | None = None
    adapter: SpanAdapter | None = None
    applied: bool = field(default=False, init=False)
    started: bool = field(default=False, init=False)
    computed: bool = field(default=False, init=False)
    captured: torch.Tensor | None = field(default=None, init=False)
    held_bytes: int = field(default=0, init=False)
    _inputs: Inputs | None = field(default=None, init=False)
    _done: int = field(default=0, init=False)
    _states: list[torch.Tensor] = field(default_factory=list, init=False)

    @property
    def rows(self) -> int:
        return self.plan.batch

    @property
    def tokens(self) -> int:
        """Tokens × rows that are left."""
        return (self.plan.end - self.plan.begin - self._done) * self.plan.batch

    @property
    def joins(self) -> Hashable | None:
        """Parts of equal value can run in one pass. Whether they really do is for the span to say."""
        cache = self.memory.cache
        if self.host.batcher.layout == "serial" or not self.tokens:
            return None
        return (cache.start, cache.end, self.tokens // self.rows if self.host.batcher.layout == "padded" else 0)

    def next_step(self, tokens: int) -> SpanStep | None:
        """The next so many tokens × rows as a step of the span; None if there is nothing to run.

        Nothing of the session is changed before everything received has been checked.

        Raises
        ------
        BadPeerDataError, UserInputError
            Before or after `applied`, but with the caches as they were.
        """
        if self.ended():
            self._done = self.plan.end - self.plan.begin
            return None
        if not self.applied:
            self._begin()
        inputs = self._inputs
        if inputs is None:
            return None
        count = max(tokens // self.rows, 1)
        window = slice(self._done, self._done + count)
        prepared, self.memory.prepared = self.memory.prepared, None
        upto = self.plan.begin + self._done + inputs.hidden[:, window].shape[1]
        return SpanStep(
            inputs.hidden[:, window],
            self.memory.cache,
            None if inputs.mask is None else inputs.mask[:, :upto],
            None if inputs.positions is None else inputs.positions[:, window],
            {index: tensor[:, window] for index, tensor in inputs.carry.items()},
            self.part.capture,
            self.edits,
            self.adapter,
            prepared,
        )

    def _begin(self) -> None:
        plan = self.plan
        if plan.begin < plan.end:
            self._inputs = take_inputs(
                self.tensors,
                self.host.form,
                position=self.part.position,
                begin=plan.begin,
                positions_from=self.part.positions_from,
            )
        for op in plan.ops:
            self.memory.apply(op)
        self.applied = True
        inputs = self._inputs
        if inputs is None:
            self.held_bytes = self.memory.nbytes
        else:
            self.host.span.check_step(
                inputs.hidden,
                self.memory.cache,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                carry=inputs.carry,
            )

    def prepare_next(self, rested: bool) -> None:
        """Have ready what the next step needs besides its hidden states, if it is like this one.

        A decode step is: one token after another, without padding and with positions that count them.

        Parameters
        ----------
        rested
            The processor has forgotten what it did.
        """
        one_token = self.plan.end - self.plan.begin == 1
        if self.computed and one_token and not self.plan.ops and not {"mask", "positions"} & self.tensors.keys():
            self.memory.prepared = self.host.span.prepare(self.memory.cache, self.rows)
            if rested and self.host.rehearsal is not None:
                self.host.rehearsal.run()

    def record(self, output: SpanOutput) -> None:
        """What came out of the step, in this machine's memory."""
        outputs = {"hidden": output.hidden.to(self.host.span.dtype)}
        outputs.update({f"{CARRY}{index}": tensor for index, tensor in output.carry.items()})
        self.memory.transcript.append(outputs)
        self._done += output.hidden.shape[1]
        if self.part.capture:
            self._states.append(torch.stack(output.collected))
        if not self.tokens:
            self.computed = True
            self.captured = torch.cat(self._states, 2) if self._states else None
        self.held_bytes = self.memory.nbytes


def run_parts(host: Host, chosen: Sequence[tuple[PartWork, int]]) -> list[Exception | None]:
    """Run some tokens × rows of each part, in one pass where it can be. In the compute thread.

    Returns
    -------
    list of Exception or None
        For each part, what went wrong with it. Whether it is finished, `PartWork.tokens` says.
    """
    problems: list[Exception | None] = [None] * len(chosen)
    steps: dict[int, SpanStep] = {}
    with torch.inference_mode():
        for index, (work, tokens) in enumerate(chosen):
            try:
                step = work.next_step(tokens)
            except Exception as error:  # noqa: BLE001 - for its session to answer
                problems[index] = error
            else:
                if step is not None:
                    steps[index] = step
        outcomes = _fetched(host.batcher.forward(list(steps.values())))
        for index, outcome in zip(steps, outcomes, strict=True):
            chosen[index][0].started = True
            if isinstance(outcome, Exception):
                problems[index] = outcome
                continue
            try:
                chosen[index][0].record(outcome)
            except Exception as error:  # noqa: BLE001 - for its session to answer
                problems[index] = error
    return problems


def _fetched(outcomes: Sequence[SpanOutput | Exception]) -> Sequence[SpanOutput | Exception]:
    """The same in this machine's memory. What went wrong on a GPU during the pass comes out here, for all steps."""
    outputs = [one for one in outcomes if isinstance(one, SpanOutput)]
    try:
        arrived = iter(outputs_on_host(outputs))
    except Exception as error:  # noqa: BLE001 - for their sessions to answer
        return [error if isinstance(one, SpanOutput) else one for one in outcomes]
    return [next(arrived) if isinstance(one, SpanOutput) else one for one in outcomes]
