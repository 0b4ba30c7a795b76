"""Two spans in this process behind the client's own model class: everything but the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.checkpoint import Checkpoint
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.skeleton import load_client_model
from nbrunner.blocks.span import BlockSpan
from nbrunner.client.history import History
from nbrunner.client.micro_batches import Batch
from nbrunner.client.model import DistributedModel
from nbrunner.client.remote import RemoteLayers
from nbrunner.client.runner import ForwardOutput, Gradients, Segment, Tape
from nbrunner.protocol.steps import CacheOp


@dataclass(frozen=True)
class Step:
    hidden: torch.Tensor
    captured: list[torch.Tensor] | None
    timings: Sequence[Any] = ()


@dataclass
class LocalSession:
    """Caches on each span; rolls back by cropping where the caches can, and by replaying the session where not.

    Steps of one token are prepared before they come, as a server does.
    """

    parts: list[tuple[BlockSpan, int, int]]
    edits: Edits | None = None
    adapter: SpanAdapter | None = None
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.before: Any = None
        self.caches = self._new_caches()

    def _new_caches(self) -> list[Any]:
        return [span.new_cache(start, end) for span, start, end in self.parts]

    @property
    def length(self) -> int:
        return self.history.length

    @property
    def croppable(self) -> bool:
        return all(cache.croppable for cache in self.caches)

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        return [("here", start, end) for _, start, end in self.parts]

    def step(
        self,
        hidden: torch.Tensor,
        *,
        ops: Sequence[CacheOp] = (),
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
    ) -> Step:
        self.before = self.history.snapshot()
        self._before = self.history.snapshot()
        for op in ops:
            self._apply(op)
        self.history.append(hidden, mask, positions)
        return Step(*self._run(hidden, mask, positions, capture))

    def undo(self) -> None:
        self.history.restore(self.before)
        self.caches = self._new_caches()
        if self.history.length:
            self._run(self.history.hidden, self.history.mask, self.history.positions, False)

    def close(self) -> None:
        self.caches = []

    def _apply(self, op: CacheOp) -> None:
        dropped = self.history.length - op.count
        croppable = self.croppable
        self.history.apply([op])
        if op.kind == "crop" and not croppable:
            self.caches = self._new_caches()
            self._run(self.history.hidden, self.history.mask, self.history.positions, False)
            return
        for cache in self.caches:
            if op.kind == "crop":
                cache.crop(dropped)
            elif op.kind == "select":
                cache.select(op.rows)
            elif op.kind == "repeat":
                cache.repeat(op.count)
            else:
                cache.reset()

    def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, capture: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        captured: list[torch.Tensor] = []
        carry: Mapping[int, torch.Tensor] = {}
        for (span, _, _), cache in zip(self.parts, self.caches, strict=True):
            prepared = span.prepare(cache, len(hidden)) if cache.length and hidden.shape[1] == 1 else None
            output = span.forward(
                hidden,
                cache=cache,
                attention_mask=mask,
                position_ids=positions,
                carry=carry,
                collect=capture,
                edits=self.edits,
                adapters=self.adapter,
                prepared=prepared,
            )
            hidden, carry = output.hidden, output.carry
            captured += output.collected
        return hidden, captured if capture else None


class LocalBatch:
    """A batch whose rows come back one by one, the last first; run at once, so that nothing rounds differently."""

    def __init__(self, runner: LocalRunner, output: ForwardOutput, adapter_grads: bool) -> None:
        self.rows = [slice(row, row + 1) for row in range(len(output.hidden))]
        self._runner, self._output, self._adapter_grads = runner, output, adapter_grads
        self._grad = torch.zeros_like(output.hidden)

    def __enter__(self) -> LocalBatch:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def arriving(self) -> Iterator[int]:
        return reversed(range(len(self.rows)))

    def output(self, index: int) -> torch.Tensor:
        return self._output.hidden[self.rows[index]].clone()

    def send_back(self, index: int, grad: torch.Tensor) -> None:
        self._grad[self.rows[index]] = grad

    def gradients(self) -> Gradients:
        return self._runner.backward(self._output.tape, self._grad, {}, adapter_grads=self._adapter_grads)


class LocalRunner:
    """Runs a model's blocks on spans in this process; what a swarm is to the client, without a network."""

    def __init__(self, spans: list[BlockSpan]) -> None:
        self.spans = spans
        self.num_blocks = spans[-1].end
        self.dtype = spans[0].dtype
        self.sessions: list[LocalSession] = []

    def open_session(
        self,
        edits: Edits | None = None,
        start: int = 0,
        end: int | None = None,
        adapter: SpanAdapter | None = None,
    ) -> LocalSession:
        end = self.num_blocks if end is None else end
        session = LocalSession(self._parts(start, end, whole=True), edits, adapter)
        self.sessions.append(session)
        return session

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
    ) -> ForwardOutput:
        segments, captured = [], []
        carry: Mapping[int, torch.Tensor] = {}
        for span, first, last in self._parts(start, end, whole=not capture):
            segments.append(Segment(first, last, hidden, carry))
            output = span.forward(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                start=first,
                end=last,
                carry=carry,
                collect=True,
                edits=edits,
                adapters=adapter,
            )
            captured += output.collected
            hidden, carry = output.hidden, output.carry
        tape = Tape(tuple(segments), mask, positions, edits, adapter)
        return ForwardOutput(hidden, captured if capture else None, tape)

    def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
    ) -> Gradients:
        adapters: dict[int, dict[str, torch.Tensor]] = {}
        gradient = grad if grad is not None else torch.zeros_like(tape.segments[-1].hidden)
        carried: Mapping[int, torch.Tensor] = {}
        for segment in reversed(tape.segments):
            span = next(span for span in self.spans if span.start <= segment.start < span.end)
            found = span.backward(
                segment.hidden,
                gradient,
                attention_mask=tape.mask,
                position_ids=tape.positions,
                start=segment.start,
                end=segment.end,
                carry=segment.carry,
                grad_carry=carried,
                edits=tape.edits,
                adapter=tape.adapter and tape.adapter.within(segment.start, segment.end),
                adapter_grads=adapter_grads,
            )
            gradient, carried = found.hidden, found.carry
            adapters |= found.adapters
            if segment.start in captured:
                extra = captured[segment.start]
                gradient = gradient + (tape.edits.pull_back(extra, segment.start) if tape.edits else extra)
        return Gradients(gradient, adapters)

    def begin(self, batch: Batch, start: int, end: int, *, adapter_grads: bool, input_grad: bool) -> LocalBatch:
        output = self.forward(
            batch.hidden,
            start,
            end,
            mask=batch.mask,
            positions=batch.positions,
            edits=batch.edits,
            adapter=batch.adapter,
        )
        return LocalBatch(self, output, adapter_grads)

    def close(self) -> None:
        self.sessions = []

    def _parts(self, start: int, end: int, *, whole: bool) -> list[tuple[BlockSpan, int, int]]:
        """Spans' parts of ``[start, end)``; block by block where gradients of inner states may be asked for."""
        cuts = [(span, max(span.start, start), min(span.end, end)) for span in self.spans]
        cuts = [(span, first, last) for span, first, last in cuts if first < last]
        if whole:
            return cuts
        return [(span, block, block + 1) for span, first, last in cuts for block in range(first, last)]


def local_model(checkpoint: Checkpoint, split: int, task: str = "AutoModelForCausalLM") -> Any:
    """The client's model over the spans ``[0, split)`` and ``[split, end)``, in float32."""
    bounds = [(0, split), (split, checkpoint.num_blocks)]
    spans = [BlockSpan.load(checkpoint, start, end, dtype="float32") for start, end in bounds]
    model = load_client_model(
        checkpoint, task, lambda blocks, _: RemoteLayers(blocks), dtype="float32", mixins=(DistributedModel,)
    )
    model.requires_grad_(False)
    model.attach(LocalRunner(spans))
    return model
