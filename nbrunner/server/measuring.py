"""A forward pass that is measured on its way: the states stay here, what was asked about them goes out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits, take_edits
from nbrunner.blocks.measuring import join_layers, measure_states
from nbrunner.errors import PeerRefusedError
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.measure import MAX_LENS_STATES, MEASURED, Measure, measured_bytes, problem_of
from nbrunner.protocol.requests import Forward
from nbrunner.protocol.tensors import DTYPE_NAMES, pack, take
from nbrunner.server.host import Host
from nbrunner.server.inputs import CARRY, Inputs, sizes, take_inputs


class MeasuredPass:
    """Runs the blocks in pieces that end at the states to be measured, so that two states at most are held.

    Each `advance` is a job of its own for the compute thread: between two of them come the steps of sessions.
    """

    def __init__(
        self,
        host: Host,
        message: Forward,
        measure: Measure,
        tensors: Mapping[str, RawTensor],
        adapter: SpanAdapter | None = None,
    ) -> None:
        self._adapter = adapter
        self._host, self._message, self._measure, self._tensors = host, message, measure, tensors
        self._inputs: Inputs | None = None
        self._edits = Edits()
        self._final: torch.Tensor | None = None
        self._at = message.start
        self._hidden = self._before = torch.empty(0)
        self._carry: Mapping[int, torch.Tensor] = {}
        self._found: list[dict[str, torch.Tensor]] = []
        wanted = {layer - back for layer in measure.layers for back in ((0, 1) if measure.similarity else (0,))}
        self._stops = sorted(layer for layer in wanted if layer > message.start)
        if message.reply and self._stops[-1] < message.end:
            self._stops.append(message.end)

    def advance(self) -> bool:
        """Run up to the next state and measure it; False when there is none left. In the compute thread."""
        with torch.no_grad():
            if self._inputs is None:
                self._begin()
            inputs, span, stop = self._inputs, self._host.span, self._stops.pop(0)
            assert inputs is not None  # noqa: S101 - just set
            output = span.forward(
                self._hidden,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                start=self._at,
                end=stop,
                carry=self._carry or None,
                edits=self._edits or None,
                adapters=self._adapter,
            )
            self._at, self._hidden, self._carry = stop, output.hidden.to(span.dtype), output.carry
            seen = self._edits.apply(self._hidden, stop)
            if stop in self._measure.layers:
                one = msgspec.structs.replace(self._measure, layers=[stop])
                states = {stop - 1: self._before, stop: seen}
                self._found.append(measure_states(states, one, lens=self._host.lens, final=self._final))
            self._before = seen
        return bool(self._stops)

    def answer(self) -> list[RawTensor]:
        """What is sent back."""
        tensors = [pack(MEASURED + name, tensor) for name, tensor in join_layers(self._found).items()]
        if self._message.reply:
            tensors.append(pack("hidden", self._hidden))
            tensors += [pack(f"{CARRY}{index}", tensor) for index, tensor in self._carry.items()]
        return tensors

    def _begin(self) -> None:
        form, message, measure = self._host.form, self._message, self._measure
        batch, tokens = sizes(self._tensors)
        if message.edits:
            blocks = (message.start, message.end + 1)
            self._edits = take_edits(
                message.edits, self._tensors, blocks=blocks, hidden_shape=form.token_shape, rows=batch
            )
        if measure.final:
            shape = [batch, len(measure.positions) or tokens, *form.token_shape]
            self._final = take(self._tensors, "final", dtype=form.dtype, shape=shape)
        self._inputs = take_inputs(self._tensors, form)
        self._hidden, self._carry = self._inputs.hidden, self._inputs.carry
        self._before = self._edits.apply(self._hidden, message.start)


def check_measure(host: Host, message: Forward, measure: Measure, batch: int, tokens: int) -> int:
    """Refuse what cannot be measured or would not fit a frame, before anything is computed.

    Returns
    -------
    int
        What the lens costs, in tokens through this server's blocks: looking at one state costs about one block.

    Raises
    ------
    PeerRefusedError
    """
    if message.capture:
        raise PeerRefusedError("ask for states that are captured or that are measured, not for both", code="schema")
    lens = host.lens
    problem = problem_of(
        measure,
        layers=(message.start + 1, message.end),
        tokens=tokens,
        vocabulary=lens.vocabulary if lens is not None else None,
    )
    if problem is not None:
        raise PeerRefusedError(problem, code="data")
    positions = len(measure.positions) or tokens
    states = len(measure.layers) * batch * positions if measure.needs_lens else 0
    if states > MAX_LENS_STATES:
        raise PeerRefusedError(
            f"{states} states to look at through the lens; {MAX_LENS_STATES} are allowed at once: ask for fewer "
            "layers, positions or rows",
            code="limit",
        )
    size = measured_bytes(measure, batch, positions, host.form.token_shape, DTYPE_NAMES[host.form.dtype])
    size += batch * tokens * host.form.token_bytes if message.reply else 0
    if size > host.limits.frame_bytes:
        raise PeerRefusedError(
            f"the answer would have {size} bytes, over {host.limits.frame_bytes}: ask for fewer layers or rows",
            code="limit",
        )
    blocks: int = host.span.end - host.span.start
    return math.ceil(states / blocks)
