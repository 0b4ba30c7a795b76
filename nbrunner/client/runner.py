"""What a client model needs of whoever runs its blocks: a swarm, or spans in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lens import Lens
from nbrunner.client.micro_batches import Batch
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.steps import CacheOp

if TYPE_CHECKING:
    from nbrunner.client.watch import PassWatch

Carry = Mapping[int, torch.Tensor]
"""Extra outputs that some architectures hand from layer to layer, by their place in the layer's result."""


class StepResult(Protocol):
    """What one step of a session gave.

    Attributes
    ----------
    hidden
        [batch, tokens, ...], the output of the last block.
    captured
        The input of every block, each [batch, tokens, ...]; None unless asked for.
    timings
        What each server said about its part.
    """

    @property
    def hidden(self) -> torch.Tensor: ...
    @property
    def captured(self) -> list[torch.Tensor] | None: ...
    @property
    def timings(self) -> Sequence[Any]: ...


class RunnerSession(Protocol):
    """One inference session: caches of consecutive tokens, wherever they are."""

    @property
    def length(self) -> int:
        """Tokens of finished steps."""

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each hop."""

    def step(
        self,
        hidden: torch.Tensor,
        *,
        ops: Sequence[CacheOp] = (),
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        capture: bool = False,
    ) -> StepResult:
        """Append tokens.

        Parameters
        ----------
        hidden
            [batch, tokens, ...], the input of the first block.
        ops
            Applied to the caches before. A step that fails leaves the session as it was, ops undone.
        mask
            [batch, length + tokens] bool, cumulative; None when all true.
        positions
            [1 or batch, ..., tokens] int64 position ids; None when they count each row's tokens from 0.
        capture
            Also return the input of every block.
        """

    def undo(self) -> None:
        """Be as before the last step, which succeeded: whoever runs what follows it could not. Once per step."""

    def close(self) -> None:
        """Free the caches. Does not wait, and may be called from any thread."""


@dataclass(frozen=True)
class Kept:
    """A pass that a server has kept: whose, and its id for each group of rows."""

    peer: str
    names: tuple[tuple[slice, str], ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks and what entered them: enough to run their backward pass somewhere else.

    ``kept`` says where that is not needed, as long as it lasts.
    """

    start: int
    end: int
    hidden: torch.Tensor
    carry: Carry = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True)
class Tape:
    """A finished forward pass, as its backward pass needs it. ``watch``: who is told of that one too."""

    segments: tuple[Segment, ...]
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    edits: Edits | None = None
    adapter: SpanAdapter | None = None
    watch: PassWatch | None = None


@dataclass(frozen=True)
class Ahead:
    """A backward pass that will follow; whether it will want the gradients of the adapter."""

    adapter_grads: bool = False


@dataclass(frozen=True)
class Gradients:
    """What a backward pass gives.

    Attributes
    ----------
    hidden
        With respect to the input of the first block; None if nobody wanted it.
    adapters
        By block, then by the tensor's name (`nbrunner.blocks.adapters.BlockAdapter.tensors`).
    """

    hidden: torch.Tensor | None
    adapters: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """What one server did of a forward or backward pass.

    Attributes
    ----------
    peer
        PeerID; empty if it ran in this process.
    start, end
        Its blocks.
    compute_seconds, total_seconds
        In its device, and from asking to answer.
    bytes_sent, bytes_received
        Of tensors.
    measured_here
        Whether this process had to look through the lens, because that server has none.
    backward
        A backward pass.
    """

    peer: str
    start: int
    end: int
    compute_seconds: float
    total_seconds: float
    bytes_sent: int
    bytes_received: int
    measured_here: bool = False
    backward: bool = False


@dataclass(frozen=True)
class ForwardOutput:
    """What blocks gave without caches.

    Attributes
    ----------
    hidden
        [batch, tokens, ...].
    captured
        The input of every block, None unless asked for.
    tape
        For `BlockRunner.backward`.
    passes
        Who ran which blocks, in order; a comparison with the last state takes a second round.
    measured
        What was measured (`nbrunner.protocol.measure.measured_shapes`), None unless asked for.
    """

    hidden: torch.Tensor
    captured: list[torch.Tensor] | None
    tape: Tape
    passes: tuple[Pass, ...] = ()
    measured: dict[str, torch.Tensor] | None = None


class GroupedPass(Protocol):
    """A batch under way in groups of rows. Used as a context, an error inside stops it.

    Attributes
    ----------
    rows
        Of each group, in order.
    """

    rows: Sequence[slice]

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...
    def arriving(self) -> Iterator[int]:
        """The groups as they come back from the last block, each once; waits for them."""

    def output(self, index: int) -> torch.Tensor:
        """What left the last block of a group that has come."""

    def send_back(self, index: int, grad: torch.Tensor) -> None:
        """Begin the way back of a group, without waiting."""

    def gradients(self) -> Gradients:
        """Of all groups, once each was sent back; waits for them."""


@runtime_checkable
class Grouping(Protocol):
    """A runner that can have groups of a batch under way at the same time."""

    def begin(self, batch: Batch, start: int, end: int, *, adapter_grads: bool, input_grad: bool) -> GroupedPass:
        """Send a batch into blocks ``[start, end)``; says which gradients will be wanted."""


class BlockRunner(Protocol):
    """Runs the blocks of one model."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, in and out; all tensors are on the CPU."""

    def open_session(
        self,
        edits: Edits | None = None,
        start: int = 0,
        end: int | None = None,
        adapter: SpanAdapter | None = None,
    ) -> RunnerSession:
        """A session over blocks ``[start, end)``, by default all, whose steps make the edits of their states.

        The adapter is used as it is now: its tensors must not change any more.

        Nothing happens before its first step.
        """

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
        lens: Callable[[], Lens] | None = None,
    ) -> ForwardOutput:
        """Run blocks ``[start, end)`` without caches; mask and positions as in `RunnerSession.step`.

        Parameters
        ----------
        edits
            Those at states ``[start, end)`` are made, and seen in what is captured; those at ``end`` are seen in
            what is measured, and left to the caller to make in ``hidden``.
        adapter
            Of these blocks, by their numbers.
        measure
            What to measure of states ``start + 1`` to ``end``, and of state 0; not together with ``capture``.
        lens
            Called where a server that has none would be needed.
        """

    def backward(
        self,
        tape: Tape,
        grad: torch.Tensor | None,
        captured: Mapping[int, torch.Tensor],
        *,
        adapter_grads: bool = False,
        input_grad: bool = True,
    ) -> Gradients:
        """Gradients of a traced forward pass.

        Parameters
        ----------
        tape
            From `forward`.
        grad
            Gradient of the output; None for zero.
        captured
            Block → gradient with respect to that block's input, where captured states were used.
        adapter_grads
            Whether those of the tape's adapter are wanted.
        input_grad
            Whether that of the first block's input is wanted.
        """

    def close(self) -> None:
        """Leave the swarm, or whatever there is to leave. Sessions still open are closed."""
