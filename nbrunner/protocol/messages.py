"""The messages that peers send each other. ``docs/protocol.md`` tells who sends which, and when.

Every message is a tagged struct; decoding checks types, ranges and lengths, so that what arrives in a handler
has the right form. Whether it makes *sense* (positions, shapes, quotas) is checked where the state is.
Tensors travel beside the message in the same frame (`nbrunner.protocol.frames`), named as each class says.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nbrunner.protocol.limits import Limits
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.records import ServerRecord
from nbrunner.protocol.together import MAX_PARTICIPANTS, Digest, Lineage, Name, TeacherState, Teaching

VERSION = 1
"""Version of the wire. Peers of another version refuse each other by name."""

STREAM = "nbrunner/1"
"""Name of the libp2p stream protocol: one handler for everything."""

FEATURES: tuple[str, ...] = (
    "chain",
    "capture",
    "carry",
    "parts",
    "edits",
    "measure",
    "adapters",
    "keep",
    "8bit",
    "named adapters",
    "sums",
    "queue",
)
"""Optional abilities of this version, exchanged in `Hello` and `Welcome`."""

EIGHT_BITS = "8bit"
"""The feature of taking and sending hidden states with 8 bits a number (`nbrunner.protocol.tensors.pack_8bit`)."""

RefusalCode = Literal[
    "version",  # another version of the wire
    "credential",  # no invite, or not a good one
    "role",  # the invite does not allow this
    "model",  # another model or revision is served here
    "blocks",  # blocks outside the span served here
    "limit",  # over a limit that was announced
    "full",  # no room now; see retry_after
    "position",  # a step that does not fit what the session holds
    "session",  # no such session here
    "teaching",  # nothing of that name is taught here
    "schema",  # bytes that are not a message, or a message out of place
    "data",  # tensors of wrong shape, dtype, or with NaN or infinity
    "adapter",  # an adapter that is not here: send it, then ask again
    "forgotten",  # a kept pass that is not kept any more: send its inputs
    "link",  # the next server of the chain could not be reached
    "draining",  # leaving; takes nothing new
    "internal",  # our fault
]

_Id = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern="^[0-9a-f]+$")]
_Peer = Annotated[str, msgspec.Meta(min_length=40, max_length=60)]
_Text = Annotated[str, msgspec.Meta(max_length=200)]
_Reason = Annotated[str, msgspec.Meta(max_length=2000)]
_Block = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_Position = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Weight = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """Base of all messages; on the wire each is a map whose ``type`` is its name in lower case."""


# -- first words on every stream ---------------------------------------------------------------------------------


class Shortcut(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a server on the same machine can be reached without its daemon (`nbrunner.swarm.shortcut`).

    Attributes
    ----------
    socket
        Path of its unix socket.
    token
        Opens it for the peer that was welcomed.
    """

    socket: Annotated[str, msgspec.Meta(max_length=108)]
    token: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Hello(Message, frozen=True):
    """The first frame on a stream, by whoever opened it.

    Attributes
    ----------
    machine
        Known only to processes of one machine, and another for each peer; empty if that cannot be told.
    """

    version: int
    swarm: bytes
    credential: Annotated[bytes, msgspec.Meta(max_length=1024)]
    software: _Text = ""
    features: Annotated[list[_Text], msgspec.Meta(max_length=32)] = []
    machine: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class Welcome(Message, frozen=True):
    """The answer to `Hello` when the stream may be used."""

    version: int
    limits: Limits
    software: _Text = ""
    features: Annotated[list[_Text], msgspec.Meta(max_length=32)] = []
    shortcut: Shortcut | None = None


class Refused(Message, frozen=True):
    """No, and why. The peer that refuses is the one at the other end unless ``peer`` names another."""

    code: RefusalCode
    reason: _Reason
    retry_after: _Seconds | None = None


# -- edits -------------------------------------------------------------------------------------------------------


