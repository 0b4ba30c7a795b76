"""No, and why: the reasons that a peer can give, and how it says so outside of a step."""

from __future__ import annotations

from typing import Literal

from nbrunner.protocol.schema import Message, Reason, Seconds

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


class Refused(Message, frozen=True):
    """No, and why. The peer that refuses is the one at the other end unless ``peer`` names another."""

    code: RefusalCode
    reason: Reason
    retry_after: Seconds | None = None
