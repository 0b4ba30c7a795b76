"""A training batch under way in groups of rows: each is waited for by itself, and goes back by itself.

What follows the blocks can so be computed of one group while servers work on the others, and the way back of one
begins before the loss has been followed back to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

import torch

from nbrunner.client.adapter_grads import AdapterSums
from nbrunner.client.micro_batches import Batch, micro_batches
from nbrunner.client.request_backward import Summing
from nbrunner.client.requests import BlockRequests
from nbrunner.client.runner import Ahead, ForwardOutput, Gradients, Tape
from nbrunner.client.watch import current_watch, waiting, watching
from nbrunner.swarm.loop import CANCEL_GRACE, EngineLoop


class BatchPass:
    """`nbrunner.client.runner.GroupedPass` over a swarm. As a context: an error inside stops what is under way.

    Parameters
    ----------
    batch
        Its way through blocks ``[start, end)`` begins at once.
    adapter_grads, input_grad
        Which gradients will be wanted.
    """

    def __init__(
        self,
        engine: EngineLoop,
        requests: BlockRequests,
        batch: Batch,
        start: int,
        end: int,
        *,
        adapter_grads: bool,
        input_grad: bool,
    ) -> None:
        self._engine, self._requests, self._adapter = engine, requests, batch.adapter
        self._adapter_grads, self._input_grad = adapter_grads, input_grad
        groups = micro_batches(batch, requests.servers(start, end, batch.adapter))
        self.rows = [rows for rows, _ in groups]
        self._watch = current_watch()
        self._tapes: dict[int, Tape] = {}
        self._summing: Summing | None = None
        self._back: dict[int, Future[Gradients]] = {}
        self._forth: dict[int, Future[ForwardOutput]] = {
            index: engine.submit(
                requests.forward(
                    part.hidden,
                    start,
                    end,
                    mask=part.mask,
                    positions=part.positions,
                    capture=False,
                    edits=part.edits,
                    adapter=part.adapter,
                    ahead=Ahead(adapter_grads),
                )
            )
            for index, (_, part) in enumerate(groups)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            _stop([*self._forth.values(), *self._back.values()])

    def arriving(self) -> Iterator[int]:
        """The groups as they come back from the last block, each once, whichever is first."""
        left = {future: index for index, future in self._forth.items()}
        while left:
            with waiting(self._watch):
                index = left.pop(self._engine.wait_any(left))
            yield index

    def output(self, index: int) -> torch.Tensor:
        """What left the last block of a group that has come; it is not kept here."""
        output = self._forth.pop(index).result()
        self._tapes[index] = output.tape
        return output.hidden

    def send_back(self, index: int, grad: torch.Tensor) -> None:
        """Begin the way back of a group, from the gradient of its output. Does not wait."""
        if self._summing is None and self._adapter_grads and len(self.rows) > 1:
            self._summing = Summing()
        # autograd runs the way back of a GPU's graph in a thread of its own, which has no context of ours
        with watching(self._watch):
            self._back[index] = self._engine.submit(
                self._requests.backward(
                    self._tapes[index],
                    grad,
                    {},
                    adapter_grads=self._adapter_grads,
                    input_grad=self._input_grad,
                    summing=self._summing,
                )
            )

    def gradients(self) -> Gradients:
        """Of all groups, once each was sent back. Waits for them."""
        summing, self._summing = self._summing, None
        sums, inputs = AdapterSums(), []
        with self, waiting(self._watch):
            for index in range(len(self.rows)):
                answer = self._engine.wait(self._back.pop(index))
                sums.add(answer.adapters)
                if answer.hidden is not None:
                    inputs.append(answer.hidden)
            if summing is not None and self._adapter is not None:
                for found in self._engine.run(self._requests.take_sums(summing, self._adapter)):
                    sums.add(found)
                sums.fill(self._adapter)
        return Gradients(torch.cat(inputs) if self._input_grad else None, sums.found)


def _stop(running: Sequence[Future[Any]]) -> None:
    """Cancel what still runs, and give its clean-up a moment."""
    for one in running:
        one.cancel()
    wait(running, CANCEL_GRACE)
