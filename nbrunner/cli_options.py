"""Options that commands share, and turning what was passed into what it means."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import socket
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from nbrunner.errors import UserInputError
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.identity import Identity

INVITE_VARIABLE = "NBRUNNER_INVITE"

InviteOption = Annotated[
    str | None,
    typer.Option("--invite", "-i", envvar=INVITE_VARIABLE, help="An invite, or a file that holds one."),
]
PeersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--peers",
        help="Multiaddress of a peer, instead of those inside the invite; may be repeated. An address does not say "
        "who may join: without an invite, the key of the swarm that you created on this machine does.",
    ),
]
SwarmKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        help="File with the key of a swarm you created, instead of the one kept on this machine. serve --new-swarm "
        "and bootstrap make it if it is missing.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs on standard output.")]
LogLevelOption = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
NameOption = Annotated[str, typer.Option("--name", help="Shown to others in tables.")]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        help="File with this peer's key, made if missing. Default: a new one, and one that is kept for the first "
        "server of a swarm you created and for bootstrap.",
    ),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="TCP port to listen on; 0: any free one.")
]
HostOption = Annotated[str, typer.Option("--host", help="IP address to listen on; 127.0.0.1: this machine only.")]
ListenOption = Annotated[
    list[str] | None,
    typer.Option("--listen", help="Multiaddress to listen on, instead of --host and --port; may be repeated."),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        help="Multiaddress told to others, if they must reach this machine by another; may be repeated.",
    ),
]


def read_config(path: Path, options: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Defaults for each command from a TOML file.

    Parameters
    ----------
    path
        Of the file.
    options
        Of each command: an option as it is typed, without its dashes in front → the parameter that takes it.

    Raises
    ------
    UserInputError
        No such file, not TOML, or a command or option that does not exist.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserInputError(f"cannot read the config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserInputError(f"the config file {path} is not TOML: {error}") from None
    found: dict[str, dict[str, Any]] = {}
    for command, values in tables.items():
        if command not in options or not isinstance(values, dict):
            raise UserInputError(f"{path}: no command {command!r}; there are {', '.join(sorted(options))}")
        known = options[command]
        typed = {key.replace("_", "-"): value for key, value in values.items()}
        unknown = sorted(set(typed) - set(known))
        if unknown:
            raise UserInputError(f"{path}: {command} has no option {unknown[0]!r}")
        found[command] = {known[key]: value for key, value in typed.items()}
    return found


def read_invite(text: str | None, peers: list[str] | None, *, needed: bool) -> Invite | None:
    """The invite that was passed, or in the file that was named; with addresses alone, one for the swarm's creator.

    Raises
    ------
    InviteError, UserInputError
        It cannot be used, or there is none and one is needed.
    """
    if not text:
        if not needed:
            return None
        if peers and default_swarm_key().exists():
            return SwarmKeyFile(default_swarm_key()).key.invite(peers, role="host")
        if peers:
            raise UserInputError(
                "--peers says where the swarm is, not that you may join it: pass --invite too. Whoever created the "
                "swarm can make one with: nbrunner invite"
            )
        raise UserInputError(
            f"no swarm to join: pass --invite (or set {INVITE_VARIABLE}), or begin one: "
            "nbrunner serve MODEL --new-swarm"
        )
    if not text.strip().startswith("nbr1-") and len(text) < 500 and Path(text).expanduser().is_file():
        text = Path(text).expanduser().read_text()
    invite = Invite.parse(text)
    return invite.with_addresses(peers) if peers else invite


class SwarmKeyFile:
    """A swarm's key on disk, and beside it where its servers were last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.key = SwarmKey(Identity.load_or_create(path))
        except OSError as error:
            raise UserInputError(f"cannot use the swarm key {path}: {error.strerror}") from None
        self._addresses = path.with_name(path.name + ".addresses")

    @classmethod
    def find(cls, path: Path | None, *, create: bool) -> SwarmKeyFile | None:
        """The file that was named, or the default one if a swarm is to be begun."""
        if path is not None:
            if not path.exists() and not create:
                raise UserInputError(f"there is no swarm key {path}; --new-swarm makes one")
            return cls(path)
        return cls(default_swarm_key()) if create else None

    @property
    def addresses(self) -> list[str]:
        try:
            return self._addresses.read_text().split()
        except OSError:
            return []

    def keep_addresses(self, addresses: list[str]) -> None:
        self._addresses.write_text("\n".join(addresses) + "\n")

    def identity(self) -> Identity | None:
        """The identity of the swarm's first server, so that invites stay good when it starts again.

        None while another process has it: a swarm's creator may run several servers.
        """
        path = self.path.with_name(self.path.name + ".identity")
        identity = load_identity(path)
        self._lock = path.open("rb")  # held, and with it the lock, as long as this process lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            return None
        return identity

    def way_back(self, peers: list[str] | None = None) -> Invite | None:
        """An invite for ourselves to these peers, else to those of last time, if there were any."""
        known = peers or self.addresses
        return self.key.invite(known, role="host") if known else None


def default_swarm_key() -> Path:
    """Where the key of the swarm begun with --new-swarm is kept."""
    return platformdirs.user_data_path("nbrunner") / "swarm.key"


def load_identity(path: Path | None) -> Identity | None:
    """The identity in a file, made if missing; `UserInputError` if that cannot be."""
    try:
        return Identity.load_or_create(path) if path is not None else None
    except OSError as error:
        raise UserInputError(f"cannot use the identity file {path}: {error.strerror}") from None


def listen_addresses(host: str, port: int, listen: list[str] | None) -> list[str]:
    """Multiaddresses to listen on; `UserInputError` for an address or port that cannot be had."""
    if listen:
        return listen
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UserInputError(f"--host takes an IP address such as 0.0.0.0 or 127.0.0.1, not {host!r}") from None
    if port:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise UserInputError(
                    f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port, "
                    "or 0 for any free one"
                ) from None
    return [f"/ip{address.version}/{host}/tcp/{port}"]


def show_invites(invites: dict[str, str]) -> None:
    """Print invites for people to copy."""
    typer.echo("To use this swarm:\n\n" + invites["use"] + "\n")
    typer.echo("To host blocks in it, for people you trust with others' prompts:\n\n" + invites["host"] + "\n")


def set_up_logging(level: str) -> None:
    """Our own log on standard error; of other libraries only warnings."""
    if level.lower() not in ("debug", "info", "warning", "error"):
        raise UserInputError(f"{level!r} is not a log level: use debug, info, warning or error")
    form = "%(asctime)s %(levelname).1s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("nbrunner").setLevel(level.upper())
