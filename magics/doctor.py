"""``%swarm doctor``: what could be wrong, looked at one by one, each with what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbrunner.errors import serve_command
from nbrunner.magics.swarm_views import look, uncovered
from nbrunner.protocol.identity import short_peer
from nbrunner.swarm.view import ServerEntry, SwarmView
from nbrunner.widgets.page import page, plain_table, state, table, text

if TYPE_CHECKING:
    from nbrunner.client.connection import SwarmConnection

_COLUMNS = ("check", "result", "what was found", "what to do")
_RECORD_SECONDS = 75.0
"""Servers announce themselves for 60 s; one that seems to live longer has a clock ahead of ours."""


@dataclass(frozen=True)
class Finding:
    """One check: ``ok``, ``warning`` or ``problem``, what was seen, and what to do about it."""

    check: str
    result: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, as a table."""

    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        rows = [[one.check, state(one.result), one.found, one.advice] for one in self.findings]
        return plain_table(_COLUMNS, rows)

    def _repr_html_(self) -> str:
        rows = [
            [text(one.check), text(state(one.result)), text(one.found), text(one.advice)] for one in self.findings
        ]
        problems = sum(one.result == "problem" for one in self.findings)
        verdict = "no problems found" if not problems else f"{problems} problem{'' if problems == 1 else 's'}"
        return page(table(f"Swarm doctor: {verdict}", _COLUMNS, rows, wrap=(2, 3)))


async def examine(connection: SwarmConnection | None) -> Report:
    """Look at everything; runs on the engine."""
    findings = [_versions(), _daemon(connection), _ports()]
    if connection is None:
        findings.append(
            Finding("swarm", "warning", "this notebook is in no swarm", "%swarm start, or %swarm join INVITE")
        )
        return Report(tuple(findings))
    findings.append(_invite(connection))
    view = await look(connection)
    findings.append(_network(view))
    findings.append(_clock(view))
    findings.extend(_peer(peer, entry) for peer, entry in {**view.servers, **view.failed}.items())
    findings.append(_same_version(view))
    findings.extend(_blocks(view))
    return Report(tuple(findings))


def _versions() -> Finding:
    found = [f"python {platform.python_version()}"]
    for package in ("nbrunner", "torch", "transformers", "hivemind"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            advice = f"pip install {package}, in the kernel's environment"
            return Finding("versions", "problem", f"{package} is not installed", advice)
    wrong = _outside_ranges()
    if wrong:
        listed = ", ".join(f"{name} {has}, which is not {wants}" for name, has, wants in wrong)
        needed = " ".join(f"'{name}{wants}'" for name, _, wants in wrong)
        advice = f"pip install {needed}, in the kernel's environment; then restart the kernel"
        return Finding("versions", "problem", f"installed is {listed}", advice)
    return Finding("versions", "ok", ", ".join(found))


def _outside_ranges() -> list[tuple[str, str, str]]:
    """What nbrunner needs and finds in another version: name, version, range."""
    from packaging.requirements import Requirement  # transformers needs it too

    wrong = []
    for line in importlib.metadata.requires("nbrunner") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((requirement.name, installed, str(requirement.specifier)))
    return wrong


def _daemon(connection: SwarmConnection | None) -> Finding:
    spec = importlib.util.find_spec("hivemind")
    program = Path(str(spec.origin)).parent / "hivemind_cli" / "p2pd" if spec is not None else None
    if program is None or not (program.exists() or shutil.which("p2pd")):
        return Finding(
            "daemon", "problem", "hivemind came without its program p2pd", "pip install --force-reinstall hivemind"
        )
    if connection is None:
        return Finding("daemon", "ok", f"p2pd is installed ({program})")
    if connection.node.closed:
        advice = "%swarm join INVITE again; if it happens often, look for what ends processes named p2pd"
        return Finding("daemon", "problem", "the p2p daemon of this notebook has ended", advice)
    return Finding("daemon", "ok", f"running as {short_peer(connection.node.peer_id)}")


def _ports() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            return Finding("ports", "ok", "processes on this machine can reach each other")
    except OSError as error:
        advice = "allow connections to 127.0.0.1 (firewall, sandbox or container settings)"
        return Finding("ports", "problem", f"no connection to this machine itself: {error}", advice)


def _invite(connection: SwarmConnection) -> Finding:
    terms = connection.invite.terms
    if terms.expired():
        return Finding("invite", "problem", "it has expired", "ask the swarm's creator for a new one")
    left = terms.expires - time.time()
    until = "does not expire" if not terms.expires else f"expires in {left / 3600:.1f} hours"
    what = "host and use" if terms.role == "host" else "use"
    if terms.expires and left < 3600:
        return Finding("invite", "warning", f"allows to {what} the swarm, {until}", "ask for a new one in time")
    return Finding("invite", "ok", f"allows to {what} the swarm, {until}")


def _network(view: SwarmView) -> Finding:
    if view.nodes_heard:
        return Finding("network", "ok", f"{view.nodes_heard} nodes of the swarm answered")
    advice = "check the network; are the addresses in the invite still right? Ask for a new invite if not"
    return Finding("network", "problem", "nobody answered", advice)


def _clock(view: SwarmView) -> Finding:
    left = [entry.expires - time.time() for entry in view.servers.values()]
    if not left:
        advice = "if servers should be there, compare this machine's clock with theirs: stale records are not shown"
        return Finding("clock", "warning", "no records to compare with", advice)
    ahead = statistics.median(left) - _RECORD_SECONDS
    if ahead > 0:
        return Finding(
            "clock",
            "problem",
            f"this machine's clock is at least {ahead:.0f} s behind the servers'",
            "set the clock",
        )
    return Finding("clock", "ok", "agrees with the servers' records")


def _peer(peer: str, entry: ServerEntry) -> Finding:
    label = f"server {' '.join(part for part in (entry.record.name, short_peer(peer)) if part)}"
    if entry.failure:
        advice = "it may have gone; if not, its port is closed to us: its owner should look at its log and firewall"
        return Finding(label, "problem", entry.failure, advice)
    answer = "answers" if entry.round_trip is None else f"answers in {entry.round_trip * 1e3:.1f} ms"
    return Finding(label, "ok", answer)


def _same_version(view: SwarmView) -> Finding:
    ours = importlib.metadata.version("nbrunner")
    others = {entry.record.version for entry in view.servers.values() if entry.record.version} - {ours}
    if others:
        found = f"this notebook has {ours}, servers have {', '.join(sorted(others))}"
        return Finding("same version", "warning", found, "upgrade where it is older")
    return Finding("same version", "ok", f"all have {ours}")


def _blocks(view: SwarmView) -> Iterable[Finding]:
    spans: dict[str, list[tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    for entry in view.servers.values():
        record = entry.record
        spans.setdefault(record.model, [])
        counts[record.model] = record.num_blocks
        if record.state == "online":
            spans[record.model].append((record.start, record.end))
    for model, held in sorted(spans.items()):
        missing = uncovered(held, counts[model])
        if not missing:
            yield Finding(f"blocks of {model}", "ok", f"all {counts[model]} are served")
            continue
        start, end = missing[0]
        listed = ", ".join(f"[{low}, {high})" for low, high in missing)
        yield Finding(f"blocks of {model}", "problem", f"nobody serves {listed}", serve_command(model, start, end))
    if not spans:
        advice = "nbrunner serve MODEL --invite INVITE, on a machine with room for it"
        yield Finding("blocks", "problem", "no server has announced itself", advice)
