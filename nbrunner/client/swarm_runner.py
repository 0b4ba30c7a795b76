"""Runs a model's blocks on a swarm: the synchronous face of sessions and requests in the engine's event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lora import Learned
from nbrunner.client.adapters import AdapterSender
from nbrunner.client.batch_pass import BatchPass
from nbrunner.client.candidates import SessionOptions
from nbrunner.client.connection import SwarmConnection
from nbrunner.client.measuring import MAX_ASKED_BYTES, LensSource, finish
from nbrunner.client.micro_batches import Batch
from nbrunner.client.named_adapters import NamedAdapters, Offer, ServedAdapter
from nbrunner.client.requests import BlockRequests
from nbrunner.client.runner import ForwardOutput, Gradients, Tape
from nbrunner.client.session import ChainSession
from nbrunner.client.travel import StepOutput
from nbrunner.client.watch import current_watch, waiting
from nbrunner.errors import UserInputError
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.steps import CacheOp
from nbrunner.swarm.loop import EngineLoop

CLOSE_SECONDS = 5.0


class SwarmRunner:
    """`nbrunner.client.runner.BlockRunner` over a swarm.

    Parameters
    ----------
    connection
        Joined; left when the runner is closed.
    model
        Uid of the checkpoint.
    num_blocks
        Of the whole model.
    dtype
        Of hidden states on the wire: what the servers compute in.
    options
        Which peers may be used, and how long to try.
    """

    def __init__(
        self,
        connection: SwarmConnection,
        model: str,
        num_blocks: int,
        dtype: torch.dtype,
        options: SessionOptions,
    ) -> None:
        self.swarm = connection
        self.model = model
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.options = options
        self._engine = EngineLoop.get()
        self._requests = BlockRequests(connection, model, dtype, options)
        self._named = NamedAdapters(connection, self._requests.streams, self._requests.adapters, model, num_blocks)
        self._sessions: weakref.WeakSet[SwarmSession] = weakref.WeakSet()
        self._closing: Future[None] | None = None

    @property
    def adapters(self) -> AdapterSender:
        """Who brings adapters to servers."""
        return self._requests.adapters

    def served_adapters(self) -> list[ServedAdapter]:
        """See `nbrunner.client.named_adapters.NamedAdapters`, as all of these."""
        return self._named.served()

    def find_adapter(self, name: str) -> Learned:
        """An adapter that servers have, by name or uid."""
        return self._engine.run(self._named.find(name))

    def offer_adapter(self, name: str, adapter: SpanAdapter) -> Offer:
        """Ask all servers of this model to serve an adapter."""
        for one in adapter.blocks.values():
            _ = one.digest  # here, because hashing takes its time
        return self._engine.run(self._named.offer(name, adapter))

    def withdraw_adapter(self, uid: str) -> list[str]:
        """Take an offer back."""
        return self._engine.run(self._named.withdraw(uid))

    def open_session(
        self,
        edits: Edits | None = None,
        start: int = 0,
        end: int | None = None,
        adapter: SpanAdapter | None = None,
    ) -> SwarmSession:
        """A session over blocks ``[start, end)``, by default all; servers are chosen with its first step."""
        end = self.num_blocks if end is None else end
        chain = ChainSession(
            self.swarm, self.model, start, end, self.options, edits, adapter, self._requests.adapters
        )
        session = SwarmSession(self._engine, chain)
        self._sessions.add(session)
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
        measure: Measure | None = None,
        lens: LensSource | None = None,
        limit: int = MAX_ASKED_BYTES,
    ) -> ForwardOutput:
        """See `nbrunner.client.runner.BlockRunner.forward` and `BlockRequests.forward`."""
        if measure is None:
            watch = current_watch()
            with waiting(watch):
                output = self._engine.run(
                    self._requests.forward(
                        hidden,
                        start,
                        end,
                        mask=mask,
                        positions=positions,
                        capture=capture,
                        edits=edits,
                        adapter=adapter,
                    )
                )
            # autograd runs the way back of a GPU's graph in a thread of its own, which has no context of ours
            return replace(output, tape=replace(output.tape, watch=watch))
        if capture:
            raise UserInputError("states are captured or measured, not both: ask the measure for hidden")
        output, parts, request = self._engine.run(
            self._requests.measured(
                hidden,
                start,
                end,
                measure,
                mask=mask,
                positions=positions,
                edits=edits,
                adapter=adapter,
                limit=limit,
            )
        )
        # in this thread, not in the engine's: looking through a lens takes its time
        return replace(output, measured=finish(parts, request, lens))

    def begin(self, batch: Batch, start: int, end: int, *, adapter_grads: bool, input_grad: bool) -> BatchPass:
        """See `nbrunner.client.runner.Grouping`."""
        return BatchPass(
            self._engine, self._requests, batch, start, end, adapter_grads=adapter_grads, input_grad=input_grad
        )

    @property
    def has_lenses(self) -> bool:
        """Whether servers that can look through a lens hold all the blocks."""
        return self._requests.lenses(0, self.num_blocks)

    def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
    ) -> Gradients:
        """See `nbrunner.client.runner.BlockRunner.backward`."""
        with waiting(tape.watch):
            return self._engine.run(
                self._requests.backward(tape, grad, captured, adapter_grads=adapter_grads, input_grad=input_grad)
            )

    def release(self) -> None:
        """Close sessions and leave the swarm, without waiting for it."""
        if self._closing is None and not self._engine.loop.is_closed():
            self._closing = self._engine.submit(self._close())

    def close(self) -> None:
        """Close sessions, leave the swarm, and wait until it is done."""
        self.release()
        if self._closing is not None:
            try:
                self._closing.result(CLOSE_SECONDS)
            except (TimeoutError, CancelledError):
                return  # a peer that does not answer must not keep anybody from going

    async def _close(self) -> None:
        await asyncio.gather(*(session.chain_session.close() for session in list(self._sessions)))
        await self._requests.close()
        await self.swarm.leave()


class SwarmSession:
    """`nbrunner.client.runner.RunnerSession` over a `ChainSession`."""

    def __init__(self, engine: EngineLoop, chain: ChainSession) -> None:
        self.chain_session = chain
        self._engine = engine

    @property
    def length(self) -> int:
        """Tokens of finished steps."""
        return self.chain_session.length

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each hop."""
        return self.chain_session.chain

    @property
    def croppable(self) -> bool:
        """Whether its servers can drop the last tokens of their caches."""
        return self.chain_session.croppable

    @property
    def queued(self) -> str:
        """Where it waits for a server's memory just now, in words."""
        return self.chain_session.queued

    @property
    def lost(self) -> list[tuple[str, str]]:
        """(PeerID, why) of every server that failed, oldest first."""
        return list(self.chain_session.stats.lost)

    def step(
        self,
        hidden: torch.Tensor,
        *,
        ops: Sequence[CacheOp] = (),
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
    ) -> StepOutput:
        """See `ChainSession.step`. An interrupt cancels it, and leaves the session as it was."""
        return self._engine.run(
            self.chain_session.step(hidden, ops=ops, mask=mask, positions=positions, capture=capture)
        )

    def undo(self) -> None:
        """See `ChainSession.undo`."""
        self._engine.run(self.chain_session.undo())

    def close(self) -> None:
        """Free the caches on the servers, without waiting for it."""
        if not self.chain_session.closed and not self._engine.loop.is_closed():
            self._engine.submit(self.chain_session.close())
