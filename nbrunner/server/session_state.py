"""The rules of a session on a server, as a pure state machine: what of a part is computed, what is passed on.

No tensors, no network: positions only. `plan` looks at a part and says what to do with it, and changes nothing;
`applied` and `computed` record what has been done. The rules are those of ``docs/protocol.md``, by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbrunner.protocol.refusals import RefusalCode
from nbrunner.protocol.steps import CacheOp, Hop, Step


class PartRefusedError(Exception):
    """A part that cannot be taken, with the code and the sentence to answer; ``peer`` if another is to blame."""

    def __init__(self, code: RefusalCode, reason: str, *, peer: str | None = None) -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.reason = reason
        self.peer = peer


@dataclass(frozen=True)
class PartPlan:
    """What to do with one part.

    Attributes
    ----------
    step, attempt
        Of the part.
    ops
        To apply to caches and transcript first; empty if they have been.
    batch
        Rows once the ops are applied.
    begin, end
        Compute tokens ``[begin, end)``; nothing if equal.
    offset
        Index in the part's tensors of token ``begin``.
    send_from, send_to
        Then pass transcript ``[send_from, send_to)`` on; nothing if equal.
    new_step, new_attempt
        Whether this part is the first of its step, or of its attempt.
    """

    step: int
    attempt: int
    ops: tuple[CacheOp, ...]
    batch: int
    begin: int
    end: int
    offset: int
    send_from: int
    send_to: int
    new_step: bool
    new_attempt: bool


@dataclass
class SessionState:
    """Positions of one session on one server.

    Attributes
    ----------
    start, end
        Blocks ``[start, end)`` that the session was opened for.
    length, batch
        Tokens and rows held by the caches; ``batch`` means nothing while ``length`` is 0.
    step, attempt
        The last ones seen.
    sent
        How far the transcript has been passed on in this attempt.
    was_dropped
        It was idle, and its memory was wanted.
    """

    start: int
    end: int
    max_tokens: int
    max_batch: int
    max_part: int
    length: int = 0
    batch: int = 0
    step: int = 0
    attempt: int = 0
    sent: int = 0
    was_dropped: bool = False
    _failed: tuple[int, int] = (0, 0)

    def plan(self, part: Step, *, tokens: int, batch: int) -> PartPlan | None:
        """What to do with a part of ``batch`` rows and ``tokens`` tokens; None if it is stale.

        Raises
        ------
        PartRefusedError
            Nothing has changed; `fail` makes the other parts of that attempt stale.
        """
        key = (part.step, part.attempt)
        if key < (self.step, self.attempt) or key <= self._failed:
            return None
        self._check_form(part, tokens=tokens, batch=batch)
        new_step = part.step > self.step
        me, upto = part.route[0], part.position + tokens
        ops = tuple(part.ops) if new_step and not me.rebuild else ()
        length, held_batch = after_ops(self.length, self.batch, ops, max_batch=self.max_batch)
        # a new step of a hop that holds something else than its client believes would be silently wrong (rule 2)
        if self.was_dropped and part.position > length:
            raise PartRefusedError(
                "position", "this session was idle and was dropped when others needed its memory"
            )
        if part.position > length or (new_step and me.position != length):
            believed = me.position if new_step else part.position
            raise PartRefusedError(
                "position",
                f"step {part.step} starts at position {believed}, this session holds {length} tokens here",
            )
        if length and batch != held_batch:
            raise PartRefusedError("data", f"a part of {batch} rows for a session of {held_batch} rows")
        new_attempt = new_step or part.attempt > self.attempt
        sent = self._pass_on_from(part) if new_attempt else self.sent
        begin = min(length, upto)
        return PartPlan(
            step=part.step,
            attempt=part.attempt,
            ops=ops,
            batch=batch,
            begin=begin,
            end=upto,
            offset=begin - part.position,
            send_from=sent,
            send_to=max(upto, sent),
            new_step=new_step,
            new_attempt=new_attempt,
        )

    def dropped(self) -> None:
        """Caches and transcript have been given up: nothing is held any more."""
        self.length = self.batch = self.sent = 0
        self.was_dropped = True

    def applied(self, plan: PartPlan) -> None:
        """The ops of a plan have been applied to caches and transcript."""
        self.length, self.batch = after_ops(self.length, self.batch, plan.ops, max_batch=self.max_batch)
        if plan.new_attempt:
            self.sent = plan.send_from
        self.step, self.attempt = plan.step, plan.attempt

    def computed(self, plan: PartPlan) -> None:
        """The tokens of a plan are in the caches and in the transcript."""
        if plan.end > plan.begin:
            self.length, self.batch, self.was_dropped = plan.end, plan.batch, False

    def passed_on(self, plan: PartPlan) -> None:
        """The transcript has been handed to the next hop as the plan says."""
        self.sent = plan.send_to

    def fail(self, part: Step) -> None:
        """A part could not be taken: what else comes of this attempt, or of earlier ones, is stale."""
        self._failed = max(self._failed, (part.step, part.attempt))

    def _check_form(self, part: Step, *, tokens: int, batch: int) -> None:
        me, upto = part.route[0], part.position + tokens
        if (me.start, me.end) != (self.start, self.end):
            raise PartRefusedError(
                "blocks",
                f"a step through blocks [{me.start}, {me.end}) in a session over [{self.start}, {self.end})",
            )
        if tokens < 1 or batch < 1 or upto > part.end:
            raise PartRefusedError(
                "position", f"a part of positions [{part.position}, {upto}) in a step that ends at {part.end}"
            )
        if part.end > self.max_tokens:
            raise PartRefusedError("limit", f"a session of {part.end} tokens; this server allows {self.max_tokens}")
        if batch > self.max_batch:
            raise PartRefusedError("limit", f"{batch} rows; this server allows {self.max_batch}")
        if tokens * batch > self.max_part:
            raise PartRefusedError(
                "limit", f"a part of {tokens} tokens × {batch} rows; this server allows {self.max_part} together"
            )
        target = self._pass_on_from(part)
        if target > part.end:
            raise PartRefusedError(
                "position", f"the next hop holds {target} tokens of a step that ends at {part.end}"
            )

    @staticmethod
    def _pass_on_from(part: Step) -> int:
        return part.route[1].position if len(part.route) > 1 else part.reply_from


def after_ops(length: int, batch: int, ops: Sequence[CacheOp], *, max_batch: int) -> tuple[int, int]:
    """Tokens and rows held once ``ops`` are applied; `PartRefusedError` if one of them cannot be."""
    for op in ops:
        if op.kind == "reset":
            length = 0
        elif op.kind == "crop":
            length = min(length, op.count)
        elif length:
            if op.kind == "select":
                if not op.rows or max(op.rows) >= batch:
                    raise PartRefusedError("data", f"select of rows {op.rows[:8]} in a session of {batch} rows")
                batch = len(op.rows)
            else:
                if not op.count:
                    raise PartRefusedError("data", "repeat of every row 0 times")
                batch *= op.count
            if batch > max_batch:
                raise PartRefusedError("limit", f"{batch} rows; this server allows {max_batch}")
    return length, batch


def next_hop(part: Step) -> Hop | None:
    """The hop that a part goes to from here; None if the client is answered."""
    return part.route[1] if len(part.route) > 1 else None
