"""Adapters: how servers get them, under which names they serve them, and how blocks are run with them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nbrunner.protocol.schema import Block, Message, Number, Text

_Digest = Annotated[bytes, msgspec.Meta(max_length=32)]
AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class LoraPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One low-rank change of the linear module of that name inside a block (`nbrunner.blocks.adapters`)."""

    module: Text
    scaling: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


class AdapterPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The adapter of one block. Tensors: ``lora.BLOCK.K.a`` and ``.b`` of the K-th of ``loras``, which are in the
    order of their modules' names; ``prompt.BLOCK`` if it has one.
    """

    block: Block
    loras: Annotated[list[LoraPart], msgspec.Meta(max_length=1024)] = []
    prompt: bool = False


class PutAdapter(Message, frozen=True):
    """Keep adapters of some blocks for later requests and sessions, which name them by their digests."""

    model: Text
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
    model: Text
    blocks: Annotated[list[_Digest], msgspec.Meta(min_length=1, max_length=4096)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    targets: Annotated[list[Text], msgspec.Meta(max_length=64)] = []
    author: Annotated[str, msgspec.Meta(max_length=60)] = ""


class GetAdapter(Message, frozen=True):
    """Answered by `AdapterInfo`."""

    adapter: Text


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

    adapter: Text


class AdapterOffered(Message, frozen=True):
    adapter: Text


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
    seed: Number | None = None
    first_row: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