class EditOp(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One declarative change of a hidden state (`nbrunner.blocks.edits`), made by whoever runs block ``layer``.

    Attributes
    ----------
    kind
        ``set`` to the vector; ``add`` factor × vector; ``scale`` by factor; ``zero``; ``project`` factor × the part
        along the vector out.
    layer
        Which state: what enters block ``layer``.
    begin, end
        Positions ``[begin, end)`` of the sequence; ``end`` None: all from there on.
    row
        Of the batch; None: every row.
    vector
        N of the tensor ``edit.N`` beside the message.
    """

    kind: Literal["set", "add", "scale", "zero", "project"]
    layer: _Block
    begin: _Position = 0
    end: _Position | None = None
    row: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    factor: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] = 1.0
    vector: Annotated[int, msgspec.Meta(ge=0, le=9999)] | None = None


_Edits = Annotated[list[EditOp], msgspec.Meta(max_length=1024)]


# -- adapters ----------------------------------------------------------------------------------------------------

_Digest = Annotated[bytes, msgspec.Meta(max_length=32)]
AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class LoraPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One low-rank change of the linear module of that name inside a block (`nbrunner.blocks.adapters`)."""

    module: _Text
    scaling: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


class AdapterPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The adapter of one block. Tensors: ``lora.BLOCK.K.a`` and ``.b`` of the K-th of ``loras``, which are in the
    order of their modules' names; ``prompt.BLOCK`` if it has one.
    """

    block: _Block
    loras: Annotated[list[LoraPart], msgspec.Meta(max_length=1024)] = []
    prompt: bool = False


class PutAdapter(Message, frozen=True):
    """Keep adapters of some blocks for later requests and sessions, which name them by their digests."""

    model: _Text
    parts: Annotated[list[AdapterPart], msgspec.Meta(min_length=1, max_length=1024)]


class AdapterStored(Message, frozen=True):
    """The digests of what was put, in the order of its parts."""

    digests: Annotated[list[_Digest], msgspec.Meta(max_length=1024)]


class AdapterManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole adapter that servers have by themselves, under a name.

    Its uid is NAME@ and the first 16 hexadecimal digits of the SHA-256 of its encoded form, so that servers that
    have loaded the same files announce the same, and nobody can put another in its place.

    Attributes
    ----------
    name
        Chosen by who serves or offers it.
    model
        Uid of the checkpoint it is for.
    blocks
        A digest for each block of the whole model; empty for a block that it leaves as it is.
    rank, targets
        Highest rank, and the modules it changes: for people.
    author
        PeerID of who offered it, and signed this; empty if its servers were started with it.
    """

    name: AdapterName
    model: _Text
    blocks: Annotated[list[_Digest], msgspec.Meta(min_length=1, max_length=4096)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    targets: Annotated[list[_Text], msgspec.Meta(max_length=64)] = []
    author: Annotated[str, msgspec.Meta(max_length=60)] = ""


class GetAdapter(Message, frozen=True):
    """Answered by `AdapterInfo`."""

    adapter: _Text


class AdapterInfo(Message, frozen=True):
    """An encoded `AdapterManifest` and, if it has an author, their signature (`nbrunner.protocol.manifests`)."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=1 << 18)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class OfferAdapter(Message, frozen=True):
    """Serve an adapter to everybody under its name. Its blocks that concern the server have been put there before.

    Answered by `AdapterOffered`; refused where offers are not taken.
    """

    manifest: Annotated[bytes, msgspec.Meta(max_length=1 << 18)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64)]


class WithdrawAdapter(Message, frozen=True):
    """By its author: serve it no longer. Answered by `AdapterOffered`."""

    adapter: _Text


class AdapterOffered(Message, frozen=True):
    adapter: _Text


class AdapterUse(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """With which adapters blocks are run.

    Attributes
    ----------
    blocks
        A digest for each block of the request's ``[start, end)``; empty for a block that is run as it is.
    seed
        While training: what dropout drops follows from it. None: nothing is dropped.
    first_row
        Number of the request's first row in the batch that it was cut from.
    """

    blocks: Annotated[list[_Digest], msgspec.Meta(min_length=1, max_length=4096)]
    seed: _Number | None = None
    first_row: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0


# -- sessions ----------------------------------------------------------------------------------------------------


class OpenSession(Message, frozen=True):
    """Open an inference session over blocks ``[start, end)``; the stream then belongs to it until it closes.

    ``session`` is a random id chosen by the client. ``upstream`` is the server that will push steps here, None
    if only the client does. ``edits`` (tensors ``edit.N``) are made and ``adapter`` is used at every step of the
    session. ``in_8bit``: hidden states may go out with 8 bits a number (to the client, and to a next server that
    has the feature ``8bit``), as they may come in at any time.
    With ``wait`` the client waits for room (`Queued`) where it would be refused with ``full``.
    """

    session: _Id
    model: _Text
    start: _Block
    end: _Block
    upstream: _Peer | None = None
    edits: _Edits = []
    adapter: AdapterUse | None = None
    in_8bit: bool = False
    wait: bool = False


class Queued(Message, frozen=True):
    """No room now: the session, or its step, waits at ``place``, for about ``seconds`` if that can be said.

    Said again every two seconds at least, until the answer comes; that may be a refusal with ``full``.
    """

    place: _Number
    seconds: _Seconds | None = None


class SessionOpened(Message, frozen=True):
    """``croppable``: whether the span's caches can drop their last tokens (recurrent states cannot)."""

    session: _Id
    croppable: bool


class Relink(Message, frozen=True):
    """The chain changed: from now on ``upstream`` pushes steps here. Answered by `Relinked`."""

    upstream: _Peer | None = None


class Relinked(Message, frozen=True):
    pass


class AttachSession(Message, frozen=True):
    """By an upstream server, on a stream of its own: the steps that follow belong to this session."""

    session: _Id


class Attached(Message, frozen=True):
    pass


class CacheOp(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One change of a session's caches before a step.

    ``crop``: keep the first ``count`` tokens (absolute, so that it is right whether or not an interrupted step
    had arrived). ``select``: keep these rows, in this order (beam search).
    ``repeat``: every row ``count`` times, neighbours together. ``reset``: forget everything.
    """

    kind: Literal["crop", "select", "repeat", "reset"]
    count: _Position = 0
    rows: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=65535)]], msgspec.Meta(max_length=4096)] = []


class Hop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One server on a step's way.

    Attributes
    ----------
    peer, session
        Where.
    start, end
        The blocks it runs, inside the span the session was opened for.
    position
        Tokens the client believes this hop to hold (after the step's ops): what it must be sent starts there.
    rebuild
        The hop is new in the chain and is being filled from its neighbour's transcript, which already has the
        step's ops in it: it must not apply them again.
    """

    peer: _Peer
    session: _Id
    start: _Block
    end: _Block
    position: _Position = 0
    rebuild: bool = False


class HopTiming(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Seconds one hop spent on a step: waiting for the device, computing, and in the server in all."""

    peer: _Peer
    queue: _Seconds
    compute: _Seconds
    total: _Seconds


class Step(Message, frozen=True):
    """One part of a step: hidden states of consecutive tokens, on their way through the chain.

    Tensors: ``hidden`` [batch, tokens, ...] for positions ``[position, position + tokens)``; optional ``mask``
    [batch, >= position + tokens] bool, 2D and cumulative, absent when all true; optional ``positions``
    [1 or batch, ...] int64, the position ids of ``[positions_from, ...)``; optional ``carry.N``.

    Attributes
    ----------
    step
        Number of the step in its session, from 1, rising. A server applies ``ops`` when it first sees a number
        and never again; parts it has already computed it only forwards.
    attempt
        Number of the try; replies name it.
    position
        Where this part starts.
    end
        Where the whole step ends. Parts follow one another until one reaches it.
    reply_from
        The client wants the last hop's outputs from this position on.
    route
        The hops from the receiver on, the receiver first. The last one answers on the client's stream.
    capture
        Each hop also sends the client the hidden states that enter its blocks (`Captured`).
    """

    step: _Number
    attempt: _Number
    position: _Position
    end: _Position
    reply_from: _Position
    route: Annotated[list[Hop], msgspec.Meta(min_length=1, max_length=256)]
    ops: Annotated[list[CacheOp], msgspec.Meta(max_length=64)] = []
    positions_from: _Position = 0
    capture: bool = False
    timings: Annotated[list[HopTiming], msgspec.Meta(max_length=256)] = []


class StepResult(Message, frozen=True):
    """Outputs of the last hop. Tensors: ``hidden`` [batch, tokens, ...] from ``position`` on, ``carry.N``."""

    step: _Number
    attempt: _Number
    position: _Position
    end: _Position
    timings: Annotated[list[HopTiming], msgspec.Meta(max_length=256)] = []


class Captured(Message, frozen=True):
    """Inputs of blocks ``[start, end)``. Tensor: ``states`` [blocks, batch, tokens, ...] from ``position`` on."""

    step: _Number
    attempt: _Number
    position: _Position
    start: _Block
    end: _Block


class StepFailed(Message, frozen=True):
    """A step stopped at the hop that sends this, on the client's stream. ``peer`` is who is to blame, if not it."""

    step: _Number
    attempt: _Number
    code: RefusalCode
    reason: _Reason
    peer: _Peer | None = None


class Draining(Message, frozen=True):
    """To the client: this server leaves in ``seconds``; move the session at the next step."""

    seconds: _Seconds


class CloseSession(Message, frozen=True):
    """By the client: free the caches."""


class Ping(Message, frozen=True):
    """Answered by the event loop, not by the compute thread: an answer says that the process is alive."""

    nonce: _Number


class Pong(Message, frozen=True):
    """``step``, ``length``: the last step seen and tokens held by the stream's session, if it has one.
    ``busy``: a part of it waits or runs.
    """

    nonce: _Number
    step: _Number = 0
    length: _Position = 0
    busy: bool = False


# -- requests without a session ----------------------------------------------------------------------------------


class GetInfo(Message, frozen=True):
    """Answered by `Info`."""


class Info(Message, frozen=True):
    record: ServerRecord
    limits: Limits


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

    model: _Text
    start: _Block
    end: _Block
    capture: bool = False
    edits: _Edits = []
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
    kept: _Id | None = None


class AdapterSum(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Add the gradients of the adapter to the sum of this random id, unless ``number`` has been added already."""

    id: _Id
    number: _Number


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

    model: _Text
    start: _Block
    end: _Block
    edits: _Edits = []
    adapter: AdapterUse | None = None
    adapter_grads: bool = False
    kept: _Id | None = None
    sum: AdapterSum | None = None


class TakeSum(Message, frozen=True):
    """Fetch the gradients of the adapters of blocks ``[start, end)`` that were added up. Once."""

    id: _Id
    start: _Block
    end: _Block


class SummedGradients(Message, frozen=True):
    """Of the parts of these numbers together. Tensors as in `AdapterPart`."""

    numbers: Annotated[list[_Number], msgspec.Meta(max_length=65536)]


class BackwardResult(Message, frozen=True):
    """Tensors: ``grad`` like the input, ``grad_carry.N``; those of the adapter, named as in `AdapterPart`.

    ``summed``: they have been added to the sum, and are not here.
    """

    timing: HopTiming
    summed: bool = False


# -- teaching together --------------------------------------------------------------------------------------------


class JoinTeaching(Message, frozen=True):
    """The first words on a stream between two who teach together, by the opener; answered by the other's own.

    The stream then carries `TeachingProgress` both ways and `BeginRound` from whoever calls the round. A peer that
    teaches something else answers with its `TeachingManifest` and closes.
    """

    name: Name
    digest: Digest
    member: Annotated[str, msgspec.Meta(max_length=60)] = ""
    reachable: bool = True


class GetTeaching(Message, frozen=True):
    """Answered by `TeachingManifest`."""


class TeachingManifest(Message, frozen=True):
    teaching: Teaching


class TeachingProgress(Message, frozen=True):
    """How far the sender is; at every change of ``state``, and at least every few seconds.

    Attributes
    ----------
    turn
        Number of the round the sender asks for, counted by itself.
    steps, samples
        In all, its own.
    fresh
        Samples since its last round: its weight in the next.
    round
        Rounds that its parameters went through.
    lineage
        What its parameters go back to.
    finished
        It has no more steps to do, and waits for the others to get there.
    """

    state: TeacherState
    turn: _Number
    steps: _Number
    samples: _Number
    fresh: _Number
    round: _Number
    lineage: Lineage
    finished: bool = False


class BeginRound(Message, frozen=True):
    """By the peer that coordinates: average now, with these, in this order, with these weights.

    ``turns``: the turn of each that this answers; who has moved on since ignores it. ``last``: all have finished.
    """

    group: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    round: _Number
    peers: Annotated[list[_Peer], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)]
    weights: Annotated[
        list[Annotated[float, msgspec.Meta(ge=0, le=1e15)]], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)
    ]
    turns: Annotated[list[_Number], msgspec.Meta(min_length=1, max_length=MAX_PARTICIPANTS)]
    last: bool = False


class GetTeachingState(Message, frozen=True):
    """Answered by `TeachingState` frames, the last of which reaches the end."""

    name: Name
    digest: Digest


class TeachingState(Message, frozen=True):
    """Tensor: ``values`` [n] float32, from ``position`` on."""

    lineage: Lineage
    round: _Number
    position: _Number


AnyMessage = (
    Hello
    | Welcome
    | Refused
    | OpenSession
    | Queued
    | SessionOpened
    | Relink
    | Relinked
    | AttachSession
    | Attached
    | Step
    | StepResult
    | Captured
    | StepFailed
    | Draining
    | CloseSession
    | Ping
    | Pong
    | GetInfo
    | Info
    | PutAdapter
    | AdapterStored
    | GetAdapter
    | AdapterInfo
    | OfferAdapter
    | WithdrawAdapter
    | AdapterOffered
    | Forward
    | ForwardResult
    | Backward
    | BackwardResult
    | TakeSum
    | SummedGradients
    | JoinTeaching
    | GetTeaching
    | TeachingManifest
    | TeachingProgress
    | BeginRound
    | GetTeachingState
    | TeachingState
)
