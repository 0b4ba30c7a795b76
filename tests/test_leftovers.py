"""The fixture that watches every test, watched."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import psutil
import pytest
from helpers import Leftovers, wait_until

FOREVER = "import time\nwhile True: time.sleep(1)"


def test_a_child_process_is_found_until_it_ends() -> None:
    before = Leftovers.now()
    assert before.since() == []
    child = subprocess.Popen([sys.executable, "-c", FOREVER])
    try:
        assert any(str(child.pid) in line for line in before.since())
    finally:
        child.kill()
        child.wait()
    assert before.wait_until_gone(5) == []


def test_an_orphan_is_found() -> None:
    """A grandchild whose parent is gone is nobody's child, and still ours."""
    before = Leftovers.now()
    start = (
        "import subprocess, sys\n"
        "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"print(subprocess.Popen([sys.executable, '-c', {FOREVER!r}], **quiet).pid)"
    )
    parent = subprocess.run(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    orphan = int(parent.stdout)
    try:
        assert any(str(orphan) in line for line in before.since())
    finally:
        psutil.Process(orphan).send_signal(signal.SIGKILL)
    wait_until(lambda: not any(str(orphan) in line for line in before.since()), 5, what="the orphan to end")


def test_a_thread_that_keeps_the_interpreter_alive_is_found() -> None:
    before = Leftovers.now()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="stubborn")
    thread.start()
    try:
        assert any("stubborn" in line for line in before.since())
    finally:
        stop.set()
        thread.join()
    assert before.since() == []


def test_sockets_whose_owner_is_gone_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(helpers, "SOCKETS", ((tmp_path, "nbrunner-*"),))
    monkeypatch.setattr(helpers, "_foreign_daemons", lambda ours: False)
    before = Leftovers.now()
    folder = tmp_path / "nbrunner-p2p-1"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(folder / "p2pd.sock"))
        assert before.since() == []
    assert before.since() == [f"sockets at {folder}"]


def test_a_failing_check_fails_the_test(tmp_path: Path) -> None:
    """The fixture itself, in a pytest of its own: a test that leaves a process behind fails."""
    for name in ("conftest.py", "helpers.py"):
        source = (Path(__file__).parent / name).read_text()
        (tmp_path / name).write_text(source.replace("timeout=10.0", "timeout=0.2"))
    pid_file = tmp_path / "pid"
    (tmp_path / "test_leaky.py").write_text(
        "import pathlib, subprocess, sys\n\n"
        "def test_leaky():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
        f"    pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    psutil.Process(int(pid_file.read_text())).kill()
    assert run.returncode == 1
    assert "left behind" in run.stdout
    assert pid_file.read_text() in run.stdout
