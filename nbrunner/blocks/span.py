"""Running a contiguous range of blocks as the model's own outer forward would.

The outer model computes masks, rotary tables, alibi slopes and sliding windows. It is run over placeholders that
note what it gives each block (`nbrunner.blocks.outer`); then the blocks are run with that, one after the other, on
the hidden state from the wire. The outer model itself is fed zeros: what it does to embeddings (scale, norm,
positions) has been done once, on the client.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserInputError
from .adapters import Adapting, RowAdapters, SpanAdapter, Width, linear_widths
from .architecture import accepted_arguments, text_config
from .cache import SpanCache
from .checkpoint import Checkpoint
from .edits import Edits
from .host_copies import to_device
from .huge_pages import onto_huge_pages
from .loading import as_dtype, load_span_model
from .outer import LayerCall, OuterModel, PreparedStep
from .passes import KeptPass, Leaves, SavedBytes, SpanGradient, SpanOutput
from .ropes import remembering_ropes
from .span_inputs import check_cache, check_carry, check_differentiable, check_hidden, check_positions
from .thin_products import ThinProducts
from .wide_products import widen_products


class BlockSpan:
    """The blocks ``[start, end)`` of a model, loaded.

    One compute thread per span is assumed, because the model's list of layers is another one while the outer model
    runs; a second thread waits. The model is in evaluation mode and its parameters are frozen; `backward` computes
    gradients with respect to the inputs.

    Attributes
    ----------
    start, end, num_blocks : int
        The blocks held, and how many they are.
    dtype, device : torch.dtype, torch.device
        Of the weights; inputs are converted.
    hidden_shape : tuple of int
        What follows ``[batch, tokens]`` in a hidden state.
    architecture : Architecture
        See `nbrunner.blocks.examine`.
    config : PretrainedConfig
        Of the language model.
    nbytes : int
        Bytes of the parameters and buffers.
    quantization : str
        How the weights of linear layers are kept; ``none`` for as they are.
    """

    quantization = "none"

    def __init__(self, model: Any, architecture: Any, checkpoint: Checkpoint) -> None:
        self.model = model
        self.architecture = architecture
        self.checkpoint = checkpoint
        pruned = model.nbrunner_layers
        self.start, self.end = pruned.start, pruned.end
        self.num_blocks = self.end - self.start
        self.config = text_config(model.config)
        self.hidden_shape: tuple[int, ...] = architecture.hidden_shape
        first = next(pruned.originals[self.start].parameters())
        self.dtype: torch.dtype = _floating_dtype(pruned.originals[self.start])
        self.device: torch.device = first.device
        tensors = [*model.parameters(), *model.buffers()]
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._weight_pointers = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)
        self._pruned = pruned
        self._accepts = accepted_arguments(pruned.found.base)
        self._outer = OuterModel(pruned, architecture.result_parts)
        self._widths: dict[int, dict[str, Width]] = {}
        self._rope = remembering_ropes(model)
        self._thin = ThinProducts()
        self._lock = threading.Lock()
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        quantize: str = "none",
    ) -> BlockSpan:
        """Load blocks, reading (and, from a hub, downloading) only the tensors they need.

        Parameters
        ----------
        checkpoint : Checkpoint
            From `nbrunner.blocks.checkpoint.resolve_checkpoint`.
        start, end : int
            The blocks, ``0 <= start < end <= checkpoint.num_blocks``.
        dtype : torch.dtype or str, optional
            Default: what the model was saved in.
        device : torch.device or str
            Where the weights go.
        quantize : str
            ``none``, ``int8``, ``int4`` or ``nf4``: see `nbrunner.blocks.quantize`.

        Raises
        ------
        UnsupportedModelError
            When the family cannot be split; nothing has been read then.
        UserInputError
            For a range outside the model, or an unknown dtype.
        CheckpointError
            For weights that are missing or damaged.
        """
        if quantize == "none":
            model, architecture = load_span_model(checkpoint, start, end, dtype=dtype, device=device)
        else:
            from .quantize import load_quantized

            chosen = as_dtype(dtype, checkpoint.config)
            model, architecture = load_quantized(checkpoint, start, end, quantize, dtype=chosen, device=device)
        onto_huge_pages(model)
        span = cls(model, architecture, checkpoint)
        span.quantization = quantize
        return span

    def new_cache(self, start: int | None = None, end: int | None = None) -> SpanCache | None:
        """Empty caches for a session on this span, or on a part of it.

        Returns
        -------
        SpanCache or None
            None for a family that keeps no caches: each step then takes the whole sequence.
        """
        start, end = self._range(start, end)
        if not self.architecture.cached:
            return None
        return SpanCache(self.config, self._slots(start, end), start=start, end=end)

    def forward(
        self,
        hidden: Tensor,
        *,
        cache: SpanCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start: int | None = None,
        end: int | None = None,
        carry: Mapping[int, Tensor] | None = None,
        collect: bool = False,
        edits: Edits | None = None,
        adapters: RowAdapters = None,
        prepared: PreparedStep | None = None,
    ) -> SpanOutput:
        """Run blocks, without gradients.

        Parameters
        ----------
        hidden : Tensor
            ``[batch, tokens, *hidden_shape]`` that enters block `start`.
        cache : SpanCache, optional
            Of the session; the tokens are appended to it. A step may be run in several calls over consecutive parts
            of the cache's range: its position moves when its last block has run.
        attention_mask : Tensor, optional
            2D, bool or integer, ``[batch, past + tokens]``, 0 where there is padding; in this machine's memory.
        position_ids : Tensor, optional
            ``[batch or 1, tokens]``. Without them the architecture's own default, as in the plain model.
        start, end : int, optional
            Blocks to run; default: all of the span (of the cache, where one is given).
        carry : mapping of int to Tensor, optional
            ``SpanOutput.carry`` of the block before `start`; needed where ``carry_at(start)`` is not empty.
        collect : bool
            Also return what entered each block.
        edits : Edits, optional
            Made before a block runs, and seen in what is collected. Positions count from the session's beginning.
        adapters : SpanAdapter or sequence of SpanAdapter or None, optional
            For all rows, or one for each row; they must fit the blocks (`nbrunner.blocks.adapters.check_adapter`).
        prepared : PreparedStep, optional
            From `prepare`; used if it is for this step.

        Raises
        ------
        UserInputError
            For shapes, ranges or a missing carry that do not fit; the cache is unchanged then.
        """
        default = (cache.start, cache.end) if cache is not None else (self.start, self.end)
        start, end = self._range(default[0] if start is None else start, default[1] if end is None else end)
        self._check(hidden, cache, attention_mask, position_ids, start, end, carry)
        with self._lock, torch.inference_mode() if cache is not None else torch.no_grad():
            adapting = None if adapters is None else Adapting(adapters, hidden.shape[0])
            output = self._execute(
                hidden,
                cache,
                attention_mask,
                position_ids,
                start,
                end,
                carry or {},
                collect,
                edits,
                adapting,
                prepared,
            )
        if cache is not None and end == cache.end:
            cache.length += hidden.shape[1]
        return output

    def prepare(self, cache: SpanCache, rows: int) -> PreparedStep:
        """Run the outer model for a session's next step, if that will be one token of so many rows.

        It takes some 0.4 ms (of 2.3 that a step through four blocks of hidden 256 takes) and needs nothing of the
        step, so that a server can do it while it waits for one.

        Returns
        -------
        PreparedStep
            For `forward` or a `SpanStep`, of which it changes the time only; to be thrown away when anything else
            is done to the cache.
        """
        start, end = self._range(cache.start, cache.end)
        with self._lock, torch.inference_mode():
            for rope in self._rope:
                rope.restore()
            return PreparedStep(
                cache, cache.length, rows, self._outer_calls(rows, 1, cache, None, None, start, end)
            )

    def forward_joined(
        self,
        hidden: Tensor,
        cache: Any,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        carry: Mapping[int, Tensor],
        collect: bool,
        edits: Any,
        adapting: Adapting | None,
    ) -> SpanOutput:
        """Run steps of several sessions that `nbrunner.blocks.batching` has joined; nothing is checked here.

        ``cache`` is what the layers see as their cache. The sessions' own positions are for the caller to move.
        """
        start, end = cache.start, cache.end
        with self._lock, torch.inference_mode(), self._thin.turned():
            return self._execute(
                hidden, cache, attention_mask, position_ids, start, end, carry, collect, edits, adapting
            )

    def check_step(
        self,
        hidden: Tensor,
        cache: SpanCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        carry: Mapping[int, Tensor] | None = None,
    ) -> None:
        """`UserInputError` for what `forward` would refuse of a step through all blocks of its cache."""
        self._check(hidden, cache, attention_mask, position_ids, *self._range(cache.start, cache.end), carry)

    def trace(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start: int | None = None,
        end: int | None = None,
        carry: Mapping[int, Tensor] | None = None,
        collect: bool = False,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        adapter_grads: bool = False,
        limit: int | None = None,
    ) -> KeptPass:
        """Run blocks without a cache and keep the graph for `KeptPass.backward`; parameters as of `forward`.

        Parameters
        ----------
        adapter_grads : bool
            Whether gradients of the adapter's tensors will be wanted too.
        limit : int, optional
            Bytes that the graph may hold.

        Raises
        ------
        UserInputError
            For shapes that do not fit, and for weights through which there are no gradients.
        TooMuchToKeepError
            The graph is over the limit; nothing of it is left.
        """
        start, end = self._range(start, end)
        self._check(hidden, None, attention_mask, position_ids, start, end, carry)
        check_differentiable(self.model, self.device)
        saved = SavedBytes(self._weight_pointers, limit)
        with (
            self._lock,
            torch.inference_mode(False),
            torch.enable_grad(),
            nullcontext() if limit is None else saved.counting(),
            self._thin.turned(),
        ):
            leaves = Leaves.of(
                hidden, carry or {}, adapter, device=self.device, dtype=self.dtype, adapter_grads=adapter_grads
            )
            adapting = None if leaves.adapter is None else Adapting(leaves.adapter, hidden.shape[0])
            output = self._execute(
                leaves.hidden,
                None,
                attention_mask,
                position_ids,
                start,
                end,
                leaves.carry,
                collect,
                edits,
                adapting,
            )
        return KeptPass(leaves, output.hidden, output.carry, output.collected, saved.nbytes)

    def backward(
        self,
        hidden: Tensor,
        grad_output: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start: int | None = None,
        end: int | None = None,
        carry: Mapping[int, Tensor] | None = None,
        grad_carry: Mapping[int, Tensor] | None = None,
        edits: Edits | None = None,
        adapter: SpanAdapter | None = None,
        adapter_grads: bool = False,
    ) -> SpanGradient:
        """Gradients with respect to what entered the blocks; the forward is computed again, without a cache.

        Parameters
        ----------
        hidden, attention_mask, position_ids, start, end, carry, edits, adapter
            As they were passed to `forward`.
        grad_output : Tensor
            Gradient with respect to ``SpanOutput.hidden``, of its shape.
        grad_carry : mapping of int to Tensor, optional
            Gradients with respect to ``SpanOutput.carry`` that came back from the next span.
        adapter_grads : bool
            Also give the gradients of the adapter's tensors.

        Raises
        ------
        UserInputError
            For shapes that do not fit, and for weights through which there are no gradients.
        """
        if grad_output.shape != hidden.shape:
            raise UserInputError(
                f"the gradient has the shape {list(grad_output.shape)}, the hidden state {list(hidden.shape)}"
            )
        kept = self.trace(
            hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            start=start,
            end=end,
            carry=carry,
            edits=edits,
            adapter=adapter,
            adapter_grads=adapter_grads,
        )
        with self._lock:
            return kept.backward(grad_output, grad_carry)

    def choose_products(self) -> None:
        """Look how this machine multiplies few rows and many best; once, in the thread that will compute."""
        if not self._thin.layers:
            blocks = self._pruned.originals[self.start : self.end]
            self._thin = ThinProducts(blocks)
            widen_products(blocks)

    def linears(self, block: int) -> dict[str, Width]:
        """The linear modules inside a block that can be adapted: name → input and output features."""
        if block not in self._widths:
            self._widths[block] = linear_widths(self._pruned.originals[block])
        return self._widths[block]

    def block(self, index: int) -> nn.Module:
        """One of the blocks held, by its number in the model."""
        module: nn.Module = self._pruned.originals[index]
        return module

    def carry_at(self, block: int) -> frozenset[int]:
        """The parts of the previous block's result that a block takes besides the hidden state."""
        return self.architecture.carry[block] if 0 < block < len(self.architecture.carry) else frozenset()

    def __repr__(self) -> str:
        return f"<BlockSpan {self.checkpoint.uid} [{self.start}, {self.end}) {self.dtype} on {self.device}>"

    # -- checks ----------------------------------------------------------------------------------------------------

    def _range(self, start: int | None, end: int | None) -> tuple[int, int]:
        start = self.start if start is None else start
        end = self.end if end is None else end
        if not self.start <= start < end <= self.end:
            raise UserInputError(f"blocks [{start}, {end}) are not inside the span [{self.start}, {self.end})")
        return start, end

    def _check(
        self,
        hidden: Tensor,
        cache: SpanCache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        start: int,
        end: int,
        carry: Mapping[int, Tensor] | None,
    ) -> None:
        batch, tokens = check_hidden(hidden, self.hidden_shape)
        past = 0 if cache is None else check_cache(cache, batch, start, end)
        check_positions(attention_mask, position_ids, batch=batch, tokens=tokens, past=past)
        check_carry(start, self.carry_at(start), carry)

    # -- running ---------------------------------------------------------------------------------------------------

    def _slots(self, start: int, end: int) -> frozenset[int]:
        return frozenset().union(*self.architecture.slots[start:end])

    def _execute(
        self,
        hidden: Tensor,
        cache: SpanCache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        start: int,
        end: int,
        carry: Mapping[int, Tensor],
        collect: bool,
        edits: Edits | None,
        adapting: Adapting | None,
        prepared: PreparedStep | None = None,
    ) -> SpanOutput:
        hidden = to_device(hidden, self.device, self.dtype)
        rows, tokens = hidden.shape[:2]
        mask = _plain_mask(attention_mask, self.device)
        for rope in self._rope:
            rope.restore()
        part_of_cache = cache is not None and (start, end) != (cache.start, cache.end)
        with cache.only(self._slots(start, end)) if (cache is not None and part_of_cache) else nullcontext():
            if (
                prepared is not None
                and mask is None
                and position_ids is None
                and prepared.fits(cache, rows, tokens, start, end)
            ):
                calls = prepared.calls
            else:
                calls = self._outer_calls(rows, tokens, cache, mask, position_ids, start, end)
            with adapting.within(self._held(start, end)) if adapting is not None else nullcontext():
                return self._run_blocks(calls, hidden, cache, start, carry, collect, edits, adapting)

    def _outer_calls(
        self,
        rows: int,
        tokens: int,
        cache: SpanCache | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        start: int,
        end: int,
    ) -> list[LayerCall]:
        """What the outer model gives the blocks."""
        # Zeros, never the real tensor: some outer models scale their embeddings in place.
        zeros = torch.zeros(rows, tokens, self.architecture.embedding_width, dtype=self.dtype, device=self.device)
        arguments: dict[str, Any] = {"inputs_embeds": zeros}
        if "use_cache" in self._accepts:
            arguments["use_cache"] = cache is not None
        if "attention_mask" in self._accepts:
            arguments["attention_mask"] = mask
        if position_ids is not None and "position_ids" in self._accepts:
            arguments["position_ids"] = to_device(position_ids, self.device, torch.long)
        if cache is not None:
            arguments["past_key_values"] = cache
        return self._outer.calls(arguments, start, end)

    def _run_blocks(
        self,
        calls: Sequence[LayerCall],
        hidden: Tensor,
        cache: SpanCache | None,
        start: int,
        carry: Mapping[int, Tensor],
        collect: bool,
        edits: Edits | None,
        adapting: Adapting | None,
    ) -> SpanOutput:
        parts: Mapping[int, Tensor] = {part: to_device(tensor, self.device) for part, tensor in carry.items()}
        past = cache.length if cache is not None else 0
        collected: list[Tensor] = []
        for block, call in enumerate(calls, start):
            if edits is not None and edits.touches(block):
                hidden = edits.apply(hidden, block, past)
            if collect:
                collected.append(hidden)
            if adapting is not None:
                hidden = adapting.add_prompts(hidden, block, past)
            result = call.run(self._pruned.originals[block], hidden, parts)
            if isinstance(result, (tuple, list)):
                hidden = result[0]
                wanted = self.carry_at(block + 1)
                parts = {part: result[part] for part in wanted if part < len(result) and result[part] is not None}
            else:
                hidden, parts = result, {}
        return SpanOutput(hidden, dict(parts), collected)

    def _held(self, start: int, end: int) -> dict[int, nn.Module]:
        return {index: self._pruned.originals[index] for index in range(start, end)}


def _plain_mask(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The 2D mask as transformers takes it; None when it hides nothing: faster, and what ``generate`` does.

    It is looked at before it is moved: a look at what lies on a GPU waits for the GPU.
    """
    if mask is None or bool((mask != 0).all()):
        return None
    return to_device(mask, device, torch.long)


def _floating_dtype(layer: nn.Module) -> torch.dtype:
    tensors = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point()]
    return tensors[0].dtype if tensors else torch.float32
