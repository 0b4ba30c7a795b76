"""The cores of a machine, shared by the servers on it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.server import neighbours as found
from nbrunner.server import threads
from nbrunner.server.neighbours import Neighbour, Seat, neighbours
from nbrunner.server.options import PARENTS_FOLDER, PARENTS_PREFIX
from nbrunner.server.scheduler import Urgency
from nbrunner.server.threads import Threads, processors, share, usable_cores
from nbrunner.swarm.daemon import FOLDER_PREFIX
from nbrunner.swarm.loop import EngineLoop

# -- the decision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [
        (8, [], 8),
        (8, [0], 4),
        (8, [0, 0], 2),
        (1, [0, 0, 0], 1),
        (16, [1, 1], 14),  # a local swarm beside it
        (16, [1, 1, 0], 7),
        (4, [4], 1),  # whoever was told to take all, takes all
        (4, [99], 1),
    ],
)
def test_each_takes_its_share_of_what_is_left(cores: int, others: list[int], expected: int) -> None:
    assert share(cores, others) == expected


@given(st.integers(1, 256), st.lists(st.integers(1, 8), max_size=8), st.integers(1, 300))
def test_all_shares_together_are_not_more_than_there_is(cores: int, fixed: list[int], sharing: int) -> None:
    each = share(cores, [*fixed, *[0] * (sharing - 1)])
    assert each >= 1
    assert each == 1 or each * sharing + sum(fixed) <= cores < (each + 1) * sharing + sum(fixed)
    assert share(cores, [*fixed, *[0] * sharing]) <= each


def test_cores_are_counted_as_torch_counts_them(tmp_path: Path) -> None:
    """Two processors of one core are one; a container's share of time counts; what cannot be read does not."""
    assert usable_cores([0, 1, 2, 3], system=tmp_path) == 4
    for one in range(4):
        folder = tmp_path / f"devices/system/cpu/cpu{one}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{one % 2},{one % 2 + 2}\n")
    assert usable_cores([0, 1, 2, 3], system=tmp_path) == 2
    assert usable_cores([1, 3], system=tmp_path) == 1
    assert usable_cores([], system=tmp_path) == 1
    everything = range(100, 116)  # of these nothing is known
    group = tmp_path / "fs/cgroup"
    (group / "cpu").mkdir(parents=True)
    for quota, expected in (("-1", 16), ("250000", 2), ("50000", 1), ("nonsense", 16)):
        (group / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores(everything, system=tmp_path) == expected
    for limit, expected in (("max 100000", 16), ("350000 100000", 3), ("50000 100000", 1), ("1 0", 16)):
        (group / "cpu.max").write_text(f"{limit}\n")
        assert usable_cores(everything, system=tmp_path) == expected


# -- who is there ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where only this test's servers are looked for."""
    monkeypatch.setattr(found, "_root", lambda: tmp_path)
    return tmp_path


def folder_in(root: Path, name: str = "1-a") -> Path:
    folder = root / f"{FOLDER_PREFIX}{name}"
    folder.mkdir(mode=0o700, parents=True)
    return folder


def test_servers_find_each_other_and_nobody_else(root: Path) -> None:
    first = Seat(folder_in(root), Neighbour(0, frozenset({0, 1})))
    second = Seat(folder_in(root / f"{PARENTS_PREFIX}x"), Neighbour(3, frozenset({1})))
    dead = Seat(folder_in(root, "2-killed"), Neighbour())
    try:
        assert neighbours(first) == [Neighbour(), Neighbour(3, frozenset({1}))]
        os.close(dead._file)  # as the kernel does, however a process ends
        assert dead.path.exists()
        assert neighbours(first) == [Neighbour(3, frozenset({1}))]
        assert neighbours(second) == [Neighbour(0, frozenset({0, 1}))]
        second.path.parent.chmod(0o755)
        assert neighbours(first) == []  # anybody may have put it there
    finally:
        first.close()
        first.close()
        second.close()
    assert not first.path.exists()
    assert neighbours() == []


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b'{"threads": "many"}', b'{"threads": 1, "processors": 3}'])
def test_what_another_version_wrote_still_counts_as_one(root: Path, text: bytes) -> None:
    seat = Seat(folder_in(root), Neighbour(7))
    try:
        seat.path.write_bytes(text)
        assert neighbours() == [Neighbour()]
    finally:
        seat.close()


