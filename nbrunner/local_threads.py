"""A server in a thread of this process, seen like one in a process of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import time
from typing import Any

from nbrunner.errors import NBRunnerError, ServerStartError
from nbrunner.protocol.limits import Limits
from nbrunner.server.options import ServerOptions
from nbrunner.server.process import facts_of, read_membership
from nbrunner.server.runner import BlockServer, Membership
from nbrunner.swarm.loop import EngineLoop

_CLOSE_SECONDS = 10.0


class ThreadServer:
    """One server of a ``LocalSwarm(in_process=True)``: its loop is the engine's, its blocks have a thread.

    Attributes
    ----------
    blocks : tuple of int
        ``(start, end)``.
    peer_id : str
    pid : int
        Of this process.
    """

    log = ""
    """What it logs goes to this process's logging."""

    def __init__(self, model: str, blocks: tuple[int, int], **settings: Any) -> None:
        self.blocks = blocks
        self.peer_id = ""
        self.addresses: list[str] = []
        self.pid = os.getpid()
        self._engine = EngineLoop.get()
        self._membership: concurrent.futures.Future[Membership] = concurrent.futures.Future()
        self._joined: concurrent.futures.Future[list[str]] = concurrent.futures.Future()
        self._ended = False
        options = ServerOptions(
            model=model,
            blocks=blocks,
            listen=("/ip4/127.0.0.1/tcp/0",),
            limits=Limits(cache_bytes=0, session_tokens=0),
            **settings,
        )
        self._started = self._engine.submit(self._start(options))

    async def _start(self, options: ServerOptions) -> BlockServer:
        def joined(server: BlockServer) -> None:
            self._joined.set_result(list(server.node.addresses))

        self._server = BlockServer(options, membership=asyncio.wrap_future(self._membership), on_joined=joined)
        try:
            await self._server.start()
        except BaseException as error:
            if not self._joined.done():
                self._joined.set_exception(
                    error if isinstance(error, NBRunnerError) else ServerStartError(str(error))
                )
            raise
        return self._server

    @property
    def alive(self) -> bool:
        """Whether it has not been ended."""
        return not self._ended

    def tell(self, line: str) -> None:
        """Its invite or swarm key."""
        if not self._membership.done():
            self._membership.set_result(read_membership(line))

    def wait_for(self, event: str, deadline: float) -> dict[str, Any]:
        """The facts of ``joined`` or ``ready``; or the error it failed with."""
        left = max(0.0, deadline - time.monotonic())
        try:
            if event == "joined":
                return {"addresses": self._joined.result(left)}
            return facts_of(self._started.result(left))
        except TimeoutError:
            raise ServerStartError(f"a server in this process was not {event} in time") from None

    def end(self) -> None:
        """Nothing to begin: `kill` does it."""

    def kill(self) -> None:
        """Close it now, without waiting for its sessions."""
        self._close(drain=False)

    def stop(self, timeout: float = 35.0) -> None:
        """Let its sessions move, say goodbye, close."""
        self._close(drain=True, timeout=timeout)

    def _close(self, *, drain: bool, timeout: float = _CLOSE_SECONDS) -> None:
        if self._ended:
            return
        self._ended = True
        if not self._started.done():
            self._started.cancel()  # closes what it has opened
        with contextlib.suppress(TimeoutError, NBRunnerError, concurrent.futures.CancelledError):
            self._engine.run(self._leave(drain=drain), timeout=timeout)

    async def _leave(self, *, drain: bool) -> None:
        server = getattr(self, "_server", None)
        if server is None:
            return
        await (server.drain() if drain else server.close())

    def __repr__(self) -> str:
        return f"<ThreadServer blocks {self.blocks[0]}:{self.blocks[1]}{'' if self.alive else ', ended'}>"
