"""Frames: how a message and its tensors become bytes, and back, without trusting the sender.

::

    header length (u32, big endian) | body length (u32) | header | body
    header = msgpack [message, [[name, dtype, shape], …]]
    body   = the tensors' bytes, one after the other, in that order

Both lengths are checked before anything of that size is read or allocated. Bytes here are opaque: the names and
shapes are checked against the body's length; turning them into torch tensors is `nbrunner.protocol.tensors`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.limits import MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_TENSORS
from nbrunner.protocol.messages import AnyMessage

Buffer = bytes | bytearray | memoryview

DType = Literal["float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}

PREFIX = struct.Struct(">II")


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Name, dtype and shape of one tensor in a frame's body."""

    name: Annotated[str, msgspec.Meta(max_length=40)]
    dtype: DType
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**31)]], msgspec.Meta(max_length=6)]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class RawTensor(NamedTuple):
    """A tensor as it travels: its spec and its bytes."""

    spec: TensorSpec
    data: Buffer


_HEADER_DECODER = msgspec.msgpack.Decoder(
    tuple[AnyMessage, Annotated[list[TensorSpec], msgspec.Meta(max_length=MAX_TENSORS)]]
)
_ENCODER = msgspec.msgpack.Encoder()


def encode_frame(message: AnyMessage, tensors: Sequence[RawTensor] = ()) -> list[Buffer]:
    """The buffers to write, in order; tensor bytes are passed through, not copied.

    Raises
    ------
    ValueError
        If the frame is larger than any peer would accept: the caller must split its work first.
    """
    header = _ENCODER.encode((message, [tensor.spec for tensor in tensors]))
    body = sum(tensor.spec.nbytes for tensor in tensors)
    if len(header) > MAX_HEADER_BYTES or body > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(header)} + {body} bytes is over the limit of {MAX_FRAME_BYTES}")
    return [PREFIX.pack(len(header), body) + header, *(tensor.data for tensor in tensors)]


def check_prefix(prefix: bytes, max_body: int = MAX_FRAME_BYTES) -> tuple[int, int]:
    """Lengths of header and body from a frame's first eight bytes; `BadPeerDataError` if over the limits."""
    header, body = PREFIX.unpack(prefix)
    if header > MAX_HEADER_BYTES or body > max_body:
        raise BadPeerDataError(
            f"frame of {header} + {body} bytes, at most {MAX_HEADER_BYTES} + {max_body} are allowed"
        )
    return header, body


def decode_frame(header: bytes, body: Buffer) -> tuple[AnyMessage, dict[str, RawTensor]]:
    """The message and its tensors; `BadPeerDataError` if the bytes are not a frame."""
    try:
        message, specs = _HEADER_DECODER.decode(header)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BadPeerDataError(f"not a message of this protocol: {str(error)[:300]}") from None
    if sum(spec.nbytes for spec in specs) != len(body):
        raise BadPeerDataError(f"tensors of {sum(spec.nbytes for spec in specs)} bytes announced, {len(body)} sent")
    view, offset, tensors = memoryview(body), 0, {}
    for spec in specs:
        if spec.name in tensors:
            raise BadPeerDataError(f"tensor {spec.name!r} sent twice")
        tensors[spec.name] = RawTensor(spec, view[offset : offset + spec.nbytes])
        offset += spec.nbytes
    return message, tensors
