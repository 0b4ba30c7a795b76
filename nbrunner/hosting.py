"""Hosting blocks from a notebook: a server process that belongs to this one and never blocks it.

::

    with nbrunner.serve("tiny", blocks="auto", invite=invite, for_="2h") as server:
        print(server)                # blocks, peers served, tokens per second, memory
        server.pause()               # takes no new sessions, what runs goes on
        server.resume()
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nbrunner.child import LocalServer, Spawner, serve_command, start_server
from nbrunner.errors import InviteError, NBRunnerError, ServerStartError, UserInputError
from nbrunner.hosting_status import HostStatus, Rates, problems_of, take_status
from nbrunner.protocol.credentials import Invite, Role, SwarmKey
from nbrunner.server.options import (
    check_model_path,
    check_quantize,
    parse_blocks,
    parse_bytes,
    parse_choice,
    parse_seconds,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two questions to the server how it is doing."""

READY_SECONDS = 900.0
"""For a server to be ready: it may have to download its blocks first."""


def serve(
    model: str = "tiny",
    blocks: str | int | tuple[int, int] | None = None,
    *,
    invite: str | Invite | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    max_memory: str | int | None = None,
    lens: bool = False,
    for_seconds: float | None = None,
    for_: str | None = None,
    name: str = "",
    threads: int = 0,
    listen: Sequence[str] | None = None,
    drain_seconds: float = 30.0,
    consent: bool = False,
) -> HostedServer:
    """Start a server process of this one and return at once.

    Parameters
    ----------
    model
        ``"tiny"``, a directory, or a hub id.
    blocks
        ``"a:b"`` or ``(a, b)``; a number: how many, chosen by what the swarm lacks; None or ``"auto"``: as many as
        the free memory (or ``max_memory``) holds.
    invite
        To host in a swarm, with the role ``host``. None begins a swarm: see `HostedServer.make_invite`.
    device, dtype
        ``auto`` unless given: the first GPU, else the CPU; the dtype the model was saved in.
    quantize
        Keep the weights of linear layers in 8 or 4 bits: ``"int8"``, ``"int4"``, on GPUs also ``"nf4"``.
    max_memory
        For blocks and caches together, in bytes or as in ``"8GB"``.
    lens
        Also hold the final norm and head, so that traces are reduced where the states are.
    for_seconds, for_
        When to leave by itself: in seconds, or as in ``"2h"``.
    name
        Shown to others in tables.
    threads
        Of torch; 0: the cores of this machine, shared equally with your other servers on it.
    listen
        Multiaddresses; by default any free port, of this machine only if all of the swarm is on this machine.
    drain_seconds
        That sessions have to move when it leaves.
    consent
        On Colab: that you know its rules (see ``docs/security.md``).

    Raises
    ------
    UserInputError
        What cannot be used; nothing was started.
    """
    from nbrunner.hosting_colab import check_colab

    seconds = _seconds(for_seconds, for_)
    check_colab(private=True, seconds=seconds, consent=consent)
    check_model_path(model)
    check_quantize(quantize or "none")
    parsed = Invite.parse(str(invite)) if invite is not None else None
    if parsed is not None and parsed.terms.role != "host":
        raise InviteError(
            "this invite lets you use the swarm, not host blocks: ask its creator for one with role 'host' "
            "(%swarm invite --role host, or swarm.make_invite(role='host'), makes it)."
        )
    options = ["--blocks", _blocks(blocks), "--drain", str(drain_seconds)]
    memory = parse_bytes(max_memory) if isinstance(max_memory, str) else max_memory
    for flag, value in (
        ("--device", device),
        ("--dtype", dtype),
        ("--quantize", quantize),
        ("--max-memory", memory),
        ("--name", name or None),
        ("--threads", threads or None),
        ("--for", f"{seconds:.3f}s" if seconds is not None else None),
    ):
        if value is not None:
            options += [flag, str(value)]
    if lens:
        options.append("--lens")
    for address in listen or listen_for(parsed):
        options += ["--listen", address]
    return HostedServer(model, options, invite=parsed, seconds=seconds, name=name, threads=threads)


