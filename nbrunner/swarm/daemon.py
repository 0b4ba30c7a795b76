"""Starting p2pd, the process that speaks libp2p for us, so that it neither dies too early nor stays behind.

It is started here and not by `hivemind.P2P.create`, which leaves it in our process group: a notebook's Stop button
sends SIGINT to the whole group, and p2pd would be dead after the first one. `P2P.replicate` then attaches to it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbrunner.errors import BootstrapError, ServerStartError, UserInputError
from nbrunner.imports import importing
from nbrunner.protocol.identity import Identity, is_peer_id
from nbrunner.swarm import control

_START_SECONDS = 15.0  # it takes 0.3 s; more only where the machine is very busy
_CONNECT_SECONDS = 10.0
_STOP_SECONDS = 2.0
FOLDER_PREFIX = "nbrunner-p2p-"

# Run by a small Python that then becomes p2pd. A launcher and not preexec_fn: that would run between fork and exec
# in a process full of threads. The kernel sends the signal when the thread that started it ends: the engine thread.
_GUARD = (
    "import ctypes,os,sys\n"
    "try: ctypes.CDLL(None).prctl(1, 15)\n"  # PR_SET_PDEATHSIG, SIGTERM
    "except (OSError, AttributeError): pass\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Daemon:
    """A running p2pd.

    Attributes
    ----------
    p2p : hivemind.P2P
        hivemind's client of it.
    socket : str
        Path of its control socket.
    folder : Path
        A private directory that is removed with it; for other sockets too.
    exited : asyncio.Event
        Set when it has ended, whoever ended it.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.socket = str(folder / "p2pd.sock")
        self.p2p: Any = None
        self.exited = asyncio.Event()
        self._output: collections.deque[str] = collections.deque(maxlen=50)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(), name="p2pd-output")

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return "\n".join(self._output)

    async def _read(self) -> None:
        # Its output is read as long as it lives: a full pipe would stop it.
        assert self.process.stdout is not None  # noqa: S101 - we asked for a pipe
        while line := await self.process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            self._output.append(text[:500])
            if text.startswith("Peer ID:") and not self._ready.done():
                self._ready.set_result(None)
        await self.process.wait()
        self.exited.set()
        if not self._ready.done():
            self._ready.set_exception(ServerStartError(_why_it_ended(self.log), log=self.log))

    async def wait_ready(self) -> None:
        """`ServerStartError` if it ends, or does not come up in time."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._ready
        except TimeoutError:
            raise ServerStartError(
                f"the p2p daemon did not start within {_START_SECONDS:.0f} s; is this machine overloaded?",
                log=self.log,
            ) from None

    async def close(self) -> None:
        """End it and remove its files."""
        if self.p2p is not None:
            await self.p2p.shutdown()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await self.process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        await self._reader
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # it may have failed after nobody waited for it any more
        shutil.rmtree(self.folder, ignore_errors=True)


async def start_p2p(
    identity: Identity,
    *,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    announce: Sequence[str] | None = None,
    client_mode: bool = False,
) -> Daemon:
    """Start p2pd under an identity.

    Parameters
    ----------
    identity
        Its key; the PeerID follows from it.
    listen
        libp2p multiaddresses to listen on; port 0 takes a free one. Not used in client mode.
    announce
        Multiaddresses told to others instead, behind a NAT or in a container.
    client_mode
        Listen nowhere: connect to others only.

    Raises
    ------
    ServerStartError
        It did not come up; a port that is in use is named.
    UserInputError
        An address that cannot be understood.
    """
    for address in [*listen, *(announce or ())]:
        check_address(address)
    if not client_mode:
        for address in listen:
            _check_port_is_free(address)
    _remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=socket_root()))
    key = folder / "identity"
    daemon: Daemon | None = None
    try:
        identity.save(key)
        process = await asyncio.create_subprocess_exec(
            *_guarded(_arguments(folder, key, listen, announce, client_mode)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=_environment(),
        )
        daemon = Daemon(process, folder)
        # hivemind takes two seconds to import, with torch: meanwhile p2pd comes up.
        p2p_class = await asyncio.get_running_loop().run_in_executor(None, _import_p2p)
        await daemon.wait_ready()
        key.unlink()
        from hivemind.utils.multiaddr import Multiaddr

        # hivemind's own socket would lie open in /tmp, and stay there when we are killed: it goes into our folder
        ours: Any = type("P2P", (p2p_class,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
        daemon.p2p = await ours.replicate(Multiaddr(f"/unix{daemon.socket}"))
    except BaseException:
        if daemon is not None:
            await daemon.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return daemon


async def join(daemon: Daemon, addresses: Sequence[str]) -> list[str]:
    """Connect to the peers of an invite, all at once; returns the addresses that answered.

    Raises
    ------
    BootstrapError
        None of them did, and why not.
    """

    async def attempt(address: str) -> str | None:
        target, peer = split_address(address)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await control.connect(daemon.socket, peer, [target])
        except TimeoutError:
            return f"no answer within {_CONNECT_SECONDS:.0f} s"
        except (control.ControlError, OSError) as error:
            return str(error)
        return None

    own = daemon.p2p.peer_id.to_base58()
    targets = [address for address in addresses if not address.endswith(own)]
    if not targets:
        return []
    problems = dict(zip(targets, await asyncio.gather(*map(attempt, targets)), strict=True))
    reached = [address for address, problem in problems.items() if problem is None]
    if not reached:
        shown = "; ".join(f"{address}: {problem}" for address, problem in list(problems.items())[:5])
        raise BootstrapError(
            f"no peer of this swarm answered ({shown}). Is one of them up, and can this machine reach it? "
            "If they moved, ask for a new invite.",
            addresses=targets,
        )
    return reached


def split_address(address: str) -> tuple[str, str]:
    """``/ip4/1.2.3.4/tcp/5/p2p/ID`` → (``/ip4/1.2.3.4/tcp/5``, ``ID``); `UserInputError` for other forms."""
    target, found, peer = address.rpartition("/p2p/")
    if not found or not is_peer_id(peer):
        raise UserInputError(f"{address[:200]!r} does not end in /p2p/ and the PeerID of an Ed25519 key")
    check_address(target)
    return target, peer


def check_address(address: str) -> None:
    """`UserInputError` unless this looks like a multiaddress; p2pd itself has the last word."""
    if len(address) > 500 or not re.fullmatch(r"(/[a-zA-Z0-9.:_\-]+){2,20}", address):
        raise UserInputError(
            f"{address[:200]!r} is not a multiaddress; an example of one is /ip4/0.0.0.0/tcp/31330."
        )


def _import_p2p() -> Any:
    with importing():
        from hivemind.p2p import P2P

    return P2P


def _arguments(
    folder: Path, key: Path, listen: Sequence[str], announce: Sequence[str] | None, client_mode: bool
) -> list[str]:
    loopback = all(re.match(r"/(ip4/127\.|ip6/::1/)", address) for address in listen)
    arguments = [
        _p2pd_path(),
        f"-listen=/unix{folder}/p2pd.sock",
        f"-id={key}",
        "-tls=1",
        "-connManager=1",
        "-relay=1",
        "-relayHopLimit=0",
        # A daemon whose client never came, because we were killed in between, ends by itself.
        "-idleTimeout=30s",
        # Asking routers and peers about our public address is of no use on loopback and for clients.
        f"-autonat={int(not loopback and not client_mode)}",
        f"-natPortMap={int(not loopback and not client_mode)}",
        "-dhtClient=1" if client_mode else "-dhtServer=1",
    ]
    if client_mode:
        arguments.append("-noListenAddrs=1")
    else:
        arguments.append("-hostAddrs=" + ",".join(listen))
        if announce:
            arguments.append("-announceAddrs=" + ",".join(announce))
    return arguments


def _p2pd_path() -> str:
    # find_spec does not import the package: p2pd can start while hivemind is being imported.
    spec = importlib.util.find_spec("hivemind")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / "hivemind_cli" / "p2pd"
        if path.exists():
            return str(path)
    raise ServerStartError("the p2pd program is missing from the hivemind package; install hivemind again")


def _environment() -> dict[str, str]:
    # Go counts the machine's cores, not those we may use: with more threads than cores, the slowest 5 % of small
    # frames took 4 ms instead of 0.4 ms.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 2
    return {"GOLOG_LOG_LEVEL": "error", "GOMAXPROCS": str(min(cores, 4)), **os.environ}


def _guarded(arguments: list[str]) -> list[str]:
    if sys.platform != "linux":
        return arguments  # no PDEATHSIG: there -idleTimeout and our exit handler end it
    return [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpid()), *arguments]


def socket_root(root: str | None = None) -> str:
    """Where a socket's path stays under the 108 bytes that Unix allows, whatever TMPDIR (or ``root``) says."""
    root = root or tempfile.gettempdir()
    return root if len(root) <= 48 else "/tmp"  # noqa: S108 - mkdtemp makes a private directory in it


