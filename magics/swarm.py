"""``%swarm``: the swarm this notebook is in."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import html
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import MagicArgumentParser
from IPython.utils.process import arg_split

from nbrunner.errors import NBRunnerError
from nbrunner.magics.errors import Interrupted, in_one_line
from nbrunner.magics.options import variable_name
from nbrunner.magics.state import BUNDLED, Notebook

if TYPE_CHECKING:
    from nbrunner.client.connection import SwarmConnection

T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """What ``%swarm start`` answers: one line and the invite."""

    line: str
    invite: str

    def __repr__(self) -> str:
        return f"{self.line}\nInvite: {self.invite}"

    def _repr_html_(self) -> str:
        return (
            f"<div>{html.escape(self.line)}</div><div>Invite: <code style='overflow-wrap: anywhere; white-space: "
            f"pre-wrap'>{html.escape(self.invite)}</code></div>"
        )


@functools.cache
def subcommand_parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Subcommand → parser."""
    start = _parser("start")
    start.add_argument("model", nargs="?")
    start.add_argument("--servers", nargs="+", metavar="N or A:B")
    start.add_argument("-o", "--out", type=variable_name, metavar="NAME")
    join = _parser("join")
    join.add_argument("invite")
    invite = _parser("invite")
    invite.add_argument("--role", choices=("use", "host"), default="use")
    invite.add_argument("--expires", metavar="2h")
    invite.add_argument("-o", "--out", type=variable_name, metavar="NAME")
    chain = _parser("chain")
    chain.add_argument("-m", "--model")
    return {
        "start": start,
        "join": join,
        "status": _parser("status"),
        "chain": chain,
        "invite": invite,
        "stop": _parser("stop"),
        "map": _map_parser(),
        "doctor": _parser("doctor"),
    }


