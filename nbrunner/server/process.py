"""A server as a process: signals, standard input as the parent's pulse, lines for programs on standard output."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nbrunner.errors import ServerStartError, UserInputError
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.server.options import PARENTS_FOLDER, ServerOptions
from nbrunner.server.runner import BlockServer, Membership
from nbrunner.server.status import status_of
from nbrunner.swarm.node import Node

logger = logging.getLogger(__name__)

KEY_PREFIX = "swarm-key:"
"""Starts the line by which a parent hands a swarm key (64 hex digits) to a server that it starts."""

EXIT_OK = 0
EXIT_INTERRUPTED = 130

ORPHAN_SECONDS = 0.7
"""How long a server whose parent is gone may take to remove its files."""

_PR_SET_PDEATHSIG = 1
_LONGEST_COMMAND = 200
_SWITCH_SECONDS = 0.0005
"""The compute thread holds the GIL between kernels of small models: with Python's 5 ms the event loop would answer
pings and take the next part that much later."""


def run(main: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, int]]) -> int:
    """Run a main coroutine on uvloop where there is one (a frame costs 20 % less); returns its exit code."""
    try:
        import uvloop
    except ImportError:
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main(runner.get_loop()))


class Signals:
    """SIGINT and SIGTERM: the first asks to leave politely, the second to leave now."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.leave = asyncio.Event()
        self.hurry = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.leave.is_set():
            self.hurry.set()
        self.leave.set()


