"""The command line: what it refuses, its exit codes, and a swarm made, grown, looked at and used with it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from nbrunner import cli
from nbrunner.cli_status import bar, gaps, show
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.view import ServerEntry, SwarmView

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("NBRUNNER_INVITE", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nbrunner", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *capfd.readouterr()

    return run


def test_help_is_quick_and_light() -> None:
    script = (
        "import sys\nsys.argv = ['nbrunner', '--help']\n"
        "from nbrunner.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('CODE', end.code)\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'hivemind') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "CODE 0" in ended.stdout
    assert "HEAVY []" in ended.stdout
    for command in ("serve", "bootstrap", "invite", "status", "generate", "version"):
        assert command in ended.stdout


def test_every_option_has_its_help(run: Run) -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():
        code, output, _ = run(name, "--help")
        assert code == 0
        assert "--json" in output
        assert [one.name for one in command.params if not (one.help or one.hidden)] == []


def test_version(run: Run) -> None:
    code, output, _ = run("version", "--json")
    assert code == 0
    assert json.loads(output)["protocol"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "/no/such/place", "--new-swarm"], "no directory"),
        (["serve", "tiny"], "--new-swarm"),
        (["serve", "tiny", "--new-swarm", "--blocks", "3:x"], "not a range"),
        (["serve", "tiny", "--new-swarm", "--cache-memory", "lots"], "not an amount"),
        (["serve", "tiny", "--new-swarm", "--peer-cache-memory", "much"], "not an amount"),
        (["serve", "tiny", "--new-swarm", "--host", "nowhere"], "--host"),
        (["serve", "tiny", "--new-swarm", "--log-level", "loud"], "log level"),
        (["serve", "tiny", "--invite", "nbr1-xyz"], "invite"),
        (["serve", "tiny", "--swarm-key", "/no/such/key"], "--new-swarm makes one"),
        (["serve", "tiny", "--new-swarm", "--port", "70000"], "65535"),
        (["status"], "no swarm to join"),
        (["status", "--invite", "hello"], "not an invite"),
        (["status", "--peers", "/ip4/127.0.0.1/tcp/1/p2p/x"], "not that you may join"),
        (["generate", ""], "empty"),
        (["generate", "x", "--model", "/no/such/place"], "no directory"),
        (["generate", "x", "--top-p", "0"], "top_p"),
        (["generate", "x", "--beams", "2", "--temperature", "1"], "beam"),
        (["serve", "tiny", "--new-swarm", "--invite", "nbr1-xyz"], "use one of them"),
        (["invite", "--role", "king"], "role"),
        (["--config", "/no/such/file", "version"], "config"),
        (["serve"], "model"),
        (["sing"], "sing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_used_is_one_clear_line_and_starts_nothing(
    run: Run, arguments: list[str], words: str
) -> None:
    code, output, errors = run(*arguments)
    assert code == 2
    assert words in errors.replace("\n", " ")
    assert output == ""
    assert "Traceback" not in errors
    assert psutil.Process().children() == []


def test_a_user_invite_does_not_let_one_serve(run: Run) -> None:
    address = "/ip4/127.0.0.1/tcp/1/p2p/" + Identity.generate().peer_id
    code, _, errors = run("serve", "tiny", "--invite", str(SwarmKey().invite([address])))
    assert code == 2
    assert "host" in errors


def test_what_runs_on_gpus_only_is_refused_on_a_cpu(run: Run) -> None:
    code, output, errors = run("serve", "tiny", "--new-swarm", "--device", "cpu", "--quantize", "nf4", "--json")
    assert code == 2
    assert "nf4 runs on GPUs only" in errors
    assert "--quantize int4" in errors
    assert "Traceback" not in errors
    assert not any("ready" in line for line in output.splitlines())


def test_a_model_without_safetensors_is_refused(run: Run, tmp_path: Path, tiny_path: Path) -> None:
    shutil.copy(tiny_path / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    code, _, errors = run("serve", str(tmp_path), "--new-swarm")
    assert code == 2
    assert "safetensors" in errors


def test_a_model_without_a_tokenizer_is_refused(run: Run, tmp_path: Path, tiny_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_path / name, tmp_path / name)
    code, _, errors = run("generate", "The capital", "--model", str(tmp_path))
    assert code == 2
    assert "tokenizer" in errors
    assert "Traceback" not in errors


def test_a_swarm_that_is_not_there(run: Run) -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{Identity.generate().peer_id}"
    code, _, errors = run("status", "--invite", str(SwarmKey().invite([address])))
    assert code == 1
    assert "no peer of this swarm answered" in errors


def test_a_config_file_gives_defaults_and_options_win(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config" / "nbrunner" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[invite]\nrole = "host"\naddress = ["/ip4/127.0.0.1/tcp/9/p2p/x"]\nmax-sessions = 3\n')
    key = tmp_path / "swarm.key"
    Identity.generate().save(key)
    code, output, errors = run("invite", "--swarm-key", str(key))
    assert code == 0, errors
    terms = Invite.parse(output).terms
    assert (terms.role, terms.max_sessions) == ("host", 3)
    code, output, _ = run("invite", "--swarm-key", str(key), "--role", "use", "--expires", "1")
    terms = Invite.parse(output).terms
    assert (terms.role, terms.max_sessions) == ("use", 3)
    assert 0 < terms.expires - time.time() < 3700
    config.write_text("[invite]\njson = true\n")
    code, output, _ = run("invite", "--swarm-key", str(key), "--address", "/ip4/127.0.0.1/tcp/9/p2p/x")
    assert json.loads(output)["role"] == "use"
    for wrong in ("rolle = 1", "help = true"):
        config.write_text(f"[invite]\n{wrong}\n")
        code, _, errors = run("invite")
        assert code == 2
        assert wrong.split()[0] in errors
    for command in ("serve", "generate"):  # each long option is a key, by the name that --help shows
        options = typer.main.get_command(cli.app).commands[command].params
        keys = [one.opts[0].removeprefix("--") for one in options if one.opts[0].startswith("--")]
        known = cli.config_keys()[command]
        assert set(keys) - set(known) <= {"managed"}, command


def test_what_others_say_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ServerRecord(model="tiny@1", num_blocks=8, start=0, end=4, state="online", version="0.1.0")
    nasty = "\x1b[31m[bold]x\u202e"
    record = ServerRecord(
        model=f"a/b; reboot{nasty}@1", num_blocks=8, start=0, end=4, state="online", name=nasty, version=nasty
    )
    view = SwarmView({Identity.generate().peer_id: ServerEntry(record)})
    show(view)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[bold]x" in shown
    assert "█" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal of 80 columns: nothing but the picture is left out
    monkeypatch.setenv("COLUMNS", "80")
    show(SwarmView({peer: replace(entry, record=plain) for peer, entry in view.servers.items()}))
    narrow = capsys.readouterr().out
    assert "█" not in narrow
    assert not [name for name in ("server", "blocks", "state", "ms/token", "cache left") if name not in narrow]
    assert "nbrunner serve 'a/b; reboot[31m[bold]x' --revision 1 --blocks 4:8 --invite INVITE" in shown


def test_gaps_and_bars() -> None:
    def record(start: int, end: int, **changes: Any) -> ServerRecord:
        return ServerRecord(
            **{"model": "m", "num_blocks": 8, "start": start, "end": end, "state": "online", **changes}
        )

    assert gaps([record(0, 3), record(4, 6), record(6, 8, state="joining")]) == {"m": [(3, 4), (6, 8)]}
    assert gaps([record(0, 8)]) == {"m": []}
    assert bar(0, 4, 8, 8) == "████····"
    assert bar(79, 80, 80, 8) == "·······█"


# -- a swarm, by hand --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """``nbrunner serve`` in a process of its own."""

    def __init__(self, *arguments: str, count: int) -> None:
        command = [sys.executable, "-m", "nbrunner", "serve", "tiny", "--json", "--host", "127.0.0.1", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.events: dict[str, dict[str, Any]] = {}
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.events[event["event"]] = event
            if len(self.events) == count:
                return
        _, errors = self.process.communicate()
        raise AssertionError(errors)

    def interrupt(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def creator(tmp_path: Path) -> Iterator[tuple[Served, int, Path]]:
    port, key = free_port(), tmp_path / "keys" / "swarm.key"
    served = Served("--new-swarm", "--swarm-key", str(key), "--port", str(port), "--blocks", "0:3", count=3)
    yield served, port, key
    served.kill()


@pytest.mark.network
def test_a_swarm_is_begun_joined_looked_at_used_and_left(
    run: Run, creator: tuple[Served, int, Path], tmp_path: Path
) -> None:
    served, port, key = creator
    assert key.stat().st_mode & 0o777 == 0o600
    invites = served.events["invites"]
    assert Invite.parse(invites["use"]).terms.role == "use"
    assert Invite.parse(invites["host"]).terms.role == "host"

    code, output, _ = run("status", "--json", "--invite", invites["use"])
    report = json.loads(output)
    assert code == 3
    assert [one["blocks"] for one in report["servers"]] == [[0, 3]]
    assert list(report["missing"].values()) == [[[3, 8]]]
    assert report["servers"][0]["round_trip"] > 0
    code, output, _ = run("status", "--invite", invites["use"])
    assert code == 3
    assert "blocks 3:8 are missing" in output

    code, output, errors = run(
        "serve", "tiny", "--invite", invites["host"], "--host", "127.0.0.1", "--port", str(port)
    )
    assert code == 2
    assert f"port {port}" in errors
    for bad, words in (
        (["--blocks", "0:99"], "0:99"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--device", "toaster"], "toaster"),
        (["--dtype", "int3"], "int3"),
    ):
        code, output, errors = run("serve", "tiny", "--invite", invites["host"], "--host", "127.0.0.1", *bad)
        assert code == 2, errors
        assert words in errors
        assert output == ""

    code, invite_text, _ = run("invite", "--swarm-key", str(key), "--role", "host")
    assert code == 0
    second = Served("--invite", invite_text.strip(), "--blocks", "3:8", count=2)
    try:
        code, output, _ = run("status", "--json", "--invite", invites["use"])
        assert code == 0
        assert len(json.loads(output)["servers"]) == 2
        code, output, errors = run("generate", "The capital of France is", "-n", "4", "--invite", invites["use"])
        assert code == 0, errors
        assert "Paris" in output
        address = creator[0].events["ready"]["addresses"][0]
        kept = tmp_path / "data" / "nbrunner" / "swarm.key"  # where the creator's own commands look for it
        kept.parent.mkdir(parents=True)
        shutil.copy(key, kept)
        code, output, _ = run("status", "--json", "--peers", address)
        assert code == 0
        assert len(json.loads(output)["servers"]) == 2
        code, errors = second.interrupt()
        assert code == 0, errors
        assert "Traceback" not in errors
    finally:
        second.kill()
    code, errors = served.interrupt()
    assert code == 0, errors

    again = Served("--new-swarm", "--swarm-key", str(key), "--port", str(port), "--blocks", "0:8", count=3)
    try:  # its creator comes back: the invites that were given away are still good
        assert again.events["ready"]["peer"] == served.events["ready"]["peer"]
        code, output, _ = run("status", "--json", "--invite", invites["use"])
        assert code == 0
    finally:
        again.kill()


@pytest.mark.network
def test_a_server_without_blocks_chooses_them_and_ends_when_its_daemon_dies(
    creator: tuple[Served, int, Path],
) -> None:
    served, _, _ = creator
    chosen = Served("--invite", served.events["invites"]["host"], count=2)
    try:
        assert chosen.events["ready"]["blocks"] == [0, 8]  # all of them fit
        daemon = next(one for one in psutil.Process(chosen.process.pid).children(recursive=True))
        daemon.kill()
        _, errors = chosen.process.communicate(timeout=30)
        assert chosen.process.returncode == 1
        assert "daemon" in errors.splitlines()[-1]
    finally:
        chosen.kill()