@magics_class
class SwarmMagics(Magics):
    """Holds ``%swarm``."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook

    @no_var_expand
    @line_magic
    def swarm(self, line: str) -> Any:
        """The swarm this notebook is in.

        %swarm start [MODEL] [--servers N | A:B ...] [-o NAME]
            Start servers on this machine, each a process with a part of the model (the bundled one without MODEL),
            connect to them, and print an invite. ``--servers 3`` shares the blocks among three;
            ``--servers 0:4 4:8 4:8`` says who holds which, here with a spare for the second half. ``-o NAME``
            leaves the ``nbrunner.LocalSwarm`` in a variable: ``.servers``, ``.add_server("4:8")``, ``.invite``.
            Where one runs already and --servers does not ask for another, it is kept.
        %swarm join INVITE
            Join the swarm of an invite; a variable that holds one, or a LocalSwarm, will do.
        %swarm invite [--role use|host] [--expires 2h] [-o NAME]
            Another invite to the swarm that was started here; with --role host, its holder may serve blocks too.
        %swarm status
            Who serves which blocks, how fast, how far away, with how much room.
        %swarm map [stop | once]
            The same as a live picture, with the route of the next request and with what is missing. It changes
            once a second while other cells run. Its button, ``%swarm map stop``, or leaving the swarm freezes it to
            an image that stays in the notebook; ``once`` gives only that.
        %swarm chain [-m MODEL]
            Where the next request would go, and why.
        %swarm doctor
            Check daemon, ports, clock, versions, peers and blocks; each with what to do.
        %swarm stop
            Leave, and stop the servers that were started here.
        """
        words = arg_split(line)
        parsers = subcommand_parsers()
        if not words or words[0] not in parsers:
            raise UsageError(f"%swarm {' | '.join(parsers)} (%swarm? tells more)")
        arguments = parsers[words[0]].parse_args(words[1:])
        commands: Mapping[str, Callable[[Any], Any]] = {
            "start": self._start,
            "join": self._join,
            "status": self._status,
            "chain": self._chain,
            "invite": self._invite,
            "stop": self._stop,
            "map": self._map,
            "doctor": self._doctor,
        }
        try:
            return commands[words[0]](arguments)
        except NBRunnerError as error:
            raise in_one_line(error, f"%swarm {words[0]}") from None

    def _start(self, arguments: Any) -> Started:
        notebook = self._notebook
        swarm = notebook.local
        model = arguments.model or BUNDLED
        kept = swarm is not None and arguments.servers is None and arguments.model in (None, notebook.local_name)
        if swarm is None or not kept:
            servers = _servers(arguments.servers, notebook.config.servers)
            swarm = self._work(lambda: notebook.start_swarm(model, servers))
        notebook.store(arguments.out, swarm)
        spans = ", ".join(f"[{start}, {end})" for start, end in (server.blocks for server in swarm.servers))
        count = f"{len(swarm.servers)} server{'' if len(swarm.servers) == 1 else 's'}"
        line = (
            f"{'Already running' if kept else 'Started'}: {count} on this machine for {notebook.local_name}, with "
            f"the blocks {spans}. The invite lets other notebooks on this machine in."
        )
        return Started(line, str(swarm.invite))

    def _invite(self, arguments: Any) -> str | None:
        from nbrunner.server.options import parse_seconds

        if self._notebook.local is None:
            raise UsageError("%swarm invite: only the notebook that started the swarm can make invites for it")
        seconds = parse_seconds(arguments.expires) if arguments.expires else None
        made = str(self._notebook.local.make_invite(role=arguments.role, expires_in=seconds))
        self._notebook.store(arguments.out, made)
        return None if arguments.out else made

    def _join(self, arguments: Any) -> Any:
        given = self.shell.user_ns.get(arguments.invite, arguments.invite)
        invite = str(getattr(given, "invite", given))
        self._work(lambda: self._notebook.join(invite))
        return self._status(arguments)

    def _status(self, _: Any) -> Any:
        from nbrunner.magics.swarm_views import look, swarm_table

        connection = self._connection()
        view = self._on_engine(lambda: look(connection))
        self._work(self._notebook.learn_fits)
        return swarm_table(view, title=self._title(connection), invite=True, advice=self._advice(connection))

    def _map(self, arguments: Any) -> Any:
        from nbrunner.magics.swarm_map import MapKeeper, map_of
        from nbrunner.magics.swarm_views import look

        if arguments.what == "stop":
            if not self._notebook.stop_map():
                raise UsageError("%swarm map stop: no live map is shown")
            return None
        connection = self._connection()
        title = self._title(connection)
        view = self._on_engine(lambda: look(connection))
        self._work(self._notebook.learn_fits)
        if arguments.what == "once" or not hasattr(self.shell, "kernel"):  # a terminal cannot draw over its past
            return map_of(view, title=title, moment=time.strftime("%H:%M:%S"), advice=self._advice(connection))
        self._notebook.stop_map()
        self._notebook.map = MapKeeper(connection, title, lambda: self._advice(connection))
        return None

    def _advice(self, connection: SwarmConnection) -> Mapping[str, str]:
        """For each model that would run faster here: the sentence that says so."""
        from nbrunner.swarm.routing import explain

        view, told = connection.directory.view, {}
        for uid in {entry.record.model for entry in view.servers.values()}:
            fit = self._notebook.fits.fit(uid)
            if fit is not None:
                way = explain(view, model=uid, start=0, end=fit.blocks)
                told[uid] = self._notebook.fits.sentence(uid, way.seconds if way.hops else None)
        return told

    def _title(self, connection: SwarmConnection) -> str:
        from nbrunner.protocol.credentials import swarm_name

        here = ", on this machine" if self._notebook.local is not None else ""
        role = connection.invite.terms.role
        return f"Swarm {swarm_name(connection.invite.swarm)}{here}; this notebook may {role} it"

    def _chain(self, arguments: Any) -> Any:
        from nbrunner.magics.swarm_views import chain_view, look
        from nbrunner.swarm.routing import explain

        connection = self._connection()
        view = self._on_engine(lambda: look(connection))
        records = [entry.record for entry in [*view.servers.values(), *view.failed.values()]]
        served = sorted({record.model for record in records})
        wanted = arguments.model or self._notebook.config.model
        matching = [uid for uid in served if not wanted or wanted in (uid, uid.partition("@")[0])]
        if len(matching) != 1:
            choices = ", ".join(served) or "nothing yet"
            raise UsageError(f"%swarm chain: choose a model with -m; this swarm serves {choices}")
        blocks = max(record.num_blocks for record in records if record.model == matching[0])
        return chain_view(explain(view, model=matching[0], start=0, end=blocks), view, matching[0])

    def _stop(self, _: Any) -> None:
        if not self._notebook.connected:
            raise UsageError("%swarm stop: this notebook is in no swarm")
        self._work(self._notebook.leave)

    def _doctor(self, _: Any) -> Any:
        from nbrunner.magics.doctor import examine

        return self._on_engine(lambda: examine(self._notebook.connection))

    def _connection(self) -> SwarmConnection:
        connection = self._notebook.connection
        if connection is None and self._notebook.config.invite:
            connection = self._work(lambda: self._notebook.join(self._notebook.config.invite))
        if connection is None:
            raise UsageError("this notebook is in no swarm yet: %swarm start, or %swarm join INVITE")
        return connection

    def _work(self, job: Callable[[], T]) -> T:
        """Run something that takes seconds where it cannot be interrupted half-way."""
        future: concurrent.futures.Future[T] = self._notebook.worker.submit(job)
        try:
            return future.result()
        except KeyboardInterrupt:
            raise Interrupted("what was begun goes on in the background; %swarm stop ends it") from None

    def _on_engine(self, make: Callable[[], Any]) -> Any:
        from nbrunner.swarm.loop import EngineLoop

        try:
            return EngineLoop.get().run(make(), timeout=30)
        except TimeoutError:
            raise UsageError("the swarm did not answer within 30 s; %swarm doctor looks for the reason") from None


def _parser(name: str) -> MagicArgumentParser:
    return MagicArgumentParser(prog=f"%swarm {name}", add_help=False)


def _map_parser() -> MagicArgumentParser:
    parser = _parser("map")
    parser.add_argument("what", nargs="?", choices=["stop", "once"])
    return parser


def _servers(words: list[str] | None, default: int) -> int | list[str]:
    if words is None:
        return default
    if len(words) == 1 and words[0].isdigit():
        if int(words[0]) < 1:
            raise UsageError("%swarm start: --servers needs at least one server")
        return int(words[0])
    for word in words:
        start, _, end = word.partition(":")
        if not (start.isdigit() and end.isdigit() and int(start) < int(end)):
            raise UsageError(f"%swarm start: --servers takes a number or ranges such as 0:4 4:8, not {word!r}")
    return words
