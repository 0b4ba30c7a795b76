"""Changes of hidden states, as sessions and requests ask for them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nbrunner.protocol.schema import Block, Position


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
    layer: Block
    begin: Position = 0
    end: Position | None = None
    row: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    factor: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] = 1.0
    vector: Annotated[int, msgspec.Meta(ge=0, le=9999)] | None = None


EditOps = Annotated[list[EditOp], msgspec.Meta(max_length=1024)]
