"""Sessions: opened, waited for, linked to their neighbours, and closed. Their steps: `nbrunner.protocol.steps`."""

from __future__ import annotations

from nbrunner.protocol.adapters import AdapterUse
from nbrunner.protocol.edits import EditOps
from nbrunner.protocol.schema import Block, Id, Message, Number, Peer, Seconds, Text


class OpenSession(Message, frozen=True):
    """Open an inference session over blocks ``[start, end)``; the stream then belongs to it until it closes.

    ``session`` is a random id chosen by the client. ``upstream`` is the server that will push steps here, None
    if only the client does. ``edits`` (tensors ``edit.N``) are made and ``adapter`` is used at every step of the
    session. ``in_8bit``: hidden states may go out with 8 bits a number (to the client, and to a next server that
    has the feature ``8bit``), as they may come in at any time.
    With ``wait`` the client waits for room (`Queued`) where it would be refused with ``full``.
    """

    session: Id
    model: Text
    start: Block
    end: Block
    upstream: Peer | None = None
    edits: EditOps = []
    adapter: AdapterUse | None = None
    in_8bit: bool = False
    wait: bool = False


class Queued(Message, frozen=True):
    """No room now: the session, or its step, waits at ``place``, for about ``seconds`` if that can be said.

    Said again every two seconds at least, until the answer comes; that may be a refusal with ``full``.
    """

    place: Number
    seconds: Seconds | None = None


class SessionOpened(Message, frozen=True):
    """``croppable``: whether the span's caches can drop their last tokens (recurrent states cannot)."""

    session: Id
    croppable: bool


class Relink(Message, frozen=True):
    """The chain changed: from now on ``upstream`` pushes steps here. Answered by `Relinked`."""

    upstream: Peer | None = None


class Relinked(Message, frozen=True):
    pass


class AttachSession(Message, frozen=True):
    """By an upstream server, on a stream of its own: the steps that follow belong to this session."""

    session: Id


class Attached(Message, frozen=True):
    pass


class Draining(Message, frozen=True):
    """To the client: this server leaves in ``seconds``; move the session at the next step."""

    seconds: Seconds


class CloseSession(Message, frozen=True):
    """By the client: free the caches."""
