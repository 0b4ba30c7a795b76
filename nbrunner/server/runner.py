"""A server's life: load, join, measure, serve, announce, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, TypeVar

import msgspec
import torch

from nbrunner.blocks.adapters import BlockAdapter, check_adapter
from nbrunner.blocks.batching import Batcher
from nbrunner.blocks.batching_probe import choose_joining
from nbrunner.blocks.checkpoint import Checkpoint, resolve_checkpoint
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import BadPeerDataError, BootstrapError, NBRunnerError, ServerStartError, UserInputError
from nbrunner.protocol.credentials import Invite, Role, SwarmKey
from nbrunner.protocol.identity import short_peer
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.records import ServerRecord
from nbrunner.server.adapters import PEERS
from nbrunner.server.announce import Announcer
from nbrunner.server.compute import ComputeThread
from nbrunner.server.handler import Handler
from nbrunner.server.host import Host, Speed, measure
from nbrunner.server.load import (
    CACHE_SHARE,
    Placement,
    blocks_that_fit,
    check_blocks,
    choose_placement,
    dtype_hint,
    free_bytes,
    session_tokens,
)
from nbrunner.server.options import ServerOptions
from nbrunner.server.scheduler import Urgency
from nbrunner.server.threads import Threads
from nbrunner.swarm.daemon import split_address
from nbrunner.swarm.directory import Directory
from nbrunner.swarm.node import Node
from nbrunner.swarm.placement import choose_span

logger = logging.getLogger(__name__)

T = TypeVar("T")

Membership = tuple[Invite | None, SwarmKey | None]

_DIRECTORY_REFRESH = 15.0


Adapters = list[tuple[str, dict[int, BlockAdapter]]]
"""Name, and the adapters of all blocks."""


class _Loaded(NamedTuple):
    span: BlockSpan
    speed: Speed
    batcher: Batcher
    lens: Lens | None


class _Opened(NamedTuple):
    checkpoint: Checkpoint
    placement: Placement
    loaded: _Loaded | None


class BlockServer:
    """One server in this process. All methods run in one event loop.

    ::

        server = BlockServer(options)
        await server.start()        # ONLINE when it returns
        await server.wait_lost()    # returns only if its p2p daemon dies
        await server.drain()        # lets sessions move, says goodbye, closes

    Parameters
    ----------
    options
        What to serve, where and how.
    membership
        The invite or swarm key, if it becomes known only later: loading begins at once.
    on_joined
        Called when the swarm has been joined, usually before the blocks are loaded.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        membership: Awaitable[Membership] | None = None,
        on_joined: Callable[[BlockServer], None] | None = None,
    ) -> None:
        self.options = options
        self.drain_seconds = options.drain_seconds
        self._membership = membership
        self._on_joined = on_joined
        self._swarm_key = options.swarm_key
        self._node: Node | None = None
        self._host: Host | None = None
        self._handler: Handler | None = None
        self._announcer: Announcer | None = None
        self._directory: Directory | None = None
        self._threads = Threads(options.threads)
        self._following: asyncio.Task[None] | None = None
        self._compute = ComputeThread(initialize=self._threads.apply)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def node(self) -> Node:
        if self._node is None:
            raise ServerStartError("the server has not joined its swarm yet")
        return self._node

    @property
    def host(self) -> Host:
        if self._host is None:
            raise ServerStartError("the server has not started yet")
        return self._host

    @property
    def blocks(self) -> tuple[int, int]:
        return self.host.span.start, self.host.span.end

    @property
    def sessions(self) -> int:
        """Open now."""
        return len(self._handler.sessions) if self._handler else 0

    @property
    def threads(self) -> int:
        """Of torch, in each thread that computes."""
        return self._threads.count

    def make_invite(self, role: Role = "use") -> Invite | None:
        """An invite that names this server as the way in; None unless this is the swarm's creator."""
        return self._swarm_key.invite(self.node.addresses, role=role) if self._swarm_key else None

    # -- start ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the blocks while the p2p daemon comes up, then serve and announce.

        Raises
        ------
        UserInputError
            Model, blocks, device or invite that cannot be used. Nothing has been announced.
        ServerStartError, BootstrapError
            The daemon did not start; nobody of the swarm answered.
        """
        began = time.perf_counter()
        loading = asyncio.create_task(self._open(), name="load")
        joining = asyncio.create_task(self._join(), name="join")
        try:
            await asyncio.wait({loading, joining}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (loading, joining):
                if task.done():
                    task.result()
            checkpoint, placement, loaded = await loading
            await joining
            if loaded is None:
                blocks = await self._choose_blocks(checkpoint, placement)
                loaded = await self._in_thread(
                    lambda: _load_span(checkpoint, placement, blocks, lens=self.options.lens)
                )
            self._threads.apply()  # here too: brief steps run in this thread
            await self._serve(checkpoint, placement, loaded)
        except BaseException:
            for task in (loading, joining):
                task.cancel()
            await asyncio.gather(loading, joining, return_exceptions=True)
            await self.close()
            raise
        logger.info(
            "online after %.1f s: blocks [%d, %d) of %s, peer %s",
            time.perf_counter() - began,
            *self.blocks,
            checkpoint.uid,
            short_peer(self.node.peer_id),
        )

    async def _open(self) -> _Opened:
        """Find the model; load its blocks too if it is known which."""
        options = self.options

        def work() -> _Opened:
            checkpoint = resolve_checkpoint(
                options.model, revision=options.revision, token=options.token, cache_dir=options.cache_dir
            )
            placement = choose_placement(checkpoint, options.device, options.dtype, options.quantize)
            if options.blocks is None:
                return _Opened(checkpoint, placement, None)
            check_blocks(options.blocks, checkpoint)
            loaded = _load_span(checkpoint, placement, options.blocks, lens=options.lens)
            return _Opened(checkpoint, placement, loaded)

        return await self._in_thread(work)

    async def _join(self) -> None:
        options = self.options
        invite, self._swarm_key = options.invite, options.swarm_key
        if self._membership is not None:
            invite, self._swarm_key = await self._membership
        deadline = time.monotonic() + options.bootstrap_wait
        while True:
            try:
                self._node = await Node.create(
                    invite=invite,
                    identity=options.identity,
                    swarm_key=self._swarm_key,
                    listen=tuple(options.listen),
                    announce=options.announce,
                )
                break
            except BootstrapError as error:
                if self._swarm_key is not None and invite is not None:
                    logger.info("nobody of the swarm is where they were last; beginning it again (%s)", error)
                    invite = None
                elif time.monotonic() >= deadline:
                    raise
                else:
                    await asyncio.sleep(0.5)
        self._threads.take_seat(self._node.folder)
        if self._node.terms.role != "host":
            raise UserInputError(
                "this invite lets you use the swarm, not host blocks: ask its creator for one with role 'host'"
            )
        logger.info("joined as %s, listening on %s", self._node.peer_id, ", ".join(self._node.addresses))
        if self._on_joined is not None:
            self._on_joined(self)

    async def _choose_blocks(self, checkpoint: Checkpoint, placement: Placement) -> tuple[int, int]:
        options = self.options
        count = await self._in_thread(lambda: blocks_that_fit(checkpoint, placement, options.max_memory))
        if options.num_blocks is not None:
            check_blocks((0, options.num_blocks), checkpoint)
            count = options.num_blocks
        records = (await self.node.fetch_records()).items()
        others = [
            record for peer, record in records if record.model == checkpoint.uid and peer != self.node.peer_id
        ]
        return choose_span(others, checkpoint.num_blocks, count)

    async def _serve(self, checkpoint: Checkpoint, placement: Placement, loaded: _Loaded) -> None:
        span, speed, batcher, lens = loaded
        limits = self._limits(checkpoint, placement, span)
        self._host = Host(
            node=self.node,
            span=span,
            model=checkpoint.uid,
            num_blocks=checkpoint.num_blocks,
            compute=self._compute,
            limits=limits,
            speed=speed,
            lens=lens,
            accepts_adapters=self.options.accept_adapters,
            batcher=batcher,
        )
        if hint := dtype_hint(self.options.dtype, placement, span.nbytes):
            logger.info("%s", hint)
        for name, blocks in await self._in_thread(lambda: _load_adapters(self.options, checkpoint, span, limits)):
            logger.info("serving adapter %s", self._host.served.begin_with(name, blocks))
        base = ServerRecord(
            model=checkpoint.uid,
            num_blocks=checkpoint.num_blocks,
            start=span.start,
            end=span.end,
            state="joining",
            name=self.options.name[:60],
            dtype=str(span.dtype).removeprefix("torch."),
            quantization=span.quantization,
            version=_version(),
            features=[f"batch-{batcher.layout}", *(["lens"] if lens is not None else [])],
            started=time.time(),
            addresses=[split_address(address)[0] for address in self.node.addresses[:8]],
        )
        self._announcer = Announcer(self.node, base)
        self._directory = Directory(self.node, refresh=_DIRECTORY_REFRESH, targets=self._announcer.successors)
        self._announcer.attach(self._host, self._directory)
        self._handler = Handler(self._host, self._announcer.record, self._announcer.changed)
        await self.node.serve(self._handler, limits)
        # only now: whoever reads ONLINE may open a session at once, and is answered
        if not await self._announcer.set_state("online"):
            logger.warning("no node of the swarm took our record yet; trying again")
        self._announcer.start()
        await self._directory.start()
        self._following = asyncio.create_task(self._threads.follow(self._compute, self._host), name="threads")

    def _limits(self, checkpoint: Checkpoint, placement: Placement, span: BlockSpan) -> Limits:
        limits, options = self.options.limits, self.options
        cache = options.cache_bytes or limits.cache_bytes or int(free_bytes(placement.device) * CACHE_SHARE)
        if options.max_memory is not None:
            if span.nbytes >= options.max_memory:
                raise UserInputError(
                    f"blocks [{span.start}, {span.end}) take {span.nbytes / 1e6:.0f} MB, and "
                    f"{options.max_memory / 1e6:.0f} MB are allowed for them and their caches: "
                    "serve fewer blocks, or allow more memory"
                )
            # adapters and kept passes, which are bounded below, take the other third
            cache = min(cache, (options.max_memory - span.nbytes) * 2 // 3)
        return msgspec.structs.replace(
            limits,
            cache_bytes=cache,
            peer_cache_bytes=min(limits.peer_cache_bytes, cache),
            session_tokens=limits.session_tokens or session_tokens(checkpoint),
            adapter_bytes=min(limits.adapter_bytes, cache // (4 * PEERS)),
            kept_bytes=min(limits.kept_bytes, cache // 4),
        )

    # -- while it runs, and the end ------------------------------------------------------------------------------

    async def wait_lost(self) -> str:
        """Return when the p2p daemon has died, with the end of its log."""
        return await self.node.wait_lost()

    @property
    def state(self) -> str:
        """As announced, and ``paused`` for a server that takes nothing new for now."""
        if self._announcer is None:
            return "offline" if self._host is not None else "joining"
        return "paused" if self._handler is not None and self._handler.paused else self._announcer.state

    async def pause(self) -> None:
        """Take no new sessions until `resume`; what is open goes on.

        The record says ``draining``, which every client knows how to avoid, and ``paused`` among its features.
        """
        if self._handler is not None and self._announcer is not None and self._announcer.state == "online":
            self._handler.paused = True
            await self._announcer.set_state("draining", "paused")

    async def resume(self) -> None:
        """Take new sessions again."""
        if self._handler is not None and self._announcer is not None and self._handler.paused:
            self._handler.paused = False
            await self._announcer.set_state("online")

    async def drain(self, seconds: float | None = None) -> None:
        """Leave politely: take nothing new, wait until sessions have moved or the time is over, then close."""
        seconds = self.drain_seconds if seconds is None else seconds
        if self._handler is not None and self._announcer is not None and not self.node.closed:
            self._handler.paused = False
            await self._handler.announce_draining(seconds)
            await self._announcer.set_state("draining")
            try:
                async with asyncio.timeout(seconds):
                    await self._handler.empty.wait()
            except TimeoutError:
                logger.warning("%d sessions did not move in %.0f s", len(self._handler.sessions), seconds)
        await self.close()

    async def close(self) -> None:
        """Leave now. Sessions here are lost to their clients, which rebuild them elsewhere."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            self._following = None
        self._threads.close()
        if self._announcer is not None:
            await self._announcer.close()
            if self._node is not None and not self._node.closed and self._announcer.state != "joining":
                try:
                    async with asyncio.timeout(2.0):
                        await self._announcer.set_state("offline")
                except (TimeoutError, NBRunnerError) as error:
                    logger.debug("could not say goodbye: %s", error)
            self._announcer = None
        if self._directory is not None:
            await self._directory.close()
            self._directory = None
        if self._node is not None:
            await self._node.close()
        if self._host is not None:
            self._host.kept.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._compute.close)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run in the compute thread: torch's per-thread settings and the first touch of weights belong there."""
        return (await self._compute.submit(function, Urgency.STATELESS)).value


