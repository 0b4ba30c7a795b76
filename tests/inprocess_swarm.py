"""A real swarm inside the test's process: daemons, DHT, streams and servers, whose insides a test can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import wait_until

from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.limits import Limits
from nbrunner.server.options import ServerOptions
from nbrunner.server.runner import BlockServer
from nbrunner.swarm.loop import EngineLoop

ROOMY = Limits(cache_bytes=64 << 20, session_tokens=4096)


class InProcessSwarm:
    """Servers of one checkpoint. The first one added begins the swarm; it serves block 0 as a rule and stays."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.key = SwarmKey()
        self.servers: list[BlockServer] = []
        self._first: Invite | None = None

    @property
    def invite(self) -> Invite:
        assert self._first is not None
        return self._first

    def add(
        self,
        start: int,
        end: int,
        *,
        limits: Limits = ROOMY,
        dtype: str = "float32",
        lens: bool = False,
        threads: int = 1,
        **options: Any,
    ) -> BlockServer:
        """A server that is online when this returns."""
        options = ServerOptions(
            model=str(self.model),
            blocks=(start, end),
            invite=self._first,
            swarm_key=self.key if self._first is None else None,
            device="cpu",
            dtype=dtype,
            threads=threads,
            limits=limits,
            lens=lens,
            **options,
        )
        server = BlockServer(options)
        EngineLoop.get().run(server.start(), timeout=60)
        self.servers.append(server)
        if self._first is None:
            self._first = server.make_invite("host")
        return server

    def remove(self, server: BlockServer) -> None:
        """Take it down without a word to its clients."""
        self.servers.remove(server)
        EngineLoop.get().run(server.close(), timeout=30)

    def close(self) -> None:
        for server in reversed(self.servers):
            EngineLoop.get().run(server.close(), timeout=30)
        self.servers = []

    def seen_by(self, model: Any) -> None:
        """Wait until a client knows exactly the servers there are."""
        directory = model.swarm.directory
        wanted = {server.node.peer_id for server in self.servers}

        def known() -> bool:
            EngineLoop.get().run(directory.refresh(), timeout=10)
            return set(directory.view.servers) == wanted

        wait_until(known, 30, what="the client knows all servers")


@contextmanager
def changed_results(server: BlockServer, change: Callable[[Any], Any]) -> Iterator[list[int]]:
    """A server whose results, of forward passes and of backward passes, are what ``change`` makes of them.

    Gives a list that grows with each.
    """
    span, used = server.host.span, []
    forward, backward, trace = span.forward, span.backward, span.trace

    def changed(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            used.append(1)
            span.trace = trace  # a backward pass runs its own forward pass, which is not a result
            try:
                return change(method(*args, **kwargs))
            finally:
                span.trace = traced

        return call

    def traced(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        kept = trace(*args, **kwargs)
        kept.output, kept.backward = change(kept.output), changed(kept.backward)
        return kept

    span.forward, span.backward, span.trace = changed(forward), changed(backward), traced
    try:
        yield used
    finally:
        del span.forward, span.backward, span.trace


@contextmanager
def spoiled(server: BlockServer, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[int]]:
    """A server whose hidden states and their gradients are changed by ``spoil`` on their way out."""

    def change(result: Any) -> Any:
        return type(result)(spoil(result.hidden), *list(vars(result).values())[1:])

    with changed_results(server, change) as used:
        yield used
