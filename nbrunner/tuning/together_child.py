"""The process that averages, for one that trains: ``python -m nbrunner.tuning.together_child``.

Its parent is at its standard streams (`nbrunner.tuning.together_channel`). It lives in a process session of its
own, so that a notebook's interrupt does not reach it, and ends when its parent does, whatever ended that.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import sys
import threading
import time
from typing import Any, BinaryIO

import torch

from nbrunner.errors import NBRunnerError
from nbrunner.protocol.credentials import Invite
from nbrunner.protocol.together import MAX_VALUES
from nbrunner.tuning.together_channel import (
    Account,
    AnySaid,
    Average,
    Called,
    Done,
    Failed,
    GiveUp,
    Leave,
    Note,
    Said,
    Start,
    Started,
    bytes_of,
    encode,
    read,
    reader,
)
from nbrunner.tuning.together_session import Own, TeachingSession

logger = logging.getLogger(__name__)

FOLDER = "NBRUNNER_TOGETHER_FOLDER"
"""Environment variable: the folder that the parent made for us, which goes when we do."""

_PR_SET_PDEATHSIG = 1
_SIGCONT = 18
_ORPHAN_SECONDS = 0.7  # that we may take to remove our files when the parent is gone
_ACCOUNT_SECONDS = 0.5


class Child:
    """Obeys the parent until it leaves or is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, out: BinaryIO) -> None:
        self._loop = loop
        self._out = out
        self._said: asyncio.Queue[Said | None] = asyncio.Queue()
        self._session: TeachingSession | None = None
        self._round: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Read what the parent says, in a thread; when it is gone, so are we soon."""
        if sys.platform == "linux":
            # A stopped process cannot read: have the kernel wake us when the parent dies.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGCONT)
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def _listen(self) -> None:
        with open(0, "rb", buffering=0, closefd=False) as stdin:
            take = reader(stdin)
            try:
                while said := read(take, 4 * MAX_VALUES):
                    self._loop.call_soon_threadsafe(self._said.put_nowait, said)
                    if isinstance(said[0], Leave):
                        return
            except (ValueError, OSError):
                logger.exception("the parent said what cannot be read")
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._said.put_nowait, None)
        time.sleep(_ORPHAN_SECONDS)
        remove_folder()
        os._exit(0)  # p2pd goes with us

    async def run(self) -> None:
        said = await self._said.get()
        if said is None or not isinstance(said[0], Start):
            return
        try:
            if not await self._start(said[0], _vector(said[1])):
                return
            account = asyncio.create_task(self._keep_account(), name="account")
            lost = asyncio.create_task(self._watch(), name="daemon")
            try:
                while (said := await self._said.get()) is not None and not isinstance(said[0], Leave):
                    await self._obey(*said)
            finally:
                account.cancel()
                lost.cancel()
        finally:
            await self._give_up()
            if self._session is not None:
                await self._session.close()

    async def _start(self, start: Start, vector: torch.Tensor) -> bool:
        own = Own(steps=start.steps, samples=start.samples, round=start.round)
        joining = asyncio.create_task(
            TeachingSession.create(
                Invite.parse(start.invite),
                start.teaching,
                vector,
                start.settings,
                own=own,
                on_call=lambda called: self.say(Called(called)),
            )
        )
        leaving = asyncio.create_task(self._said.get())
        await asyncio.wait({joining, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            return False
        if leaving.done():
            said = leaving.result()
            if said is None or isinstance(said[0], Leave):
                self._said.put_nowait(said)
        leaving.cancel()
        try:
            self._session = joining.result()
        except NBRunnerError as error:
            self.say(Failed(type(error).__name__, str(error)))
            return False
        except Exception as error:
            logger.exception("joining failed")
            self.say(Failed("ServerStartError", f"joining the others failed: {error!r}"))
            return False
        session, joined = self._session, self._session.base is not vector
        started = Started(session.peer_id, session.own.round, session.own.lineage, joined)
        self.say(started, session.base if joined else None)
        return True

    async def _obey(self, message: AnySaid, body: bytes | bytearray) -> None:
        session = self._session
        if session is None:
            return
        if isinstance(message, Note):
            session.note(steps=message.steps, samples=message.samples, fresh=message.fresh, paused=message.paused)
        elif isinstance(message, Average):
            await self._give_up()
            self._round = asyncio.create_task(self._average(session, message, _vector(body)), name="round")
        elif isinstance(message, GiveUp):
            await self._give_up()

    async def _average(self, session: TeachingSession, message: Average, vector: torch.Tensor) -> None:
        try:
            if message.finish is not None:
                outcome, result = await session.finish(vector, message.lineage, message.finish)
            else:
                outcome, result = await session.average(vector, message.lineage)
        except Exception as error:
            logger.exception("a round failed")
            self.say(Failed("SwarmError", f"averaging failed: {error!r}"))
            return
        self.say(Account(session.participants()))
        self.say(Done(message.id, outcome), None if result is vector else result)

    async def _give_up(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)
            self._round = None

    async def _keep_account(self) -> None:
        """Tell the parent who takes part, as it changes."""
        while True:
            if self._session is not None:
                self.say(Account(self._session.participants()))
            await asyncio.sleep(_ACCOUNT_SECONDS)

    async def _watch(self) -> None:
        if self._session is not None:
            log = await self._session.wait_lost()
            self.say(Failed("PeerUnreachableError", f"the p2p daemon has ended: {log[-500:]}"))
            self._said.put_nowait(None)

    def say(self, message: AnySaid, vector: torch.Tensor | None = None) -> None:
        body = memoryview(b"") if vector is None else bytes_of(vector)
        with contextlib.suppress(OSError, ValueError):  # the parent is gone, and so are we in a moment
            for buffer in encode(message, body):
                self._out.write(buffer)
            self._out.flush()


def _vector(body: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(body, dtype=torch.float32) if body else torch.empty(0)


def remove_folder() -> None:
    """Remove the folder that the parent made for us."""
    if FOLDER in os.environ:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


def main() -> None:
    """Run until the parent leaves or is gone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)  # the cores are the trainer's
    # What libraries print must not get into the channel.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    async def run() -> None:
        child = Child(asyncio.get_running_loop(), out)
        child.listen()
        await child.run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    finally:
        remove_folder()
        with contextlib.suppress(OSError):
            out.close()
        os._exit(0)  # the thread at standard input would keep the interpreter waiting


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
