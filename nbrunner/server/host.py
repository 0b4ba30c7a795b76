"""What all sessions and requests of one server share: the span, its compute thread, limits, measurements."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from nbrunner.blocks.batching import Batcher
from nbrunner.blocks.cache import SpanCache, is_recurrent
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.rehearsal import Rehearsal, can_rehearse
from nbrunner.blocks.span import BlockSpan
from nbrunner.protocol.limits import Limits
from nbrunner.server.adapters import AdapterStore
from nbrunner.server.compute import ComputeThread, Done
from nbrunner.server.gathering import GATHER_SECONDS
from nbrunner.server.inputs import Form
from nbrunner.server.kept import KeptPasses
from nbrunner.server.quotas import Quotas
from nbrunner.server.scheduler import Scheduler
from nbrunner.server.served import ServedAdapters
from nbrunner.server.session_memory import FrozenBytes
from nbrunner.server.stepping import run_parts
from nbrunner.server.sums import GradientSums
from nbrunner.server.traffic import Traffic
from nbrunner.server.waiting_room import WaitingRoom

if TYPE_CHECKING:
    from nbrunner.swarm.node import Node

BRIEF_SECONDS = 0.05
"""Decode steps below this run in the event loop where nobody else is active: handing one to the compute thread and
back costs two wake-ups, and the thread wakes up on a core whose caches have forgotten it. Pings and new streams
then wait for so long at most. Two servers of `mid`, with steps of 30 ms, decode at 0.93 of the local speed, and at
0.91 without this."""

_FEW_ROWS_LONGER = 3.0
"""So many times as long as one row do up to 16 take at most, as measured."""

_SMOOTHING = 0.2


@dataclass(frozen=True)
class Speed:
    """Measured on the loaded span.

    Attributes
    ----------
    step_seconds
        One token of one row through the whole span.
    prefill_tokens_per_second
        Through the whole span.
    cache_bytes_fixed, cache_bytes_per_token
        Cost of a row's caches: what does not grow (recurrent states), and each token.
    """

    step_seconds: float
    prefill_tokens_per_second: float
    cache_bytes_fixed: float
    cache_bytes_per_token: float


@dataclass
class Host:
    """Shared state of one server; used from the event loop.

    Attributes
    ----------
    model, num_blocks
        Uid of the checkpoint and blocks of the whole model.
    lens
        Final norm and head, where the server holds them.
    batcher
        Runs steps of several sessions on the span.
    shares_prefixes
        Whether sessions that begin alike can hold their beginning together.
    frozen
        What sessions hold together.
    rehearsal
        Of a step; None where it would cost more than it gives.
    queue_seconds
        How long the last steps waited before they ran, smoothed.
    """

    node: Node
    span: BlockSpan
    model: str
    num_blocks: int
    compute: ComputeThread
    limits: Limits
    speed: Speed
    batcher: Batcher
    lens: Lens | None = None
    accepts_adapters: bool = False
    quotas: Quotas = field(init=False)
    room: WaitingRoom = field(init=False)
    sessions: dict[str, Any] = field(default_factory=dict, init=False)
    adapters: AdapterStore = field(init=False)
    served: ServedAdapters = field(init=False)
    kept: KeptPasses = field(init=False)
    sums: GradientSums = field(init=False)
    traffic: Traffic = field(default_factory=Traffic, init=False)
    form: Form = field(init=False)
    croppable: bool = field(init=False)
    shares_prefixes: bool = field(init=False)
    frozen: FrozenBytes = field(init=False)
    rehearsal: Rehearsal | None = field(init=False)
    queue_seconds: float = field(default=0.0, init=False)
    _decode_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.compute.serve_parts(lambda chosen: run_parts(self, chosen))
        self._schedule()
        self.frozen = FrozenBytes()
        self.quotas = Quotas(self.limits, more=self.frozen.nbytes)
        self.room = WaitingRoom(self.quotas, self.limits, lambda: self.sessions.values())
        self.adapters = AdapterStore(self.limits)
        self.served = ServedAdapters(
            self.adapters,
            model=self.model,
            num_blocks=self.num_blocks,
            start=self.span.start,
            end=self.span.end,
            swarm=self.node.swarm,
            accept=self.accepts_adapters,
        )
        self.kept = KeptPasses(self.limits)
        self.sums = GradientSums(self.limits)
        self.form = form_of(self.span, self.limits)
        self.croppable = always_croppable(self.span)
        self.shares_prefixes = can_share_prefixes(self.span, self.batcher)
        self.rehearsal = Rehearsal(self.span) if can_rehearse(self.span) else None

    @property
    def peer_id(self) -> str:
        return self.node.peer_id

    @property
    def bytes_per_token(self) -> float:
        """What a session over the whole span costs per token and row: caches and transcript."""
        return self.speed.cache_bytes_per_token + self.form.token_bytes

    @property
    def step_seconds(self) -> float:
        """Of a decode step: as measured at the start, then as the last steps took."""
        return self._decode_seconds or self.speed.step_seconds

    def is_brief(self, row_tokens: int) -> bool:
        """Whether a decode step of so many tokens × rows may be run in the event loop (see `BRIEF_SECONDS`)."""
        longer = 1.0 if row_tokens == 1 else _FEW_ROWS_LONGER
        return self.span.device.type == "cpu" and longer * self.step_seconds < BRIEF_SECONDS

    def take_speed(self, step_seconds: float, prefill_tokens_per_second: float) -> None:
        """Forget how fast the span was: it has been measured again."""
        self._decode_seconds = 0.0
        self.speed = replace(
            self.speed, step_seconds=step_seconds, prefill_tokens_per_second=prefill_tokens_per_second
        )
        self._schedule()

    def _schedule(self) -> None:
        self.compute.scheduler = scheduler_for(self.span, self.speed)
        self.compute.gathering.seconds = gather_seconds(self.speed)

    def note_step(self, row_tokens: int, done: Done[None]) -> None:
        """Learn from a finished part."""
        self.queue_seconds += _SMOOTHING * (done.queue - self.queue_seconds)
        if row_tokens == 1:
            before = self._decode_seconds or done.compute
            self._decode_seconds = before + _SMOOTHING * (done.compute - before)


PIECE_SECONDS = 0.25
"""A prompt is run in pieces of this length while others wait: so long a decode step waits for it at most."""


def scheduler_for(span: BlockSpan, speed: Speed) -> Scheduler:
    """A scheduler whose pieces of prompts take as long as they should on this span.

    Beside decode steps a piece takes about as long as a decode step does: those who decode are slowed down to half
    at most, and the prompt gets on.
    """
    if not speed.prefill_tokens_per_second:
        return Scheduler()
    cache = span.new_cache()
    if cache is None or any(is_recurrent(layer) for layer in cache.layers):
        return Scheduler(piece_tokens=1 << 30, beside_tokens=1 << 30)  # a scan in other pieces rounds differently
    piece = int(speed.prefill_tokens_per_second * PIECE_SECONDS)
    beside = int(speed.prefill_tokens_per_second * speed.step_seconds)
    return Scheduler(piece_tokens=max(piece, 32), beside_tokens=min(max(beside, 16), 128))


GATHER_SHARE = 0.125
MOST_GATHER_SECONDS = 0.02


def gather_seconds(speed: Speed) -> float:
    """How long a step waits for those of other active sessions: an eighth of what it takes itself, and up to six
    eighths for those that are known to be back by then.

    Two passes of four sessions take nearly twice as long as one of eight, and sessions come back one after the
    other, because a client computes its head for each. Measured with eight sessions of `mid` from one client: in
    two groups that take turns 29.8 tokens/s, in step 38.3.
    """
    return min(max(GATHER_SECONDS, GATHER_SHARE * speed.step_seconds), MOST_GATHER_SECONDS)


def form_of(span: BlockSpan, limits: Limits) -> Form:
    """What hidden states of this span look like on the wire."""
    return Form(span.dtype, tuple(span.hidden_shape), limits.session_tokens)


def always_croppable(span: BlockSpan) -> bool:
    """Whether a session's caches can drop any number of last tokens at any time.

    Recurrent states and convolutions cannot. A sliding window has forgotten what left it, and what transformers
    records to undo that is enough for one rollback only: such sessions are replayed by their client instead.
    """
    cache = span.new_cache()
    if cache is None:
        return False
    return not any(
        hasattr(layer, "record_past") or hasattr(layer, "is_recurrent_states_initialized") for layer in cache.layers
    )


def can_share_prefixes(span: BlockSpan, batcher: Batcher) -> bool:
    """Whether a token's part of the caches is the same whatever comes after it.

    Not so for sliding windows and recurrent states, which forget, nor where tables of positions change with a
    session's length.
    """
    cache = span.new_cache()
    return cache is not None and cache.shareable and not batcher.tables_change


def measure(span: BlockSpan, *, seconds: float = 0.4) -> Speed:
    """Run the span a little, in the thread that will run it: also the first touch of its memory-mapped weights.

    Stops when ``seconds`` are over, but always runs one prefill and one step.
    """
    if span.carry_at(span.start):
        return Speed(0.0, 0.0, 0.0, _cache_bytes_by_config(span))  # only a real predecessor can make a carry
    deadline = time.perf_counter() + seconds
    tokens = 16
    hidden = torch.zeros((1, tokens, *span.hidden_shape), dtype=span.dtype, device=span.device)
    cache = span.new_cache()
    prefills = [_timed(span, hidden, cache)]
    steps = [_timed(span, hidden[:, :1], cache)]
    per_token, fixed = _cache_bytes_by_config(span), 0.0
    if cache is not None and time.perf_counter() < deadline:
        # 16 tokens lie in buffers for 32, and 48 in buffers for 64; layers without spare room also grow by 32
        cache = span.new_cache()
        prefills.append(_timed(span, hidden, cache))
        small = cache.nbytes() if cache is not None else 0
        while cache is not None and cache.length < 3 * tokens and time.perf_counter() < deadline:
            prefills.append(_timed(span, hidden, cache))
        if cache is not None and cache.length == 3 * tokens:
            per_token = (cache.nbytes() - small) / (2 * tokens)
            fixed = max(0.0, small - 2 * tokens * per_token)
    while len(steps) < 8 and time.perf_counter() < deadline:
        steps.append(_timed(span, hidden[:, :1], cache))
    return Speed(statistics.median(steps), tokens / min(prefills), fixed, per_token)


def _timed(span: BlockSpan, hidden: torch.Tensor, cache: SpanCache | None) -> float:
    began = time.perf_counter()
    span.forward(hidden, cache=cache)
    if span.device.type == "cuda":
        torch.cuda.synchronize(span.device)
    return time.perf_counter() - began


def _cache_bytes_by_config(span: BlockSpan) -> float:
    """Bytes of keys and values per token and row over the span, from the config."""
    config = span.config
    attention_heads = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // attention_heads
    return float(2 * heads * width * span.dtype.itemsize * (span.end - span.start))
