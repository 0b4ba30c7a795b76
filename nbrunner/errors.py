"""The exceptions of nbrunner.

::

    NBRunnerError
    ├── UserInputError (ValueError)        what you passed cannot be used
    │   ├── InviteError                    an invite that is malformed, expired or not signed by its swarm
    │   ├── CheckpointError                a model that is missing, incomplete or not safetensors
    │   └── UnsupportedModelError          an architecture that cannot be split into blocks
    ├── SwarmError                         the other peers
    │   ├── MissingBlocksError             nobody reachable serves these blocks
    │   ├── PeerError                      one peer did not do what it was asked
    │   │   ├── PeerUnreachableError       no connection, or it went silent
    │   │   ├── PeerRefusedError           it said no, and why
    │   │   └── BadPeerDataError           it sent what it must not send
    │   └── BootstrapError                 no bootstrap address answered
    ├── SessionError                       the session was closed or used wrongly
    ├── TrainingError                      a training run that could not go on
    └── ServerStartError                   a server process did not come up

Every error carries its facts as fields and ends with what to do next, so that a program can act on it and a
person can too. None of them needs torch or hivemind to be imported.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence


class NBRunnerError(Exception):
    """Root of everything nbrunner raises on purpose."""


class UserInputError(NBRunnerError, ValueError):
    """What was passed cannot be used; nothing was started or changed."""


class InviteError(UserInputError):
    """An invite that is malformed, expired, or not signed by its swarm."""


class CheckpointError(UserInputError):
    """A model directory or repository that is missing, incomplete or has no safetensors."""

    def __init__(self, message: str, *, model: str = "") -> None:
        super().__init__(message)
        self.model = model


class UnsupportedModelError(UserInputError):
    """An architecture that cannot be split into blocks, named with the reason."""

    def __init__(self, message: str, *, model_type: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.model_type = model_type
        self.reason = reason


class SwarmError(NBRunnerError):
    """Something about the other peers."""


class MissingBlocksError(SwarmError):
    """No reachable server holds some of the blocks that a request needs.

    Attributes
    ----------
    blocks : list of (int, int)
        Half-open ranges ``[start, end)`` nobody serves.
    model : str
        The model asked for.
    tried : list of str
        What was tried before giving up, one sentence each, in order.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, int]],
        *,
        model: str = "",
        tried: Iterable[str] = (),
        hint: str = "",
    ) -> None:
        self.blocks = list(blocks)
        self.model = model
        self.tried = list(tried)
        spans = ", ".join(f"[{start}, {end})" for start, end in self.blocks)
        message = f"no reachable server holds blocks {spans} of {model or 'the model'}."
        if self.tried:
            message += " Tried: " + "; ".join(self.tried) + "."
        if hint:
            message += " " + hint
        elif self.blocks:
            start, end = self.blocks[0]
            message += f" To serve them: {serve_command(model, start, end)}"
        super().__init__(message)


def serve_command(uid: str, start: int, end: int) -> str:
    """What whoever holds an invite of role host types to fill a gap, from the model's uid.

    The bundled model, a hub's at a revision, or a directory, whose place only its owner knows. Strangers choose
    names and people paste the command, so a name stays one word. The invite is not in it: outputs are shared.
    """
    name, _, revision = ("".join(one for one in part if one.isprintable()) for part in uid.partition("@"))
    if revision and "/" in name:
        model = f"{shlex.quote(name)} --revision {shlex.quote(revision)}"
    elif revision and name != "tiny":
        model = "DIRECTORY_OF_THE_MODEL"
    else:
        model = shlex.quote(name) if name else "MODEL"
    return f"nbrunner serve {model} --blocks {start}:{end} --invite INVITE"


class PeerError(SwarmError):
    """One peer did not do what it was asked."""

    def __init__(self, message: str, *, peer: str = "") -> None:
        super().__init__(message)
        self.peer = peer


class PeerUnreachableError(PeerError):
    """A peer could not be connected to, closed the connection, or went silent."""


class PeerRefusedError(PeerError):
    """A peer said no.

    Attributes
    ----------
    code : str
        Machine-readable reason, one of `nbrunner.protocol.refusals.RefusalCode`.
    retry_after : float or None
        Seconds after which the same request may be accepted, if the peer said so.
    """

    def __init__(self, message: str, *, peer: str = "", code: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, peer=peer)
        self.code = code
        self.retry_after = retry_after


class BadPeerDataError(PeerError):
    """A peer sent what the protocol forbids: schema, size, shape, dtype, NaN or infinity."""


class BootstrapError(SwarmError):
    """No bootstrap address of a swarm answered."""

    def __init__(self, message: str, *, addresses: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.addresses = list(addresses)


class SessionError(NBRunnerError):
    """A session that was closed, or used in a way that cannot work."""


class TrainingError(NBRunnerError):
    """A training run that could not go on.

    Attributes
    ----------
    step : int
        Steps that were done.
    checkpoint : str
        Where it can be continued from; empty if there is nothing yet.
    """

    def __init__(self, message: str, *, step: int = 0, checkpoint: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint


class ServerStartError(NBRunnerError):
    """A server process did not become ready.

    Attributes
    ----------
    log : str
        The end of its log.
    """

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(message)
        self.log = log
