"""What crosses the network, as pure data: identities, invites, records, messages, frames, tensors, limits.

Nothing here does I/O, and only `nbrunner.protocol.tensors` and `finite` import torch. The rules are written out in
``docs/protocol.md``.
"""
