"""Several people teach one adapter: the clients of a swarm average what they train.

Everyone trains as if alone, with its own data and its own optimiser. Every few steps those who are there average
their parameters, each weighted by the samples since its last round (local SGD, McMahan et al. 2017,
https://arxiv.org/abs/1602.05629), by hivemind's all-reduce, in a child process. Servers have no part in it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import msgspec
import torch

from nbrunner.errors import NBRunnerError, ServerStartError, SessionError, UserInputError
from nbrunner.hosting import listen_for
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.finite import all_finite
from nbrunner.protocol.together import MAX_VALUES, Teaching, TensorShape
from nbrunner.tuning.together_channel import (
    Account,
    Average,
    Done,
    Failed,
    GiveUp,
    Note,
    Outcome,
    Participant,
    Settings,
    Start,
    Started,
    bytes_of,
)
from nbrunner.tuning.together_process import TogetherProcess, raise_failure

logger = logging.getLogger(__name__)

__all__ = ["Outcome", "Participant", "Together"]

_START_SECONDS = 60.0
_GRACE_SECONDS = 10.0  # beyond what a round may take, before the child counts as hung
_NOTE_SECONDS = 0.2
_LOOK_SECONDS = 0.3  # so often, whoever waits for the others looks whether it still is to
_RESTARTS = 3
_CALLED_SHARE = 4  # who is called joins after a quarter of its own steps at least, or a caller could hold all up

Parameters = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | torch.nn.Module


class _Hurried(Exception):  # noqa: N818
    """Whoever waits for the others is told not to."""


class Together:
    """Takes part in teaching under a name.

    ::

        together = Together(invite, "facts", model)   # what of the model is trained
        with together:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step(); optimizer.zero_grad()
                together.after_step(samples=len(batch["input_ids"]))
            together.finish()

    With `transformers.Trainer`: ``Trainer(..., callbacks=[together.callback()])``.

    Parameters
    ----------
    invite
        Into the swarm; role ``use`` is enough.
    name
        Of what is taught. Those who use the same name average with each other.
    parameters
        What is trained, by name; of a module, all that requires gradients. They are changed in place.
    every_steps
        Own steps after which a round is called. Others join it at their next step.
    method
        In words, such as ``lora``: part of what must be the same.
    member
        A name for ourselves, shown to the others.
    patience
        Seconds for which a round waits for those who are late; then it goes on with those who came, or alone.
    exchange_seconds
        Seconds that the exchange itself may take.
    farewell
        Seconds that `finish` waits for the others to finish too.
    clip
        Parameters of others count as far as they differ from ours by at most this many times the way that we went
        in ``every_steps`` steps; of a larger difference, so much.
    listen
        Multiaddresses; by default this machine only if the swarm is on it, else all of its addresses.
    reachable
        False behind a NAT, where nobody can connect to us: we then connect to the others, of whom some must be
        reachable.
    on_change
        Called from another thread when `participants` may have changed.

    Raises
    ------
    UserInputError
        Parameters, names or an invite that cannot be used.
    """

    def __init__(
        self,
        invite: str | Invite,
        name: str,
        parameters: Parameters,
        *,
        every_steps: int = 10,
        method: str = "",
        member: str = "",
        patience: float = 5.0,
        exchange_seconds: float = 20.0,
        farewell: float = 30.0,
        clip: float = 10.0,
        listen: Iterable[str] | None = None,
        reachable: bool = True,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._invite = invite if isinstance(invite, Invite) else Invite.parse(invite)
        self._tensors = _checked_parameters(parameters)
        self.teaching = _teaching(name, method, self._tensors)
        for what, value in (("patience", patience), ("exchange_seconds", exchange_seconds), ("clip", clip)):
            if not 0 < value < 1e6:
                raise UserInputError(f"{what} must be a positive number, not {value!r}")
        if not (isinstance(every_steps, int) and every_steps >= 1):
            raise UserInputError(f"every_steps must be a whole number from 1, not {every_steps!r}")
        if len(member) > 60:
            raise UserInputError("member is a name of at most 60 characters")
        self._settings = Settings(
            member,
            every_steps,
            float(patience),
            float(exchange_seconds),
            float(farewell),
            float(clip),
            tuple(listen) if listen is not None else tuple(listen_for(self._invite)),
            reachable,
        )
        self.peer_id = ""
        self.steps = 0
        self.samples = 0
        self.round = 0
        self.history: list[Outcome] = []
        self.error: NBRunnerError | None = None
        self._lineage = b""
        self._fresh = 0
        self._since = 0
        self._called = False
        self._paused = False
        self._noted = 0.0
        self._turn = 0
        self._restarts = 0
        self._participants: list[Participant] = []
        self._on_change = on_change
        self._process: TogetherProcess | None = None
        self._closed = False
        self._hurried = threading.Event()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    # -- taking part ----------------------------------------------------------------------------------------------

    def start(self) -> Together:
        """Join the others. If some are there already, the parameters are theirs from now on.

        Raises
        ------
        UserInputError
            Others teach something else under this name; says what differs.
        BootstrapError, PeerRefusedError, ServerStartError
            The swarm cannot be joined.
        """
        if self._closed:
            raise SessionError("this one has left; make another Together to come back")
        if self._process is None:
            vector = self._vector()
            atexit.register(self.close)
            try:
                self._launch(vector)
            except BaseException:
                self.close()
                raise
        return self

    def after_step(self, samples: int = 1) -> Outcome | None:
        """Say that a step was made, on so many samples; average if it is time. Returns what came of the round.

        Waits at most ``patience`` seconds for others and ``exchange_seconds`` for the exchange (both twice
        if a peer is lost in the middle of it), and then goes on alone.

        Raises
        ------
        UserInputError
            Our own parameters are not numbers any more.
        """
        self._check_open()
        self.steps += 1
        self.samples += samples
        self._fresh += samples
        self._since += 1
        every = self._settings.every_steps
        if self._since >= every or (self._called and self._since >= max(1, every // _CALLED_SHARE)):
            return self.average()
        self._note()
        return None

    def average(self) -> Outcome:
        """Call a round now."""
        self._check_open()
        self._since = 0
        return self._round(finish=None)

    def finish(self, seconds: float | None = None) -> Outcome:
        """Say that we make no more steps: go along with the others' rounds until they have finished too.

        The last round is of all, so that afterwards all have the same parameters. Waits at most ``seconds``, by
        default ``farewell``.
        """
        self._check_open()
        return self._round(finish=self._settings.farewell if seconds is None else float(seconds))

    def hurry(self) -> None:
        """Have `finish` wait no longer, now or later: it comes back alone. May be called from any thread."""
        self._hurried.set()

    def pause(self) -> None:
        """We make no steps for a while: nobody waits for us."""
        self._paused = True
        self._note(at_once=True)

    def resume(self) -> None:
        self._paused = False
        self._note(at_once=True)

    def participants(self) -> list[Participant]:
        """Everyone who takes part or did, ourselves first; at most half a second old."""
        return list(self._participants)

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that starts, averages after optimiser steps, and finishes."""
        from nbrunner.tuning.together_callback import TogetherCallback

        return TogetherCallback(self)

    def close(self) -> None:
        """Leave; the parameters stay as they are. May be called more than once, from any thread."""
        if self._pid != os.getpid():
            return  # a forked child: the process is its parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._process is not None:
            self._process.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> Together:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "left" if self._closed else "not started" if self._process is None else f"round {self.round}"
        here = sum(one.state not in ("left", "lost") for one in self._participants)
        return f"<Together {self.teaching.name!r}: {state}, {here} take part>"

    # -- the child ------------------------------------------------------------------------------------------------

    def _launch(self, vector: torch.Tensor) -> None:
        process = TogetherProcess(self._on_called, self._on_account)
        with self._lock:
            self._process, closed = process, self._closed
        if closed:
            process.close()
            raise SessionError("this one has left while it joined")
        start = Start(str(self._invite), self.teaching, self._settings, self.round, self.steps, self.samples)
        process.say(start, bytes_of(vector))
        try:
            message, body = process.answer(_START_SECONDS)
        except TimeoutError:
            raise ServerStartError(
                f"joining the others took longer than {_START_SECONDS:.0f} s; is this machine overloaded?",
                log=process.log,
            ) from None
        if isinstance(message, Failed):
            raise_failure(message.kind, message.reason)
        if not isinstance(message, Started):
            raise ServerStartError("the process that averages made no sense", log=process.log)
        self.peer_id, self.round, self._lineage = message.peer, message.round, message.lineage
        if message.joined:
            self._load(body)
            self._since = 0

    def _round(self, *, finish: float | None) -> Outcome:
        began = time.monotonic()
        process = self._ready()
        if process is None:
            return self._alone()
        vector = self._vector()  # a new process has begun with the parameters of the others
        self._turn += 1
        process.forget_answers()
        process.say(Note(self.steps, self.samples, self._fresh))
        process.say(Average(self._turn, self._lineage, finish), bytes_of(vector))
        settings = self._settings
        seconds = 2 * (settings.patience + settings.exchange) + (finish or 0.0) + _GRACE_SECONDS
        try:
            message, body = self._answer(process, seconds, finishing=finish is not None)
        except BaseException as error:
            if isinstance(error, (ServerStartError, TimeoutError)):
                return self._lost(process, error)
            process.say(GiveUp())
            if isinstance(error, _Hurried):
                return self._alone()
            raise
        if isinstance(message, Failed):
            logger.warning("%s", message.reason)
            return self._alone()
        outcome = message.outcome
        self.round, self._lineage = outcome.round, outcome.lineage
        if body:
            self._load(body)
        if outcome.kind != "alone":
            self._fresh = 0
        self._since = 0
        outcome = msgspec.structs.replace(outcome, seconds=time.monotonic() - began)
        self.history.append(outcome)
        return outcome

    def _answer(
        self, process: TogetherProcess, seconds: float, *, finishing: bool
    ) -> tuple[Done | Failed, bytearray]:
        deadline = time.monotonic() + seconds
        while True:
            if finishing and self._hurried.is_set():
                raise _Hurried
            left = max(deadline - time.monotonic(), 0.0)
            try:
                message, body = process.answer(min(left, _LOOK_SECONDS))
            except TimeoutError:
                if left > _LOOK_SECONDS:
                    continue
                raise
            if isinstance(message, Failed) or (isinstance(message, Done) and message.id == self._turn):
                return message, body

    def _ready(self) -> TogetherProcess | None:
        """The child; a new one if it has ended. None if there is none to be had now."""
        if self._process is not None and self._process.alive:
            return self._process
        if self._process is None or self._closed or self._restarts >= _RESTARTS:
            return None
        self._restarts += 1
        end = self._process.log[-500:]
        logger.warning("the process that averages has ended; another is started. Its log ends: %s", end)
        self._process.close()
        try:
            self._launch(self._vector())
        except NBRunnerError as error:
            self.error = error
            logger.warning("it cannot be started again: %s", error)
            return None
        return self._process

    def _lost(self, process: TogetherProcess, error: Exception) -> Outcome:
        if not self._closed:
            logger.warning("this round is ours alone: %s", error)
            if isinstance(error, TimeoutError):
                process.kill()
        return self._alone()

    def _alone(self) -> Outcome:
        outcome = Outcome("alone", self.round, self._lineage, [self.peer_id])
        self.history.append(outcome)
        return outcome

    def _note(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._process is not None and (at_once or now - self._noted >= _NOTE_SECONDS):
            self._noted = now
            self._process.say(Note(self.steps, self.samples, self._fresh, self._paused))

    def _on_called(self, called: bool) -> None:
        self._called = called

    def _on_account(self, account: Account) -> None:
        self._participants = account.participants
        if self._on_change is not None:
            with contextlib.suppress(Exception):  # the listener's own trouble must not end our reader
                self._on_change()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("this one has left; make another Together to come back")
        if self._process is None:
            raise SessionError("call start() first, or use `with together:`")

    # -- the parameters -------------------------------------------------------------------------------------------

    def _vector(self) -> torch.Tensor:
        """All parameters as one float32 vector, in the order of their names."""
        parts = [tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in self._tensors.values()]
        for name, part in zip(self._tensors, parts, strict=True):
            if not all_finite(part):
                raise UserInputError(
                    f"{name} has NaN or infinity in it: nothing was sent to the others. Lower the learning rate, "
                    "and start again: the others still have the last average."
                )
        return torch.cat(parts)

    def _load(self, body: bytearray) -> None:
        vector = torch.frombuffer(body, dtype=torch.float32)
        parts = torch.split(vector, [tensor.numel() for tensor in self._tensors.values()])
        with torch.no_grad():
            for tensor, part in zip(self._tensors.values(), parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _checked_parameters(parameters: Parameters) -> dict[str, torch.Tensor]:
    if isinstance(parameters, torch.nn.Module):
        parameters = {name: one for name, one in parameters.named_parameters() if one.requires_grad}
    found = dict(parameters)
    if not found:
        raise UserInputError("there is nothing to teach: no parameter requires a gradient")
    for name, tensor in found.items():
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise UserInputError(f"{name!r} is not a name of 1 to 200 characters for a parameter")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            raise UserInputError(f"{name} is not a tensor of floating-point numbers that has values")
        if tensor.dim() > 6:
            raise UserInputError(f"{name} has {tensor.dim()} dimensions; 6 are the most")
    values = sum(tensor.numel() for tensor in found.values())
    if values > MAX_VALUES:
        raise UserInputError(f"{values} values are to be taught together; {MAX_VALUES} are the most")
    return dict(sorted(found.items()))


def _teaching(name: str, method: str, tensors: Mapping[str, torch.Tensor]) -> Teaching:
    if not isinstance(name, str) or not 0 < len(name) <= 60 or not name.isprintable():
        raise UserInputError(f"{name!r} is not a name of 1 to 60 characters to teach under")
    if len(method) > 200:
        raise UserInputError("the method is described in at most 200 characters")
    return Teaching(name, method, [TensorShape(one, list(tensor.shape)) for one, tensor in tensors.items()])
