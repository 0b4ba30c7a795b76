"""Requests without a session: passes through blocks, their gradients, and sums of those."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nbrunner.protocol.adapters import AdapterUse
from nbrunner.protocol.edits import EditOps
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.schema import Block, Id, Message, Number, Text
from nbrunner.protocol.steps import HopTiming


class Forward(Message, frozen=True):
    """Run blocks ``[start, end)`` without caches.

    Tensors: ``hidden`` [batch, tokens, ...]; optional ``mask``, ``positions``, ``carry.N`` as in `Step`;
    ``edit.N``; ``final`` [batch, positions, ...] where the measure says so.

    Attributes
    ----------
    edits
        Made on the way. With a measure also those at state ``end``: seen in what is measured of it, while
        ``hidden`` comes back without them, because whoever runs the next block makes them.
    measure
        What to compute of states ``start + 1`` to ``end``; not together with ``capture``.
    reply
        False: only what is measured comes back, and blocks after the last state measured are not run.
    keep, adapter_grads
        A `Backward` of this will follow, with these gradients: keep what it needs, if there is room. Not together
        with ``capture`` or ``measure``.
    """

    model: Text
    start: Block
    end: Block
    capture: bool = False
    edits: EditOps = []
    measure: Measure | None = None
    reply: bool = True
    adapter: AdapterUse | None = None
    keep: bool = False
    adapter_grads: bool = False


class ForwardResult(Message, frozen=True):
    """``kept`` names the pass for `Backward`, once and for a short time; None if it was not kept.

    Tensors: ``hidden``, ``carry.N``; when captured, ``states`` [blocks, batch, tokens, ...]; when measured,
    ``measured.NAME`` as `nbrunner.protocol.measure.measured_shapes` says.
    """

    timing: HopTiming
    kept: Id | None = None


class AdapterSum(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Add the gradients of the adapter to the sum of this random id, unless ``number`` has been added already."""

    id: Id
    number: Number


class Backward(Message, frozen=True):
    """Gradient of blocks ``[start, end)`` with respect to their input; the forward pass is run again, or was kept.

    Tensors: as `Forward`, and ``grad`` like the output, ``grad_carry.N`` where the carry was used; of a kept pass
    the gradients alone.

    Attributes
    ----------
    adapter_grads
        Also the gradients of the tensors of ``adapter``.
    kept
        From `ForwardResult`. Refused with ``forgotten`` if it is not kept any more.
    sum
        Keep the gradients of the adapter, added up over the parts of a batch, for `TakeSum`.
    """

    model: Text
    start: Block
    end: Block
    edits: EditOps = []
    adapter: AdapterUse | None = None
    adapter_grads: bool = False
    kept: Id | None = None
    sum: AdapterSum | None = None


class TakeSum(Message, frozen=True):
    """Fetch the gradients of the adapters of blocks ``[start, end)`` that were added up. Once."""

    id: Id
    start: Block
    end: Block


class SummedGradients(Message, frozen=True):
    """Of the parts of these numbers together. Tensors as in `AdapterPart`."""

    numbers: Annotated[list[Number], msgspec.Meta(max_length=65536)]


class BackwardResult(Message, frozen=True):
    """Tensors: ``grad`` like the input, ``grad_carry.N``; those of the adapter, named as in `AdapterPart`.

    ``summed``: they have been added to the sum, and are not here.
    """

    timing: HopTiming
    summed: bool = False
