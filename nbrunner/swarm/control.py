"""The little of p2pd's control protocol that hivemind's `P2P` does not give us in the form we need.

`P2P` hands out `asyncio.StreamReader`s, which pause at 128 KiB and copy everything twice; our streams read a large
body straight into its place. So streams are opened and accepted here, on p2pd's own socket
(https://github.com/libp2p/go-libp2p-daemon/blob/master/specs/CONTROL.md): varint-delimited protobufs, then the
socket is the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from nbrunner.errors import PeerUnreachableError
from nbrunner.protocol.identity import short_peer

_MAX_CONTROL_BYTES = 1 << 20


class ControlError(Exception):
    """p2pd said that it could not do what was asked."""


def encode_delimited(message: Any) -> bytes:
    """A protobuf with its length before it."""
    return delimited(message.SerializeToString())


def delimited(payload: bytes) -> bytes:
    """Bytes with their length before them as a varint."""
    length, prefix = len(payload), bytearray()
    while True:
        length, low = length >> 7, length & 0x7F
        prefix.append(low | (0x80 if length else 0))
        if not length:
            return bytes(prefix) + payload


def split_delimited(data: bytes | bytearray) -> tuple[bytes, int] | None:
    """The first delimited message in ``data`` and the bytes it took; None if more are needed."""
    length = shift = 0
    for index, byte in enumerate(data[:5]):
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            if length > _MAX_CONTROL_BYTES:
                raise ControlError(f"p2pd announced a message of {length} bytes")
            end = index + 1 + length
            return (bytes(data[index + 1 : end]), end) if len(data) >= end else None
    if len(data) >= 5:
        raise ControlError("p2pd sent a length that never ends")
    return None


def open_stream_request(peer: str, protocol: str) -> bytes:
    """What asks p2pd to turn this connection into a stream to a peer."""
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.STREAM_OPEN,
        streamOpen=p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol]),
    )
    return encode_delimited(request)


class NoRouteError(PeerUnreachableError):
    """p2pd could not get to the peer by what it knows of its addresses; the peer may be fine."""


def read_open_reply(payload: bytes, peer: str) -> None:
    """`PeerUnreachableError` unless p2pd has opened the stream."""
    from hivemind.proto import p2pd_pb2

    response = p2pd_pb2.Response.FromString(payload)
    if response.type != p2pd_pb2.Response.OK:
        reason = _plain(response.error.msg)
        no_route = "routing: not found" in reason or "failed to dial" in reason
        kind = NoRouteError if no_route else PeerUnreachableError
        raise kind(f"peer {short_peer(peer)} cannot be reached: {reason}", peer=peer)


def read_incoming(payload: bytes) -> str:
    """The PeerID at the other end of a stream that p2pd passes to us."""
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2

    return str(PeerID(p2pd_pb2.StreamInfo.FromString(payload).peer).to_base58())


async def register_handler(socket: str, protocol: str, listening: str) -> None:
    """Have p2pd pass incoming streams of a protocol to the unix socket ``listening``."""
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    handler = p2pd_pb2.StreamHandlerRequest(
        addr=Multiaddr(f"/unix{listening}").to_bytes(), proto=[protocol], balanced=False
    )
    await _ask(socket, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler))


async def connect(socket: str, peer: str, addresses: Sequence[str]) -> None:
    """Connect to a peer at multiaddresses (without their ``/p2p/…`` part); `ControlError` if none works."""
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    request = p2pd_pb2.ConnectRequest(
        peer=PeerID.from_base58(peer).to_bytes(), addrs=[Multiaddr(address).to_bytes() for address in addresses]
    )
    await _ask(socket, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request))


async def _ask(socket: str, request: Any) -> Any:
    from hivemind.proto import p2pd_pb2

    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        writer.write(encode_delimited(request))
        received = bytearray()
        while (reply := split_delimited(received)) is None:
            chunk = await reader.read(65536)
            if not chunk:
                raise ControlError("p2pd closed its control connection")
            received += chunk
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    response = p2pd_pb2.Response.FromString(reply[0])
    if response.type != p2pd_pb2.Response.OK:
        raise ControlError(_plain(response.error.msg))
    return response


def _plain(message: str) -> str:
    """The last cause of a Go error chain, which is the part that a person can act on."""
    lines = [line.strip(" *\t") for line in message.splitlines() if line.strip(" *\t")]
    return "; ".join(lines[:3])[:300] if lines else "no reason given"
