"""The module that stands where a model's decoder layers were, and the description of one forward pass it needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lora import Learned, learned_in
from nbrunner.blocks.shadows import ShadowedLayers
from nbrunner.client.autograd import Composed, no_gradient_through, run_blocks
from nbrunner.client.edits import Edit
from nbrunner.client.head_ahead import HeadAhead
from nbrunner.client.remote_cache import RemoteCache
from nbrunner.client.runner import BlockRunner
from nbrunner.errors import SessionError, UserInputError


@dataclass
class LayersCall:
    """What the outer model was asked, before it turned mask and positions into what its own layers want.

    Attributes
    ----------
    cache
        Where the tokens go, None for a pass without caches.
    cache_is_implicit
        Nobody asked for a cache: it is there because ``use_cache`` is the default.
    ids
        [batch, tokens], None for embeddings.
    mask
        [batch, past + tokens] bool, None when all true.
    positions
        [1 or batch, tokens], None if the caller left them to the model.
    capture, captured
        Whether the inputs of all blocks are wanted; they are put here.
    edits
        Of all states, the first and the last included.
    as_tuple
        The caller wants a plain tuple (``return_dict=False``).
    """

    cache: RemoteCache | None
    cache_is_implicit: bool
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    capture: bool
    captured: list[torch.Tensor] | None = None
    edits: Edits | None = None
    as_tuple: bool = False


class Probe(Protocol):
    """Runs all blocks of one pass in its own way."""

    def run(
        self,
        runner: BlockRunner,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        edits: Edits,
        adapter: SpanAdapter | None,
    ) -> torch.Tensor: ...


class CallState(threading.local):
    """What the current thread is in the middle of.

    Not a context variable: everything started in the engine inherits a copy of the context, so that a session's own
    tasks would keep the cache alive that is to close the session when nobody has it any more.

    Attributes
    ----------
    call
        The forward pass of a model's base that is running.
    caches
        Caches created in the ``generate`` call that is running.
    edits
        What the call that is running was told to edit.
    named
        The adapter that the call that is running was told to use by name, and whose runner found it.
    probe
        Who runs the blocks in this pass instead of the runner, to measure them.
    """

    call: LayersCall | None = None
    caches: list[RemoteCache] | None = None
    edits: Sequence[Edit] = ()
    named: tuple[BlockRunner, Learned] | None = None
    probe: Probe | None = None

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Let a probe run the blocks of the passes inside."""
        self.probe = probe
        try:
            yield
        finally:
            self.probe = None


current = CallState()


class RemoteLayers(nn.Module):
    """All decoder layers of a model as one module, run by others.

    Attributes
    ----------
    runner : BlockRunner or None
        Who runs them; None once the model is closed.
    inserted : nn.ModuleList or None
        Modules of the user's that a path has between the blocks: here for ``parameters()`` and ``train()``.
    head : HeadAhead or None
        Runs norm and head on groups of a batch as they come.
    prompts : nn.Module or None
        A prompt for each block (`nbrunner.client.deep_prompts.DeepPrompts`).
    omits_positions : bool
        Whether position ids that merely count the tokens may be left out, because the architecture counts the same.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.runner: BlockRunner | None = None
        self.inserted: nn.ModuleList | None = None
        # in a tuple: as a module of this one it would contain itself
        self._shadows: tuple[ShadowedLayers, ...] = ()
        self.head: HeadAhead | None = None
        self.prompts: nn.Module | None = None
        self.omits_positions = False

    def look_for_adapters(self, shadows: ShadowedLayers) -> None:
        """Where PEFT puts what is to be learned."""
        self._shadows = (shadows,)

    def learned(self) -> Learned | None:
        """The adapters that are active now; `UserInputError` for what cannot run on servers."""
        prompts: Any = self.prompts
        weight = prompts.weight if prompts is not None and prompts.enabled else None
        own = learned_in(self._shadows[0], weight) if self._shadows else None
        if current.named is None or current.named[0] is not self.runner:
            return own
        if own is not None:
            raise UserInputError(
                "an adapter of your own is active in this model, and adapter=… names one of the servers': use one "
                "of them (with model.disable_adapter(): …)"
            )
        return current.named[1]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes what the outer model gives its first layer, returns what leaves the last."""
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        call, runner = current.call, self.runner
        if runner is None or call is None:
            raise SessionError("this model has left its swarm; load it again with from_pretrained")
        positions = self._positions(call, hidden, kwargs.get("position_ids"))
        learned = self.learned()
        wants_gradient = torch.is_grad_enabled() and (
            hidden.requires_grad
            or (isinstance(runner, Composed) and runner.trains)
            or (learned is not None and learned.trains)
        )
        cache = call.cache
        if cache is not None and call.cache_is_implicit and wants_gradient:
            cache.leave_unfilled(
                "this cache is empty, because gradients were being computed. For gradients pass use_cache=False; "
                "to use the cache call the model under torch.no_grad()."
            )
            cache = None
        if current.probe is not None:
            edits = call.edits or Edits()
            adapter = None if learned is None else learned.named().adapter
            return current.probe.run(runner, edits.apply(hidden, 0), call.mask, positions, edits, adapter)
        edits, past = call.edits or Edits(), cache.get_seq_length() if cache is not None else 0
        # the ends of the chain are in our hands: gradients flow through these edits by themselves
        hidden = edits.apply(hidden, 0, past)
        between = edits.within(1, runner.num_blocks)
        output = self._run(runner, call, cache, hidden, positions, between, learned)
        output = edits.apply(output, runner.num_blocks, past)
        return no_gradient_through(hidden, output, learned) if wants_gradient and cache is not None else output

    def _run(
        self,
        runner: BlockRunner,
        call: LayersCall,
        cache: RemoteCache | None,
        hidden: torch.Tensor,
        positions: torch.Tensor | None,
        edits: Edits,
        learned: Learned | None,
    ) -> torch.Tensor:
        if cache is None:
            ahead = self.head.begin(hidden.shape[0]) if self.head is not None else None
            output, call.captured = run_blocks(
                runner,
                hidden,
                0,
                runner.num_blocks,
                mask=call.mask,
                positions=positions,
                capture=call.capture,
                edits=edits or None,
                learned=learned,
                follow=None if ahead is None else ahead.follow,
            )
            if ahead is not None:
                ahead.end()
            return output
        with torch.no_grad():
            output, captured = cache.step(
                hidden.to("cpu", runner.dtype),
                ids=call.ids,
                mask=call.mask,
                positions=positions,
                capture=call.capture,
                learned=learned,
            )
            output = output.to(hidden)
            call.captured = captured and [state.to(hidden) for state in captured]
        return output

    def _positions(
        self, call: LayersCall, hidden: torch.Tensor, layer_positions: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Position ids to send, or None where servers come to the same themselves."""
        batch, tokens = hidden.shape[:2]
        positions = call.positions
        if positions is None and call.mask is None:
            return None
        if positions is None:
            # what this architecture made of the mask; some steps with and some without would not fit together
            if isinstance(layer_positions, torch.Tensor) and layer_positions.ndim == 2:
                return layer_positions.cpu()
            return None
        if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != tokens:
            raise UserInputError(
                f"position_ids have shape {list(positions.shape)}; [1 or {batch}, {tokens}] is wanted"
            )
        positions = positions.cpu()
        if positions.shape[0] > 1 and bool((positions == positions[:1]).all()):
            positions = positions[:1]
        if call.mask is None and self.omits_positions and positions.shape[0] == 1:
            past = call.cache.get_seq_length() if call.cache is not None else 0
            if torch.equal(positions[0], torch.arange(past, past + tokens)):
                return None
        return positions
