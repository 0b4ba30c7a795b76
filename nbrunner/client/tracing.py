"""`trace`: run a text once and measure its hidden states, in the servers where they can, here where they cannot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.checkpoint import Checkpoint
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.measuring import measure_states
from nbrunner.client.edits import Edit, Positions, resolve_positions
from nbrunner.client.inputs import check_ids
from nbrunner.client.remote import current
from nbrunner.client.runner import BlockRunner, Pass
from nbrunner.client.swarm_runner import SwarmRunner
from nbrunner.client.tokenizers import load_tokenizer
from nbrunner.client.trace import Trace, TraceHop, token_id
from nbrunner.errors import UserInputError
from nbrunner.protocol.measure import MAX_TOP, Measure, measured_bytes
from nbrunner.protocol.tensors import DTYPE_NAMES

if TYPE_CHECKING:
    from nbrunner.client.model import DistributedModel

KEEP = ("norm", "similarity", "lens", "kl", "hidden")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def trace(
    model: DistributedModel,
    prompt: str | Sequence[int] | torch.Tensor,
    *,
    layers: Sequence[int] | None,
    positions: Positions,
    keep: Sequence[str],
    top_k: int,
    tokens: Sequence[int | str] | None,
    edits: Sequence[Edit],
    tokenizer: Any,
    limit: int,
) -> Trace:
    """See `nbrunner.client.model.DistributedModel.trace`."""
    began = time.perf_counter()
    if tokenizer is None:
        tokenizer = tokenizer_of(model)
    ids = _ids(model, tokenizer, prompt)
    blocks = model.runner.num_blocks
    places = resolve_positions(positions, ids.shape[1])
    chosen = [one if isinstance(one, int) else token_id(tokenizer, one) for one in tokens or ()]
    measure = _measure(model, layers, places, keep, top_k, chosen)
    there = _is_measured_there(model.runner, model.nbrunner_skeleton.hidden_shape, measure, ids.shape[1])
    if not there:
        _check_size(model, measure, ids.shape[1], limit)
    probe = (_ServersProbe if there else _Probe)(measure, blocks, limit)
    if isinstance(probe, _ServersProbe) and measure.needs_lens:
        probe.see_through(Lens.of(model))
    with torch.no_grad(), model._editing(edits), current.probing(probe):
        model.nbrunner_skeleton.base(input_ids=ids.to(model.device), use_cache=False)
    found = probe.measured(model)
    return Trace(
        model=model,
        model_name=_name_of(model),
        ids=ids[0].tolist(),
        tokens=[_text(tokenizer, one) for one in ids[0].tolist()],
        layers=list(measure.layers),
        positions=places,
        num_blocks=blocks,
        chosen=chosen,
        hops=_hops(probe.passes, blocks),
        bytes_sent=sum(one.bytes_sent for one in probe.passes),
        bytes_received=sum(one.bytes_received for one in probe.passes),
        seconds=time.perf_counter() - began,
        edits=tuple(edits),
        tokenizer=tokenizer,
        **_arrays(found),
    )


class _ServersProbe:
    """Runs the blocks in place of `RemoteLayers` and has the servers measure."""

    def __init__(self, measure: Measure, num_blocks: int, limit: int) -> None:
        self.passes: tuple[Pass, ...] = ()
        self._measure, self._num_blocks, self._limit = measure, num_blocks, limit
        self._lens: Lens | None = None
        self._found: dict[str, torch.Tensor] = {}

    def see_through(self, lens: Lens) -> None:
        """Where a server has none."""
        self._lens = lens

    def run(
        self,
        runner: BlockRunner,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        edits: Edits,
        adapter: SpanAdapter | None,
    ) -> torch.Tensor:
        assert isinstance(runner, SwarmRunner)  # noqa: S101 - `_is_measured_there` has looked
        lens, last = self._lens, self._num_blocks
        result = runner.forward(
            hidden.to("cpu", runner.dtype),
            0,
            last,
            mask=mask,
            positions=positions,
            edits=edits.within(1, last + 1) or None,
            adapter=adapter,
            measure=self._measure,
            lens=None if lens is None else lambda: lens,
            limit=self._limit,
        )
        self.passes, self._found = result.passes, result.measured or {}
        return result.hidden.to(hidden)

    def measured(self, model: DistributedModel) -> dict[str, torch.Tensor]:
        return self._found


class _Probe:
    """Runs the blocks in place of `RemoteLayers` and keeps what is to be measured here."""

    def __init__(self, measure: Measure, num_blocks: int, limit: int) -> None:
        self.passes: tuple[Pass, ...] = ()
        self._measure = measure
        self._num_blocks = num_blocks
        self._states: dict[int, torch.Tensor] = {}

    def run(
        self,
        runner: BlockRunner,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        edits: Edits,
        adapter: SpanAdapter | None,
    ) -> torch.Tensor:
        last = self._num_blocks
        between = edits.within(1, last)
        result = runner.forward(
            hidden.to("cpu", runner.dtype),
            0,
            last,
            mask=mask,
            positions=positions,
            capture=True,
            edits=between or None,
            adapter=adapter,
        )
        self.passes = result.passes
        needed = {layer - back for layer in self._measure.layers for back in (0, 1)} | {last}
        states = dict(enumerate(result.captured or ()))
        states[last] = edits.apply(result.hidden, last)
        self._states = {layer: state for layer, state in states.items() if layer in needed}
        return result.hidden.to(hidden)

    def measured(self, model: DistributedModel) -> dict[str, torch.Tensor]:
        lens = Lens.of(model) if self._measure.needs_lens else None
        final = None
        if self._measure.final:
            final = self._states[self._num_blocks][:, self._measure.positions]
        return measure_states(self._states, self._measure, lens=lens, final=final)


def _measure(
    model: DistributedModel,
    layers: Sequence[int] | None,
    positions: list[int],
    keep: Sequence[str],
    top_k: int,
    tokens: list[int],
) -> Measure:
    unknown = [one for one in keep if one not in KEEP]
    if isinstance(keep, str) or unknown:
        raise UserInputError(f"keep={keep!r}: give some of {', '.join(KEEP)}")
    last = model.runner.num_blocks
    wanted = list(range(last + 1)) if layers is None else [one + last + 1 if one < 0 else one for one in layers]
    if not wanted or wanted != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1] <= last:
        raise UserInputError(f"layers={layers!r}: give some of the states 0 to {last}, rising")
    lens = "lens" in keep or "kl" in keep
    if lens and model.get_output_embeddings() is None:
        raise UserInputError("a lens needs a head: load the model with AutoDistributedModelForCausalLM")
    if not 1 <= top_k <= MAX_TOP:
        raise UserInputError(f"top_k={top_k}: 1 to {MAX_TOP} tokens can be kept")
    if tokens and not lens:
        raise UserInputError("tokens are looked up in the lens: keep=(…, 'lens')")
    vocabulary = model.nbrunner_skeleton.base.get_input_embeddings().num_embeddings
    for one in tokens:
        if not 0 <= one < vocabulary:
            raise UserInputError(f"token {one} is outside the vocabulary of {vocabulary}")
    return Measure(
        layers=wanted,
        positions=positions,
        norm="norm" in keep,
        similarity="similarity" in keep,
        top=top_k if lens else 0,
        tokens=tokens,
        final="similarity" in keep or "kl" in keep,
        hidden="hidden" in keep,
    )


def _hops(passes: Sequence[Pass], num_blocks: int) -> list[TraceHop]:
    """Who ran what; the seconds of a second round over the same blocks are added to those of the first."""
    hops: list[TraceHop] = []
    for one in passes:
        if not hops or hops[-1].end < num_blocks:
            hops.append(TraceHop(one.peer, one.start, one.end, one.compute_seconds))
            continue
        for index, hop in enumerate(hops):
            if (hop.peer, hop.start, hop.end) == (one.peer, one.start, one.end):
                hops[index] = replace(hop, seconds=hop.seconds + one.compute_seconds)
    return hops


def _is_measured_there(runner: BlockRunner, hidden_shape: Sequence[int], measure: Measure, tokens: int) -> bool:
    """Whether servers measure: where they all can, and where not, if that moves fewer bytes than all the states."""
    if not isinstance(runner, SwarmRunner):
        return False
    if not measure.needs_lens or runner.has_lenses:
        return True
    name = DTYPE_NAMES[runner.dtype]
    asked = Measure(measure.layers, measure.positions, hidden=True)
    every = Measure(list(range(runner.num_blocks)), hidden=True)
    fewer = measured_bytes(asked, 1, len(measure.positions), hidden_shape, name)
    return 2 * fewer < measured_bytes(every, 1, tokens, hidden_shape, name)


def _check_size(model: DistributedModel, measure: Measure, tokens: int, limit: int) -> None:
    """`UserInputError` before anything is sent if it is more than the user may have meant."""
    shape, dtype = model.nbrunner_skeleton.hidden_shape, DTYPE_NAMES[model.runner.dtype]
    kept = Measure(layers=list(range(model.runner.num_blocks + 1)), hidden=True)
    moved = measured_bytes(kept, 1, tokens, shape, dtype)
    if moved > limit:
        raise UserInputError(
            f"this trace would move {moved / 1e6:.0f} MB ({tokens} tokens × {len(kept.layers)} states), over the "
            f"{limit / 1e6:.0f} MB allowed: trace a shorter text, or allow more with limit={moved}"
        )


def _ids(model: DistributedModel, tokenizer: Any, prompt: str | Sequence[int] | torch.Tensor) -> torch.Tensor:
    ids: torch.Tensor
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserInputError("to trace a text a tokenizer is needed: pass tokenizer=…, or token ids")
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        ids = torch.as_tensor(prompt)
        ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise UserInputError(
            f"one text of at least one token is traced at a time, not ids of shape {list(ids.shape)}"
        )
    check_ids(ids, model.nbrunner_skeleton.base.get_input_embeddings().num_embeddings)
    return ids


def tokenizer_of(model: Any) -> Any:
    """The tokenizer saved with the model's checkpoint, loaded once; None if there is none."""
    if not hasattr(model, "nbrunner_tokenizer"):
        checkpoint: Checkpoint | None = getattr(model, "nbrunner_checkpoint", None)
        files = [checkpoint.file(name) for name in _TOKENIZER_FILES] if checkpoint is not None else []
        folder = next((file.parent for file in files if file is not None), None)
        if folder is None:
            return None
        model.nbrunner_tokenizer = load_tokenizer(folder)
    return model.nbrunner_tokenizer


def _name_of(model: Any) -> str:
    checkpoint: Checkpoint | None = getattr(model, "nbrunner_checkpoint", None)
    return checkpoint.uid if checkpoint is not None else type(model).__name__


def _text(tokenizer: Any, token: int) -> str:
    return f"<{token}>" if tokenizer is None else str(tokenizer.decode([token]))


def _arrays(found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measured tensors ``[layers, 1, positions, ...]`` as the fields of a `Trace`."""
    arrays: dict[str, Any] = {name: tensor[:, 0] for name, tensor in found.items()}
    for name in set(arrays) - {"hidden"}:
        arrays[name] = arrays[name].numpy()
    renamed = {"top_log_probs": "top_probs", "token_log_probs": "chosen_probs"}
    for name, new in renamed.items():
        if name in found:
            arrays.pop(name)
            arrays[new] = found[name][:, 0].exp().numpy()
    if "token_ranks" in arrays:
        arrays["chosen_ranks"] = arrays.pop("token_ranks")
    return arrays