def _remove_stale_folders() -> None:
    """Remove the directories of processes that were killed before they could."""
    for folder in Path(socket_root()).glob(f"{FOLDER_PREFIX}*"):
        match = re.match(rf"{FOLDER_PREFIX}(\d+)-", folder.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, OverflowError):
            continue


def _check_port_is_free(address: str) -> None:
    """`ServerStartError` if a TCP port is taken.

    p2pd sets SO_REUSEPORT: a second one on the same port starts without complaint, and the two then get each
    other's connections at random.
    """
    match = re.match(r"/(ip4|ip6)/([^/]+)/tcp/(\d+)", address)
    if match is None or match[3] == "0":
        return
    host, port = match[2], int(match[3])
    family = socket.AF_INET if match[1] == "ip4" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            code = getattr(error, "errno", None)
            if code == errno.EADDRINUSE:
                reason = "is used by another program. Choose another with --port, or 0 for any free one."
            elif code == errno.EACCES:
                reason = "needs administrator rights. Choose one above 1023."
            elif code == errno.EADDRNOTAVAIL:
                reason = f"cannot be used: {host} is not an address of this machine."
            else:
                reason = f"cannot be used: {error}."
            raise ServerStartError(f"port {port} {reason}") from None


def _why_it_ended(log: str) -> str:
    if "address already in use" in log:
        return "the port is used by another program. Choose another with --port, or 0 for any free one."
    if "cannot assign requested address" in log:
        return "the address to listen on is not one of this machine's."
    last = log.strip().splitlines()[-1] if log.strip() else "it printed nothing"
    return f"the p2p daemon ended while starting: {last[:300]}"