class Parent:
    """The process that started us, at the other end of standard input.

    Its first line is the invite or swarm key (never in arguments, which every user of the machine can read), the
    others are commands for `Commands`. When the pipe ends, the parent is gone, however it went, and so are we. A
    stopped process cannot read: for that case the kernel is asked to wake us when the parent dies. It is not asked
    to kill us, because then nobody would remove the daemon's files.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, signals: Signals) -> None:
        self.membership: asyncio.Future[Membership] = loop.create_future()
        self.commands: asyncio.Queue[str] = asyncio.Queue()
        self.gone = False
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
        threading.Thread(target=self._watch, args=(loop, signals), name="parent", daemon=True).start()

    def _watch(self, loop: asyncio.AbstractEventLoop, signals: Signals) -> None:
        # Unbuffered and our own: a thread inside sys.stdin's lock makes the interpreter abort when it ends.
        with open(0, "rb", buffering=0, closefd=False) as stdin:
            line = stdin.readline().decode(errors="replace").strip()
            if line:
                loop.call_soon_threadsafe(self._take, line)
                while line := stdin.readline(_LONGEST_COMMAND).decode(errors="replace"):
                    loop.call_soon_threadsafe(self.commands.put_nowait, line.strip())
        self.gone = True
        loop.call_soon_threadsafe(signals.leave.set)
        loop.call_soon_threadsafe(signals.hurry.set)
        time.sleep(ORPHAN_SECONDS)
        self.remove_folder()
        os._exit(EXIT_OK)  # p2pd goes with us

    def remove_folder(self) -> None:
        """Remove the folder that the parent made for its servers: all of them are leaving with it."""
        if PARENTS_FOLDER in os.environ:
            shutil.rmtree(os.environ[PARENTS_FOLDER], ignore_errors=True)

    def _take(self, line: str) -> None:
        try:
            self.membership.set_result(read_membership(line))
        except UserInputError as error:
            self.membership.set_exception(error)


async def obey(server: BlockServer, commands: asyncio.Queue[str], signals: Signals) -> None:
    """Do what the parent says, line by line: ``status``, ``pause``, ``resume``, ``drain [SECONDS]``, ``stop``.

    Each of the first three is answered by a ``status`` event. They come from whoever started us, on a pipe that
    nobody else has; a line that is none of them is logged and left.
    """
    while True:
        word, _, rest = (await commands.get()).partition(" ")
        if word == "pause":
            await server.pause()
        elif word == "resume":
            await server.resume()
        elif word == "drain":
            with contextlib.suppress(ValueError):
                server.drain_seconds = max(0.0, float(rest))
            signals.leave.set()
        elif word == "stop":
            signals.leave.set()
            signals.hurry.set()
        elif word != "status":
            logger.warning("the parent said %r, which means nothing here", word[:40])
        emit("status", **status_of(server))


async def leave_after(seconds: float, signals: Signals) -> None:
    """Drain when the time is over that this server was to run."""
    await asyncio.sleep(seconds)
    logger.info("the time is over: leaving")
    signals.leave.set()


def read_membership(line: str) -> Membership:
    """An invite, or a swarm key as a parent writes it."""
    if not line.startswith(KEY_PREFIX):
        return Invite.parse(line), None
    try:
        return None, SwarmKey(Identity(bytes.fromhex(line[len(KEY_PREFIX) :])))
    except ValueError:
        raise UserInputError("the swarm key on standard input is not 64 hex digits") from None


def emit(event: str, **facts: object) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def facts_of(server: BlockServer) -> dict[str, object]:
    """What a program wants to know of a server that is ready."""
    return {
        "peer": server.node.peer_id,
        "model": server.host.model,
        "blocks": list(server.blocks),
        "num_blocks": server.host.num_blocks,
        "addresses": server.node.addresses,
        "dtype": str(server.host.span.dtype).removeprefix("torch."),
        "device": str(server.host.span.device),
        "threads": server.threads,
    }


def serve(
    options: ServerOptions, *, managed: bool = False, machine: bool = False, on_ready: Callable[[BlockServer], None]
) -> int:
    """Run one server until it is told to leave; returns the exit code.

    Parameters
    ----------
    managed
        A parent is at standard input (see `Parent`).
    machine
        Print ``joined`` and ``ready`` events as JSON lines.
    on_ready
        Called once the server is online.

    Raises
    ------
    NBRunnerError
        It could not start, or its p2p daemon died.
    """

    async def main(loop: asyncio.AbstractEventLoop) -> int:
        signals = Signals(loop)
        parent = Parent(loop, signals) if managed else None
        membership = parent.membership if parent is not None else None

        def joined(server: BlockServer) -> None:
            if machine:
                emit("joined", peer=server.node.peer_id, addresses=server.node.addresses)

        server = BlockServer(options, membership=membership, on_joined=joined)
        starting = asyncio.create_task(server.start())
        leaving = asyncio.create_task(signals.leave.wait())
        await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return EXIT_INTERRUPTED
        leaving.cancel()
        starting.result()
        if machine:
            emit("ready", **facts_of(server))
        on_ready(server)
        helpers = [asyncio.create_task(obey(server, parent.commands, signals))] if parent is not None else []
        if options.run_seconds is not None:
            helpers.append(asyncio.create_task(leave_after(options.run_seconds, signals)))
        try:
            return await _until_told_to_leave(server, signals)
        finally:
            for helper in helpers:
                helper.cancel()
            if parent is not None and parent.gone:
                parent.remove_folder()

    return run(main)


async def _until_told_to_leave(server: BlockServer, signals: Signals) -> int:
    lost = asyncio.create_task(server.wait_lost())
    leave = asyncio.create_task(signals.leave.wait())
    await asyncio.wait({lost, leave}, return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        leave.cancel()
        log = lost.result()
        await server.close()
        raise ServerStartError("the p2p daemon of this server ended by itself; start the server again", log=log)
    lost.cancel()
    if server.sessions:
        logger.info("leaving when %d sessions have moved; Ctrl-C again leaves now", server.sessions)
    draining = asyncio.create_task(server.drain())
    hurry = asyncio.create_task(signals.hurry.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if draining.done():
        hurry.cancel()
        draining.result()
        return EXIT_OK
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)
    await server.close()
    return EXIT_INTERRUPTED


def keep_node(
    *,
    invite: Invite | None,
    swarm_key: SwarmKey | None,
    identity: Identity | None,
    listen: Sequence[str],
    announce: Sequence[str] | None,
    on_ready: Callable[[list[str], str], None],
) -> int:
    """Run a node that serves nothing until it is told to leave; returns the exit code.

    Raises
    ------
    NBRunnerError
        It could not start, or its p2p daemon died.
    """

    async def main(loop: asyncio.AbstractEventLoop) -> int:
        signals = Signals(loop)
        node = await Node.create(
            invite=invite, swarm_key=swarm_key, identity=identity, listen=listen, announce=announce
        )
        try:
            on_ready(node.addresses, node.peer_id)
            logger.info("here as %s, listening on %s", node.peer_id, ", ".join(node.addresses))
            lost = asyncio.create_task(node.wait_lost())
            leave = asyncio.create_task(signals.leave.wait())
            await asyncio.wait({lost, leave}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                raise ServerStartError("the p2p daemon ended by itself; start again", log=lost.result())
            lost.cancel()
            return EXIT_OK
        finally:
            await node.close()

    return run(main)