def test_a_local_swarms_servers_look_where_their_parent_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENTS_FOLDER, f"/tmp/{PARENTS_PREFIX}abc")
    assert found._root() == Path("/tmp")
    monkeypatch.delenv(PARENTS_FOLDER)
    monkeypatch.setattr(tempfile, "tempdir", "/scratch")
    assert found._root() == Path("/scratch")


def test_only_servers_on_our_cores_count_and_omp_stays_the_most(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda _: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    auto, told = Threads(0), Threads(5)
    assert (auto.count, told.count) == (12, 5)
    elsewhere = Seat(folder_in(root), Neighbour(0, frozenset({max(processors()) + 1})))
    here = Seat(folder_in(root, "2-b"), Neighbour(0, processors()))
    anywhere = Seat(folder_in(root, "3-c"), Neighbour())
    try:
        assert auto.look()
        assert not told.look()
        assert (auto.count, told.count) == (4, 5)
        monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
        assert auto.look()
        assert (auto.count, told.count) == (3, 5)
        for text in ("many", "0"):
            monkeypatch.setenv("OMP_NUM_THREADS", text)
            auto.look()
            assert auto.count == 4
    finally:
        for seat in (elsewhere, here, anywhere):
            seat.close()


# -- servers -----------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_a_server_that_runs_computes_with_fewer_when_another_comes(
    root: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both threads that compute; and it measures again how fast it is."""
    monkeypatch.setattr(threads, "usable_cores", lambda _: 2)
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.05)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    swarm, before = InProcessSwarm(tiny_path), torch.get_num_threads()

    async def numbers() -> tuple[int, int]:
        there = await server._compute.submit(torch.get_num_threads, Urgency.DECODE)
        return torch.get_num_threads(), there.value

    try:
        server = swarm.add(0, 2, threads=0)
        assert EngineLoop.get().run(numbers(), timeout=10) == (2, 2)
        speed = server.host.speed
        other = Seat(folder_in(root), Neighbour())
        try:
            wait_until(lambda: server.host.speed is not speed, 10, what="it has measured again")
            assert server.threads == 1
            assert EngineLoop.get().run(numbers(), timeout=10) == (1, 1)
            assert server.host.step_seconds == server.host.speed.step_seconds > 0
            assert server.host.speed.cache_bytes_per_token == speed.cache_bytes_per_token
        finally:
            other.close()
        wait_until(lambda: server.threads == 2, 10, what="it has its cores back")
    finally:
        swarm.close()
        EngineLoop.get().run(back_to(before), timeout=10)


async def back_to(count: int) -> None:
    torch.set_num_threads(count)


def test_threads_sleep_at_barriers_in_a_server_that_was_started_by_hand(tmp_path: Path) -> None:
    """Asked of the OpenMP library itself, which reads its environment when torch is loaded."""
    variables = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    variables.pop("OMP_WAIT_POLICY", None)
    swarm = ["--new-swarm", "--swarm-key", str(tmp_path / "key")]
    refused = ["--device", "cpu", "--quantize", "nf4"]  # but only once torch is here
    ended = subprocess.run(
        [sys.executable, "-m", "nbrunner", "serve", "tiny", *swarm, *refused],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ended.stderr)  # what a thread counts to before it sleeps
    if not spins:
        pytest.skip("torch has another OpenMP library here")
    assert set(spins) == {"0"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for the sockets of servers that look for each other: other tests' are elsewhere."""
    folder = Path(tempfile.mkdtemp(prefix="nbt-"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.network
def test_two_servers_share_the_cores_and_a_killed_one_gives_them_back(place: Path) -> None:
    cores = usable_cores(processors())
    if cores < 2:
        pytest.skip("one core cannot be shared")
    with nbrunner.serve("tiny", "0:2") as first:
        wait_until(lambda: first.status.threads == cores, 20, what="the first has all cores")
        with nbrunner.serve("tiny", "0:2") as second:
            wait_until(lambda: second.status.threads, 20, what="the second says what it takes")
            wait_until(lambda: first.status.threads == cores // 2, 20, what="the first has half")
            assert second.status.threads == cores // 2
            assert "servers of yours on this machine: 2" in first.log
            os.kill(second.pid, signal.SIGKILL)
            wait_until(lambda: second.state == "failed", 10, what="it is dead")
            assert list(place.glob(f"{FOLDER_PREFIX}{second.pid}-*/serving"))  # nobody was there to remove it
            wait_until(lambda: first.status.threads == cores, 20, what="the first has all cores again")
