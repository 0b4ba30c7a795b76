"""One round of averaging: hivemind's butterfly all-reduce, with everything that peers send checked.

Each peer of a group averages a share of the vector: it takes that part from all others, and returns to each the
difference between the average and what that one sent (`hivemind.averaging.allreduce`). Between the wire and the sum
stand the size and dtype that were agreed, numbers only, a bound on how far a part may be from our own, and weights
that all know before the round. The same bound holds for what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind reads typing's own out of the annotations

import numpy as np
import torch
from hivemind.averaging.allreduce import AllreduceException, AllReduceRunner, AveragingMode
from hivemind.averaging.partition import BannedException
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import achain, aiter_with_timeout, as_aiter, attach_event_on_finished

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.identity import short_peer

logger = logging.getLogger(__name__)

_PART_BYTES = 512 << 10
_SMALLEST_PART_BYTES = 16 << 10
_LARGEST_VALUE = 1e18  # no parameter is; larger ones overflow when they are subtracted and squared
_REGISTER_SECONDS = 5.0  # by which a peer may learn of its group later than the others


@dataclass(frozen=True)
class Group:
    """Who averages: PeerIDs in the order of their shares, the weight of each, and whether it can take a share."""

    id: bytes
    peers: Sequence[str]
    weights: Sequence[float]
    reachable: Sequence[bool]


@dataclass
class Averaged:
    """What came of a round.

    Attributes
    ----------
    vector
        New values.
    complete
        The share of the vector that was averaged; the rest, whose averagers failed, is as it was.
    clipped
        PeerID → in how many parts of our share it was too far away.
    refused
        PeerID → what was wrong with what it sent.
    silent
        PeerIDs that sent us nothing, or not all.
    lost
        PeerIDs whose share of the average did not come.
    """

    vector: torch.Tensor
    complete: float = 1.0
    clipped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class CheckedAllReduce(AllReduceRunner):  # type: ignore[misc]
    """hivemind's runner, believing nothing.

    Parameters
    ----------
    limit
        The largest root mean square by which a part may differ from our own; a larger difference is shortened.
    peer_weights
        The weight of each in the group; what a message says about its own weight is not used.
    """

    def __init__(self, *, limit: float, peer_weights: dict[Any, float], **options: Any) -> None:
        super().__init__(**options)
        self._limit = limit
        self._peer_weights = peer_weights
        # as cut by the container, which drops them at the end
        self._sizes = [
            [len(part) for part, _ in parts] for parts in self.tensor_part_container._input_parts_by_peer
        ]
        self.clipped: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.lost: list[str] = []

    async def _accumulate_parts_streaming(self, stream: Any, sender_index: int) -> Any:
        """Take the parts of one sender into the average, and answer each with the difference."""
        sender = self.sender_peer_ids[sender_index]
        done = 0
        try:
            async for message in stream:
                if done >= len(self.parts_for_local_averaging):
                    raise self._refuse(sender, f"more than {done} parts")
                own = self.parts_for_local_averaging[done]
                part = self._read(message.tensor_part, len(own), sender)
                used = self._shorten(part - own, sender).add_(own)
                try:
                    average = await self.tensor_part_reducer.accumulate_part(
                        sender_index, done, used, weight=self._peer_weights[sender]
                    )
                except BannedException:
                    break
                done += 1
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.AVERAGED_PART, tensor_part=serialize_torch_tensor(average - part)
                )
        finally:
            if done != self.tensor_part_reducer.num_parts:
                await self._ban_sender(sender)

    async def _communicate_with_peer(self, peer_id: Any) -> None:
        """Send a peer its share of our vector, and take the differences that it returns."""
        if peer_id == self.peer_id:
            await super()._communicate_with_peer(peer_id)
            return
        index = self.ordered_peer_ids.index(peer_id)
        sizes, done = self._sizes[index], 0
        try:
            sent = asyncio.Event()
            inputs = attach_event_on_finished(self._generate_input_for_peer(index), sent)
            stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(inputs)
            if self.should_delay_results(self.peer_id):
                await sent.wait()
            async for message in aiter_with_timeout(stream, self.reducer_timeout):
                if message.code != averaging_pb2.AVERAGED_PART:
                    raise AllreduceException(f"it answered {averaging_pb2.MessageCode.Name(message.code)}")
                if done >= len(sizes):
                    raise self._refuse(peer_id, f"more than {done} parts")
                delta = self._read(message.tensor_part, sizes[done], peer_id)
                # Twice: what it returns may be as far from its own part as ours is allowed to be.
                delta = self._shorten(delta, peer_id, slack=2.0)
                self.tensor_part_container.register_processed_part(index, done, delta)
                done += 1
            if done != len(sizes):
                raise AllreduceException(f"it answered with {done} parts of {len(sizes)}")
        except BaseException as error:
            if isinstance(error, Exception):
                logger.info("no average from %s: %r", short_peer(peer_id.to_base58()), error)
            self.lost.append(peer_id.to_base58())
            self.tensor_part_container.register_failed_reducer(index)
            raise

    def _read(self, tensor: Any, size: int, peer: Any) -> torch.Tensor:
        """The values of a part, if it is what was agreed."""
        if tensor.compression != runtime_pb2.CompressionType.NONE or tensor.dtype != "float32":
            raise self._refuse(peer, f"a part of {str(tensor.dtype)[:20]!r}, it must be plain float32")
        if list(tensor.size) != [size] or len(tensor.buffer) != 4 * size:
            raise self._refuse(
                peer, f"a part of shape {list(tensor.size)[:6]} in {len(tensor.buffer)} bytes, it must be [{size}]"
            )
        values = torch.from_numpy(np.frombuffer(bytearray(tensor.buffer), dtype=np.float32))
        if not bool((values.abs() <= _LARGEST_VALUE).all()):
            raise self._refuse(peer, "a part with NaN, infinity or absurd values in it")
        return values

    def _shorten(self, delta: torch.Tensor, peer: Any, *, slack: float = 1.0) -> torch.Tensor:
        size = root_mean_square(delta)
        if size <= self._limit * slack:
            return delta
        name = peer.to_base58()
        self.clipped[name] = self.clipped.get(name, 0) + 1
        return delta * (self._limit * slack / size)

    def _refuse(self, peer: Any, what: str) -> BadPeerDataError:
        name = peer.to_base58()
        self.refused[name] = what
        return BadPeerDataError(f"peer {short_peer(name)} sent {what}", peer=name)


class Averaging(ServicerBase):  # type: ignore[misc]
    """Takes part in rounds over one p2p daemon.

    Parameters
    ----------
    p2p
        hivemind's client of it.
    prefix
        Of the handlers' names: the same for those who teach the same.
    admitted
        Whether a PeerID has shown that it belongs here; others are turned away before their data is read.
    """

    def __init__(self, p2p: Any, prefix: str, admitted: Callable[[str], bool]) -> None:
        self._p2p = p2p
        self._prefix = prefix
        self._admitted = admitted
        self._groups: dict[bytes, CheckedAllReduce] = {}
        self._news = asyncio.Condition()

    async def open(self) -> None:
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def close(self) -> None:
        for runner in list(self._groups.values()):
            runner.finalize(cancel=True)
        with contextlib.suppress(Exception):  # the daemon may be gone
            await self.remove_p2p_handlers(self._p2p, namespace=self._prefix)

    async def average(self, vector: torch.Tensor, group: Group, *, limit: float, seconds: float) -> Averaged:
        """Average a vector with a group.

        Parameters
        ----------
        vector
            [n] float32 on the CPU; not changed.
        limit
            See `CheckedAllReduce`.
        seconds
            After this many it is given up.

        Raises
        ------
        TimeoutError
            It was given up; nothing was changed.
        """
        ids = [PeerID.from_base58(peer) for peer in group.peers]
        sharers = sum(group.reachable)
        # Every share in several parts, so that they are averaged while others are on their way.
        part_bytes = min(max(4 * len(vector) // max(4 * sharers, 1), _SMALLEST_PART_BYTES), _PART_BYTES)
        runner = CheckedAllReduce(
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=self._prefix,
            tensors=[vector],
            group_id=group.id,
            ordered_peer_ids=ids,
            peer_fractions=tuple(1.0 / sharers if can else 0.0 for can in group.reachable),
            modes=tuple(AveragingMode.NODE if can else AveragingMode.CLIENT for can in group.reachable),
            weight=group.weights[ids.index(self._p2p.peer_id)],
            part_size_bytes=part_bytes,
            sender_timeout=seconds / 4,
            reducer_timeout=seconds / 2,
            limit=limit,
            peer_weights=dict(zip(ids, group.weights, strict=True)),
        )
        container = runner.tensor_part_container
        try:
            async with self._news:
                self._groups[group.id] = runner
                self._news.notify_all()
            async with asyncio.timeout(seconds):
                deltas = [delta async for delta in runner]
            failed = container.failed_size
        finally:
            self._groups.pop(group.id, None)
        silent = [peer.to_base58() for peer in runner.banned_senders]
        complete = 1.0 - failed / max(len(vector), 1)
        return Averaged(vector + deltas[0], complete, runner.clipped, runner.refused, silent, runner.lost)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A peer sends its values for our share; it is answered with the differences from the average."""
        peer = context.remote_id.to_base58()
        if not self._admitted(peer):
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        try:
            async with asyncio.timeout(_REGISTER_SECONDS):
                first = await stream.__anext__()
                async with self._news:
                    await self._news.wait_for(lambda: first.group_id in self._groups)
        except (TimeoutError, StopAsyncIteration):
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        runner = self._groups.get(first.group_id)
        if runner is None or context.remote_id not in runner.sender_peer_ids:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        async for message in runner.rpc_aggregate_part(achain(as_aiter(first), stream), context):
            yield message


def root_mean_square(values: torch.Tensor) -> float:
    """Of all elements; 0 for none. In doubles, so that no finite values overflow."""
    if values.numel() == 0:
        return 0.0
    return float(values.double().square().mean().sqrt())


def movement(new: torch.Tensor, old: torch.Tensor, sizes: Sequence[int], steps: int) -> float:
    """How far training moves a vector in one step: the largest root mean square among its tensors.

    Parameters
    ----------
    new, old
        [n] float32, ``steps`` steps apart.
    sizes
        Of the tensors that make up the vector.
    """
    if steps <= 0:
        return 0.0
    sizes = [size for size in sizes if size]
    moved = max((root_mean_square(part) for part in torch.split(new - old, sizes)), default=0.0)
    return moved / steps if math.isfinite(moved) else 0.0