class HostedServer:
    """A server process that was started by `serve`. It ends with this process, however that ends.

    Attributes
    ----------
    model, name : str
    ends_at : float or None
        Unix seconds at which it leaves by itself.
    """

    def __init__(
        self,
        model: str,
        options: Sequence[str],
        *,
        invite: Invite | None,
        seconds: float | None,
        name: str,
        threads: int,
    ) -> None:
        self.model, self.name = model, name
        self.ends_at = None if seconds is None else time.time() + seconds
        self._invite = invite
        self._key = SwarmKey() if invite is None else None
        self._status = HostStatus(state="starting", model=model)
        self._asked = ""  # what was asked of it last: drain or stop
        self._rates = Rates()
        self._news = threading.Condition()
        self._over = threading.Event()  # ended, and all who listen have been told
        self._listeners: list[Callable[[], None]] = []
        self._pid = os.getpid()
        self._spawner = Spawner()
        try:
            self._server: LocalServer = start_server(
                self._spawner,
                serve_command(_model_argument(model), *options),
                (0, 0),
                threads=threads,
                on_event=self._on_event,
            )
        except BaseException:
            self._spawner.close()
            raise
        atexit.register(self._close_at_exit)
        key = f"swarm-key:{self._key.identity.seed.hex()}" if self._key is not None else str(invite)
        self._server.tell(key)
        self._follower = threading.Thread(target=self._follow, name="nbrunner-host", daemon=True)
        self._follower.start()

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``starting``, ``online``, ``paused``, ``draining``, ``ended`` or ``failed``."""
        return self._status.state

    @property
    def status(self) -> HostStatus:
        """Everything about it, as of at most a second ago."""
        return self._status

    @property
    def alive(self) -> bool:
        """Whether its process has not ended."""
        return self.state not in ("ended", "failed")

    @property
    def blocks(self) -> tuple[int, int] | None:
        """``(start, end)``; None until it has chosen them."""
        return self._status.blocks

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def peer_id(self) -> str:
        return self._server.peer_id

    @property
    def log(self) -> str:
        """The last lines of its log."""
        return self._server.log

    @property
    def errors(self) -> list[str]:
        """What went wrong, in words, the last first."""
        return list(self._status.errors)

    @property
    def swarm(self) -> str:
        """Short name of the swarm it is in."""
        from nbrunner.protocol.credentials import swarm_name

        return swarm_name(self._invite.swarm if self._invite is not None else self._key.public)  # type: ignore[union-attr]

    def make_invite(self, role: Role = "use", **terms: Any) -> str:
        """An invite to the swarm that was begun with this server.

        Raises
        ------
        UserInputError
            It hosts in somebody else's swarm.
        ServerStartError
            It is not ready yet.
        """
        if self._key is None:
            raise UserInputError("this server hosts in another's swarm: only the swarm's creator makes invites")
        if not self._server.addresses:
            raise ServerStartError("the server is not ready yet: wait_ready() waits for it", log=self.log)
        return str(self._key.invite(self._server.addresses, role=role, **terms))

    # -- what it is told -----------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float = READY_SECONDS) -> HostedServer:
        """Wait until it is online; returns itself.

        Raises
        ------
        ServerStartError
            It ended before, with the reason and the end of its log; or the time is over.
        """
        deadline = time.monotonic() + timeout
        self._wait(lambda: self.state != "starting", timeout)
        if self.state == "starting":
            raise ServerStartError(f"the server was not ready within {timeout:g} s", log=self.log)
        if not self.alive:
            reason = self._status.errors[0] if self._status.errors else "it was told to"
            raise ServerStartError(f"the server has ended: {reason}", log=self.log)
        self._wait(lambda: self._server.peer_id, deadline - time.monotonic())
        return self

    def pause(self, timeout: float = 10.0) -> None:
        """Take no new sessions; those that are open go on. Returns when it has said so to the swarm."""
        self._command("pause", "paused", timeout)

    def resume(self, timeout: float = 10.0) -> None:
        """Take new sessions again."""
        self._command("resume", "online", timeout)

    def drain(self, seconds: float = 30.0, *, wait: bool = True) -> None:
        """Leave politely: nothing new, open sessions move to other servers, then the process ends."""
        self._leave("drain", f"drain {seconds:g}", seconds + 10.0 if wait else 0.0)

    def stop(self, *, wait: bool = True) -> None:
        """Leave now. Clients with sessions here rebuild them elsewhere."""
        self._leave("stop", "stop", 5.0 if wait else 0.0)
        if wait and self.alive:
            self._server.kill()
            self._over.wait(5.0)

    def refresh(self, wait: float = 0.0) -> None:
        """Ask how it is doing now; the answer is in `status` soon, or at most ``wait`` seconds later."""
        before = self._status
        self._server.tell("status")
        if wait:
            self._wait(lambda: self._status is not before, wait)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have a function called, from another thread, when something about it is different."""
        self._listeners.append(listener)

    def _command(self, word: str, wanted: str, timeout: float) -> None:
        if self.state == "starting":
            self.wait_ready()
        if self.state not in ("online", "paused"):
            raise UserInputError(f"this server cannot {word}: it is {self.state}")
        self._server.tell(word)
        self._wait(lambda: self.state in (wanted, "ended", "failed"), timeout)

    def _leave(self, asked: str, line: str, timeout: float) -> None:
        if not self.alive:
            return
        self._asked = asked
        if self.state == "starting":
            self._server.kill()  # it has promised nothing to anybody yet
        else:
            self._server.tell(line)
            self._update(state="draining")
        self._over.wait(timeout)

    def _wait(self, condition: Callable[[], object], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._news:
            # short waits: a lock that cannot be interrupted would keep Ctrl-C waiting
            while not condition() and time.monotonic() < deadline:
                self._news.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        return bool(condition())

    # -- what it says --------------------------------------------------------------------------------------------

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == "ready":
            self._server.peer_id, self._server.addresses = event["peer"], list(event["addresses"])
            self._server.blocks = (event["blocks"][0], event["blocks"][1])
            self._update(
                state="online",
                model=event["model"],
                blocks=self._server.blocks,
                num_blocks=event["num_blocks"],
                device=event["device"],
                dtype=event["dtype"],
                ready_at=time.time(),
            )
            self._server.tell("status")
        elif event.get("event") == "status":
            leaving = self.state == "draining"
            new = take_status(self._status, event, self._rates)
            self._update(**(new | {"state": "draining"} if leaving else new))

    def _follow(self) -> None:
        """Ask it each second, until it has ended; then say why."""
        process = self._server._process
        while process.poll() is None:
            if self.state in ("online", "paused", "draining"):
                self._server.tell("status")
            with contextlib.suppress(Exception):
                process.wait(POLL_SECONDS)
            if errors := problems_of(self.log):
                self._update(errors=errors)
        self._server._close_pipes()
        code = process.returncode
        atexit.unregister(self._close_at_exit)
        self._spawner.close()
        expected = bool(self._asked) or code == 0
        errors = problems_of(self.log, ended=not expected)
        if not expected and not errors:
            errors = [f"the server process ended by itself (exit code {code}); its log tells more"]
        self._update(state="ended" if expected else "failed", errors=errors, ended_at=time.time())
        self._over.set()

    def _update(self, **facts: Any) -> None:
        with self._news:
            if not self.alive:
                return
            self._status = self._status.changed(**facts)
            self._news.notify_all()
        for listener in list(self._listeners):
            try:
                listener()
            except Exception:
                logger.exception("a listener of a hosted server failed")

    # -- the end -------------------------------------------------------------------------------------------------

    def _close_at_exit(self) -> None:
        if self._pid == os.getpid() and self._server.alive:
            self._asked = self._asked or "stop"
            self._server.tell("stop")
            self._server.stop(3.0)

    def __enter__(self) -> HostedServer:
        try:
            return self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return self._status.line(self.ends_at)


def listen_for(invite: Invite | None) -> list[str]:
    """Where to listen: on this machine only if that is where the whole swarm is, else on all its addresses."""
    if invite is not None and invite.addresses and all(map(_is_loopback, invite.addresses)):
        return ["/ip4/127.0.0.1/tcp/0"]
    return ["/ip4/0.0.0.0/tcp/0"]


def _is_loopback(address: str) -> bool:
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]).is_loopback
    except (IndexError, ValueError):
        return False


def _blocks(blocks: str | int | tuple[int, int] | None) -> str:
    if blocks is None:
        return "auto"
    text = f"{blocks[0]}:{blocks[1]}" if isinstance(blocks, (tuple, list)) else str(blocks)
    parse_choice(text)
    if ":" in text:
        start, end = parse_blocks(text)
        return f"{start}:{end}"
    return text


def _seconds(for_seconds: float | None, for_: str | None) -> float | None:
    if for_seconds is not None and for_ is not None:
        raise UserInputError("give for_seconds or for_, not both")
    if for_ is not None:
        return parse_seconds(for_)
    if for_seconds is not None and not 0 < for_seconds < 1e8:
        raise UserInputError(f"for_seconds must be a time to come, not {for_seconds!r}")
    return for_seconds


def _model_argument(model: str) -> str:
    """A directory by its full path: the process may have another working directory one day, ``~`` is ours."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model != "tiny" and path.exists() else model


__all__ = ["HostStatus", "HostedServer", "NBRunnerError", "serve"]
