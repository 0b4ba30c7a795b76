"""What all messages are made of: their base, and the types of their fields.

Every message is a tagged struct; decoding checks types, ranges and lengths, so that what arrives in a handler
has the right form. Whether it makes *sense* (positions, shapes, quotas) is checked where the state is.
Tensors travel beside the message in the same frame (`nbrunner.protocol.frames`), named as each class says.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Id = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern="^[0-9a-f]+$")]
Peer = Annotated[str, msgspec.Meta(min_length=40, max_length=60)]
Text = Annotated[str, msgspec.Meta(max_length=200)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Block = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """Base of all messages; on the wire each is a map whose ``type`` is its name in lower case."""
