"""A whole swarm on this machine, as child processes: for trying things out, for tests, for the first cell."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nbrunner.child import START_SECONDS, LocalServer, Spawner, serve_command, start_server
from nbrunner.errors import UserInputError
from nbrunner.protocol.credentials import SwarmKey
from nbrunner.server.options import PARENTS_FOLDER, PARENTS_PREFIX, check_model_path, check_quantize, parse_blocks

if TYPE_CHECKING:
    from nbrunner.local_threads import ThreadServer

__all__ = ["LocalServer", "LocalSwarm"]


class LocalSwarm:
    """A swarm of server processes on this machine.

    ::

        with nbrunner.LocalSwarm(model="tiny", servers=2) as swarm:
            model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)

    The processes end with the block, with this process, or with a kernel's restart, whatever comes first.

    Parameters
    ----------
    model
        ``"tiny"`` for the bundled one, or a directory.
    servers
        How many, to share the blocks evenly; or the blocks of each, as in ``["0:3", "3:8", "3:8"]``.
    threads
        Torch threads of each server. They share this machine, so one is right unless there are many cores; 0 shares
        all of them.
    dtype, device, quantize, cache_bytes
        As for ``nbrunner serve``; None leaves its default.
    lens
        Let the servers hold the final norm and head too, so that traces are reduced where the states are.
    adapters
        Name → directory of LoRA adapters that the servers serve by name.
    accept_adapters
        Whether they also serve adapters that clients offer.
    in_process
        Run the servers in threads of this process: everything fits into 1 GB, as on a small free machine, because
        torch is there only once. They share this process's interpreter, so that it is slower, and a crash of one
        is a crash of all; prefer processes where there is memory.

    Attributes
    ----------
    invite : str
        Lets clients use the swarm.
    model : str
        For ``from_pretrained`` of models and tokenizers.
    servers : list of LocalServer
        Or of `nbrunner.local_threads.ThreadServer`, with the same methods, if they are in this process.

    Raises
    ------
    UserInputError
        A model or blocks that cannot be used; nothing was started.
    ServerStartError
        A server ended before it was ready; carries the end of its log. The others have been ended too.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        servers: int | Sequence[str | tuple[int, int]] = 2,
        *,
        threads: int = 1,
        dtype: str | None = None,
        device: str | None = None,
        quantize: str | None = None,
        cache_bytes: int | None = None,
        lens: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        accept_adapters: bool = False,
        in_process: bool = False,
    ) -> None:
        check_model_path(str(model))
        check_quantize(quantize or "none")
        self.model = _model_path(str(model))
        spans = _spans(self.model, servers)
        self.servers: list[LocalServer | ThreadServer] = []
        self._options = ["--threads", str(threads)]
        given = {"dtype": dtype, "device": device, "quantize": quantize, "cache-memory": cache_bytes}
        for flag, value in given.items():
            if value is not None:
                self._options += [f"--{flag}", str(value)]
        if lens:
            self._options.append("--lens")
        for name, folder in (adapters or {}).items():
            self._options += ["--adapter", f"{name}={folder}"]
        if accept_adapters:
            self._options.append("--accept-adapters")
        self._threads = threads
        self._in_process = in_process
        self._settings: dict[str, Any] = {
            "threads": threads,
            "dtype": dtype or "auto",
            "device": device or "auto",
            "quantize": quantize or "none",
            "cache_bytes": cache_bytes,
            "lens": lens,
            "adapters": [(name, str(folder)) for name, folder in (adapters or {}).items()],
            "accept_adapters": accept_adapters,
        }
        self._key = SwarmKey()
        self._closed = False
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix=PARENTS_PREFIX, ignore_cleanup_errors=True)
        self._spawner = Spawner()
        if in_process:
            from nbrunner.swarm.loop import EngineLoop

            EngineLoop.get()  # made before our exit handler is registered, so that it is closed after our servers
        self._pid = os.getpid()
        atexit.register(self.close)
        try:
            self._start(spans)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def invite(self) -> str:
        """Lets clients use the swarm; names the servers that are there now."""
        return str(self._invite.with_addresses(self._addresses() or self._invite.addresses))

    def add_server(self, blocks: str | tuple[int, int]) -> LocalServer | ThreadServer:
        """Start one more server and wait until it is ready."""
        with self._lock:
            if self._closed:
                raise UserInputError("this swarm is closed; start another")
            span = parse_blocks(blocks) if isinstance(blocks, str) else blocks
            server = self._spawn(span)
            try:
                # the first servers may be gone by now: a newcomer must be told of those that are there
                server.tell(str(self._key.invite(self._addresses(), role="host")))
                self._wait_ready(server, time.monotonic() + START_SECONDS)
            except BaseException:
                server.kill()
                raise
            self.servers.append(server)
            return server

    def make_invite(self, **terms: Any) -> str:
        """An invite with other terms: see `nbrunner.protocol.credentials.SwarmKey.invite`."""
        return str(self._key.invite(self._addresses(), **terms))

    def close(self) -> None:
        """End all servers. May be called more than once."""
        if self._pid != os.getpid():
            return  # a forked child: the servers are its parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            for server in self.servers:
                if server.alive:
                    server.end()
            for server in self.servers:
                server.kill()
            self._spawner.close()
            self._folder.cleanup()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        spans = ", ".join(f"{server.blocks[0]}:{server.blocks[1]}" for server in self.servers)
        return f"<LocalSwarm of {self.model}: {spans}{' (closed)' if self._closed else ''}>"

    # -- starting ------------------------------------------------------------------------------------------------

    def _start(self, spans: Sequence[tuple[int, int]]) -> None:
        """All begin to import and load at once; the others join when the first can be joined."""
        deadline = time.monotonic() + START_SECONDS
        for span in spans:
            self.servers.append(self._spawn(span))
        first, *others = self.servers
        first.tell("swarm-key:" + self._key.identity.seed.hex())
        first.addresses = list(first.wait_for("joined", deadline)["addresses"])
        host_invite = str(self._key.invite(first.addresses, role="host"))
        for server in others:
            server.tell(host_invite)
        for server in self.servers:
            self._wait_ready(server, deadline)
        self._invite = self._key.invite(self._addresses())

    def _wait_ready(self, server: LocalServer | ThreadServer, deadline: float) -> None:
        facts = server.wait_for("ready", deadline)
        server.peer_id, server.addresses = facts["peer"], list(facts["addresses"])
        server.blocks = (facts["blocks"][0], facts["blocks"][1])

    def _spawn(self, span: tuple[int, int]) -> LocalServer | ThreadServer:
        if self._in_process:
            from nbrunner.local_threads import ThreadServer

            return ThreadServer(self.model, span, **self._settings)
        command = serve_command(
            self.model, "--blocks", f"{span[0]}:{span[1]}", "--listen", "/ip4/127.0.0.1/tcp/0", *self._options
        )
        places = {"TMPDIR": self._folder.name, PARENTS_FOLDER: self._folder.name}
        return start_server(self._spawner, command, span, threads=self._threads, environment=places)

    def _addresses(self) -> list[str]:
        return [address for server in self.servers if server.alive for address in server.addresses]


def _model_path(model: str) -> str:
    if model == "tiny":
        from nbrunner import tiny

        return str(tiny.path())
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _spans(model: str, servers: int | Sequence[str | tuple[int, int]]) -> list[tuple[int, int]]:
    count = _num_blocks(model)
    if isinstance(servers, int):
        if not 1 <= servers <= count:
            raise UserInputError(f"{servers} servers cannot share {count} blocks: use 1 to {count}")
        bounds = [round(index * count / servers) for index in range(servers + 1)]
        return list(itertools.pairwise(bounds))
    spans = [parse_blocks(one) if isinstance(one, str) else (int(one[0]), int(one[1])) for one in servers]
    if not spans:
        raise UserInputError("a swarm needs at least one server")
    for start, end in spans:
        if not 0 <= start < end <= count:
            raise UserInputError(f"blocks {start}:{end} are not in this model, which has {count}")
    return spans


def _num_blocks(model: str) -> int:
    """Blocks of a model as its config says, without importing transformers."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserInputError(f"cannot read {model}/config.json ({error}): give the directory of a model") from None
    for part in (config, config.get("text_config") or {}):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(part.get(name), int):
                return int(part[name])
    raise UserInputError(f"{model}/config.json does not say how many layers there are")