def _load_span(checkpoint: Checkpoint, placement: Placement, blocks: tuple[int, int], *, lens: bool) -> _Loaded:
    began = time.perf_counter()
    span = BlockSpan.load(
        checkpoint, *blocks, dtype=placement.dtype, device=placement.device, quantize=placement.quantize
    )
    loaded = time.perf_counter()
    speed = measure(span)
    batcher = Batcher(span, choose_joining(span))
    logger.info(
        "loaded blocks [%d, %d) as %s%s on %s in %.1f s; threads: %d; %.1f ms per token, %.0f tokens/s in prompts; "
        "steps of several sessions: %s",
        *blocks,
        str(span.dtype).removeprefix("torch."),
        "" if span.quantization == "none" else f" with {span.quantization} weights",
        span.device,
        loaded - began,
        torch.get_num_threads(),
        speed.step_seconds * 1e3,
        speed.prefill_tokens_per_second,
        batcher.layout,
    )
    held = Lens.load(checkpoint, placement.dtype, placement.device) if lens else None
    if held is not None:
        logger.info("loaded final norm and head for lenses: %.0f MB", held.nbytes / 1e6)
    return _Loaded(span, speed, batcher, held)


def _load_adapters(options: ServerOptions, checkpoint: Checkpoint, span: BlockSpan, limits: Limits) -> Adapters:
    """The adapters to serve, those of the blocks that are here on the span's device. `UserInputError` by name."""
    from nbrunner.blocks.peft_files import find_adapter, load_peft_adapter

    names = [name for name, _ in options.adapters]
    if len(set(names)) < len(names):
        raise UserInputError("two adapters cannot have the same name")
    loaded: Adapters = []
    for name, source in options.adapters:
        folder = find_adapter(source, token=options.token, cache_dir=options.cache_dir)
        blocks = load_peft_adapter(checkpoint, folder)
        for block in range(span.start, span.end):
            if block not in blocks:
                continue
            try:
                check_adapter(
                    blocks[block],
                    block,
                    widths=span.linears(block),
                    hidden_shape=span.hidden_shape,
                    max_rank=limits.adapter_rank,
                    max_prompt=limits.prompt_tokens,
                )
            except BadPeerDataError as error:
                raise UserInputError(f"adapter {name}: {error}") from None
            blocks[block] = blocks[block].placed(span.device)
        loaded.append((name, blocks))
    return loaded


def _version() -> str:
    try:
        return version("nbrunner")
    except PackageNotFoundError:
        return "checkout"
