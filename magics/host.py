"""``%host``: lend this machine's memory to a swarm, from a cell."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import MagicArgumentParser
from IPython.utils.process import arg_split

from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.magics.errors import in_one_line
from nbrunner.magics.options import variable_name
from nbrunner.magics.state import BUNDLED, Notebook

if TYPE_CHECKING:
    from nbrunner.hosting import HostedServer


@functools.cache
def host_parser() -> MagicArgumentParser:
    """The options of ``%host``."""
    parser = MagicArgumentParser(prog="%host", add_help=False)
    parser.add_argument("model", nargs="?", default=BUNDLED)
    parser.add_argument("-b", "--blocks", default="auto", metavar="auto|A:B|N")
    parser.add_argument("-i", "--invite")
    parser.add_argument("--new-swarm", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--quantize", default="none", metavar="int8|int4|nf4")
    parser.add_argument("--max-memory", metavar="8GB")
    parser.add_argument("--for", dest="for_", metavar="2h")
    parser.add_argument("--name", default="")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--colab-consent", action="store_true")
    parser.add_argument("-o", "--out", type=variable_name, metavar="NAME")
    return parser


@magics_class
class HostMagics(Magics):
    """Holds ``%host`` and the servers that it started."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook
        self._servers: dict[str, HostedServer] = {}
        self._cards: dict[str, Any] = {}

    @line_magic
    def host(self, line: str) -> None:
        """Serve blocks of a model to a swarm, in a process of its own that ends with this kernel.

        %host [MODEL] [--blocks auto|A:B|N] [--invite INVITE] [--device D] [--max-memory 8GB] [--for 2h] [-o NAME]
            Without --invite, in the swarm of this notebook (%swarm start, %swarm join); the invite must have the
            role 'host'. ``--new-swarm`` begins one. ``auto`` takes what the swarm lacks and the memory holds, ``N``
            so many blocks of those. The cell returns at once and shows a card with buttons: pause, resume, drain,
            stop. Running it again shows the same server. ``-o NAME`` leaves the `nbrunner.hosting.HostedServer`.
        --dtype, --threads, --name
            As for ``nbrunner serve``.
        --quantize int8|int4|nf4
            Keep the weights of linear layers in 8 or 4 bits; nf4 on GPUs only.
        --colab-consent
            On Colab: that you know its rules.
        """
        arguments = host_parser().parse_args(arg_split(line))
        try:
            self._host(arguments)
        except NBRunnerError as error:
            raise in_one_line(error, "%host") from None

    def _host(self, arguments: Any) -> None:
        invite = self._invite(arguments)
        key = self._key(arguments, invite)
        server = self._servers.get(key)
        if server is None or not server.alive:
            server = self._servers[key] = self._start(arguments, invite)
        self._notebook.store(arguments.out, server)
        self._show(key, server)

    def _start(self, arguments: Any, invite: str | None) -> HostedServer:
        from nbrunner.hosting import serve

        return serve(
            arguments.model,
            arguments.blocks,
            invite=invite,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            max_memory=arguments.max_memory,
            for_=arguments.for_,
            name=arguments.name,
            threads=arguments.threads,
            consent=arguments.colab_consent,
        )

    def _invite(self, arguments: Any) -> str | None:
        """The invite to host with; None begins a swarm."""
        if arguments.new_swarm:
            if arguments.invite:
                raise UserInputError("--new-swarm begins a swarm and --invite joins one: give one of them")
            return None
        if arguments.invite:
            given = self.shell.user_ns.get(arguments.invite, arguments.invite)
            return str(getattr(given, "invite", given))
        notebook = self._notebook
        if notebook.local is not None:
            return str(notebook.local.make_invite(role="host"))
        found = notebook.invite or notebook.config.invite
        if not found:
            raise UsageError(
                "%host: this notebook is in no swarm yet: %swarm join INVITE, or --invite INVITE, or --new-swarm"
            )
        return str(found)

    def _key(self, arguments: Any, invite: str | None) -> str:
        """The same for a cell that is run again: what is asked for, and in which swarm."""
        from nbrunner.protocol.credentials import Invite

        swarm = Invite.parse(invite).swarm.hex() if invite is not None else "new"
        asked = {name: value for name, value in vars(arguments).items() if name not in ("out", "invite")}
        return hashlib.sha256(json.dumps([swarm, asked], sort_keys=True).encode()).hexdigest()

    def _show(self, key: str, server: HostedServer) -> None:
        title = f"Hosting {server.model} in swarm {server.swarm}"
        if not hasattr(self.shell, "kernel"):
            server.wait_ready()
            print(server)  # noqa: T201 - a terminal has no place for a card that changes
            return
        from nbrunner.widgets.host_controls import LiveHostCard

        before = self._cards.pop(key, None)
        if before is not None:
            before.close()  # one card a server is enough; the old one stays as it was
        self._cards[key] = LiveHostCard(server, title)

    def close(self) -> None:
        """End all servers that were started here."""
        servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.stop()
        cards, self._cards = list(self._cards.values()), {}
        for card in cards:
            card.close()
