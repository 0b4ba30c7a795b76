"""A process's place in a swarm: one node and one directory, shared by all models and sessions that use it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref

from nbrunner.errors import UserInputError
from nbrunner.protocol.credentials import Invite
from nbrunner.swarm.directory import Directory
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node

_open: dict[tuple[int, bytes], SwarmConnection] = {}
_closing: set[asyncio.Task[None]] = set()
_opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


class SwarmConnection:
    """Node and directory of one swarm. Get one with `join`, give it back with `leave`."""

    def __init__(self, node: Node, directory: Directory, invite: Invite) -> None:
        self.node = node
        self.directory = directory
        self.invite = invite
        self._users = 0

    @classmethod
    async def join(cls, invite: str | Invite) -> SwarmConnection:
        """Join the swarm of an invite, or share the connection this process already has to it.

        One node costs a p2p daemon (50 MB) and 0.3 s: a second model must not cost another.

        Raises
        ------
        InviteError
            The invite is malformed or expired.
        BootstrapError
            None of its addresses answered.
        """
        if not invite:
            raise UserInputError(
                "no swarm to join: pass invite=…. Start one here with nbrunner.LocalSwarm() or %swarm start, "
                "or ask a friend for an invite."
            )
        parsed = invite if isinstance(invite, Invite) else Invite.parse(invite)
        loop = asyncio.get_running_loop()
        key = (id(loop), parsed.swarm)
        async with _lock_of(loop):
            connection = _open.get(key)
            if connection is None or connection.node.closed:
                node = await Node.create(invite=parsed, client_mode=True)
                directory = Directory(node)
                try:
                    await directory.start()
                except BaseException:
                    await node.close()
                    raise
                connection = _open[key] = cls(node, directory, parsed)
            connection._users += 1
            return connection

    async def leave(self) -> None:
        """One user less; the last one closes the node."""
        self._users -= 1
        if self._users > 0:
            return
        await self._close()

    async def _close(self) -> None:
        for key, connection in list(_open.items()):
            if connection is self:
                del _open[key]
        task = asyncio.create_task(self._close_node())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
        await asyncio.shield(task)  # half closed, it would leave its daemon's files behind

    async def _close_node(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self.directory.close()
        await self.node.close()


def _lock_of(loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
    """One connection is opened at a time; and whatever is still open when the process ends is closed then.

    Most scripts and notebooks end without closing their model: its daemon dies with the process, its files do not.
    """
    lock = _opening.get(loop)
    if lock is None:
        lock = _opening[loop] = asyncio.Lock()
        engine = EngineLoop.of(loop)
        if engine is not None:  # else whoever runs that loop closes what is on it
            engine.on_close(lambda: _close_all(loop))
    return lock


async def _close_all(loop: asyncio.AbstractEventLoop) -> None:
    still_open = [connection for (of, _), connection in _open.items() if of == id(loop)]
    halfway = [task for task in _closing if task.get_loop() is loop]
    await asyncio.gather(*(connection._close() for connection in still_open), *halfway, return_exceptions=True)
