"""Every bound a peer enforces, announced in its `Welcome` so that the other side can keep to it."""

from __future__ import annotations

import msgspec

MAX_HEADER_BYTES = 1 << 20
"""A frame's header: the message without its tensors. Checked before it is read."""

MAX_FRAME_BYTES = 64 << 20
"""A frame's tensors. 4,096 tokens of hidden 8192 in bf16. Larger work travels in parts."""

MAX_TENSORS = 4096
"""Tensors of one frame: adapters of many blocks travel in one."""

MAX_RECORD_BYTES = 4096
"""A signed DHT record. A usual one has 0.7 kB."""

MAX_RECORD_LIFETIME = 180.0
"""Seconds from now that a DHT record may live. Servers renew theirs every 20 s."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What one server allows one peer.

    Attributes
    ----------
    frame_bytes
        Bytes of tensors in one frame.
    part_tokens
        Tokens times rows in one part of a step.
    batch
        Rows (sequences or beams) of one session or request.
    session_tokens
        Length to which a session may grow.
    sessions
        Sessions one peer may hold open at once.
    cache_bytes
        Bytes of KV caches and transcripts over all sessions of the server.
    peer_cache_bytes
        The same over all sessions of one peer; 0 for no other limit than that.
    tokens_per_second
        Tokens times rows that one peer may have computed each second; 0 for no limit. An invite may allow less.
    pending_parts
        Parts of steps one session may have waiting.
    waiting, wait_seconds
        Sessions of one peer that may wait for memory at a time, and for how long; over all peers sixteen times as
        many.
    adapter_rank
        Highest rank of a low-rank change.
    adapter_bytes
        Bytes of adapters that one peer may keep here; over all peers it is four times as much.
    prompt_tokens
        Longest prompt of a block.
    kept_bytes
        Bytes of passes kept for their gradients, over all peers; one of them may have half.
    """

    frame_bytes: int = MAX_FRAME_BYTES
    part_tokens: int = 8192
    batch: int = 128
    session_tokens: int = 131072
    sessions: int = 32
    cache_bytes: int = 4 << 30
    peer_cache_bytes: int = 0
    tokens_per_second: float = 0.0
    pending_parts: int = 256
    waiting: int = 4
    wait_seconds: float = 60.0
    adapter_rank: int = 256
    adapter_bytes: int = 256 << 20
    prompt_tokens: int = 4096
    kept_bytes: int = 2 << 30
