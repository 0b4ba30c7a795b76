"""Teaching together as people do it: client processes, their children, and what is left when they are gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import ROOT, wait_until

import nbrunner
from nbrunner.errors import InviteError, PeerError, SessionError, UserInputError
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.limits import Limits
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream
from nbrunner.tuning.together import Outcome, Together

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]

KEY = SwarmKey()
CLIENT = ROOT / "tests" / "together_client.py"


@pytest.fixture(scope="module")
def invite() -> Iterator[str]:
    """Of a swarm with one node, which serves nothing."""

    async def hold(stream: Stream) -> None:
        await stream.receive()

    async def start() -> Node:
        node = await Node.create(swarm_key=KEY)
        await node.serve(hold, Limits())
        return node

    node = EngineLoop.get().run(start(), 60)
    yield str(KEY.invite(node.addresses))
    EngineLoop.get().run(node.close(), 30)


def parameters(value: float = 0.0) -> dict[str, torch.nn.Parameter]:
    return {"w": torch.nn.Parameter(torch.full((40, 50), value)), "b": torch.nn.Parameter(torch.full((3,), value))}


def teach(together: Together, tensors: dict[str, torch.nn.Parameter], steps: int, way: float) -> list[Outcome]:
    """So many steps, each of which adds ``way`` to all parameters."""
    outcomes = []
    for _ in range(steps):
        time.sleep(0.01)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor += way
        if (outcome := together.after_step(4)) is not None:
            outcomes.append(outcome)
    return outcomes


def vector(tensors: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in sorted(tensors)])


def in_threads(*jobs: Any) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [job.result() for job in [pool.submit(*job) for job in jobs]]


# -- three client processes on a model ---------------------------------------------------------------------------


def run_client(
    options: dict[str, Any], *, joined: threading.Barrier | None = None, kill_after: int | None = None
) -> list[dict[str, Any]]:
    """The events of a client process. It begins when all have joined, and is killed after so many steps."""
    with subprocess.Popen([sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(options).encode() + b"\n")
        process.stdin.flush()
        events = []
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "joined" and joined is not None:
                joined.wait(90)  # else one could be through before another is there
                process.stdin.write(b"go\n")
                process.stdin.flush()
            if kill_after is not None and events[-1].get("step") == kill_after:
                process.kill()
        return events


def test_three_teach_one_is_killed_and_the_others_finish_as_well_as_one_alone(tmp_path: Path) -> None:
    """Each has a third of the facts. The two who are left know more of all of them than one who taught alone."""
    steps = 40
    with nbrunner.LocalSwarm(servers=["0:8"]) as swarm:
        common = {"invite": swarm.invite, "model": swarm.model, "steps": steps, "every": 5, "parts": 3}
        alone = run_client({**common, "part": 0, "seed": 0, "save": str(tmp_path / "alone")})
        together = [
            {**common, "part": part, "seed": 0, "name": "facts", "save": str(tmp_path / f"part{part}")}
            for part in range(3)
        ]
        joined = threading.Barrier(3)
        first, second, killed = in_threads(
            (lambda: run_client(together[0], joined=joined),),
            (lambda: run_client(together[1], joined=joined),),
            (lambda: run_client(together[2], joined=joined, kill_after=steps // 2),),
        )
    assert killed[-1]["step"] >= steps // 2
    assert killed[-1]["event"] == "step"
    for events in (first, second):
        met, done = events[-2:]
        assert (met["kind"], met["last"], met["peers"]) == ("averaged", True, 2)
        assert done["kinds"]["averaged"] >= 3
        assert max(event["peers"] for event in events if event["event"] == "step") == 3
        assert done["waited"] < 2 * (10.0 + 20.0)
        states = {one["peer"]: one for one in done["participants"]}
        gone = states[killed[0]["peer"]]
        assert gone["state"] in ("left", "lost")
        assert gone["steps"] >= steps // 2 - 1
        assert gone["rounds"] >= 1
    vectors = [torch.load(tmp_path / f"part{part}") for part in range(2)]
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-6)
    assert first[-1]["loss"] == pytest.approx(second[-1]["loss"], abs=1e-4)
    assert first[-1]["loss"] <= alone[-1]["loss"]
    print(f"loss over all facts: alone {alone[-1]['loss']:.3f}, together {first[-1]['loss']:.3f}")


# -- coming, going, and what is seen of it -----------------------------------------------------------------------


def test_one_comes_late_and_all_agree_in_the_end(invite: str) -> None:
    taught = [parameters(0.0), parameters(5.0), parameters(9.0)]
    changes: list[float] = []
    seen = {"on_change": lambda: changes.append(1)}
    first = Together(invite, "late", taught[0], every_steps=5, member="first <b>", **seen)
    second = Together(invite, "late", taught[1], every_steps=5, member="second")
    late = Together(invite, "late", taught[2], every_steps=5, member="late")
    with first, second:
        assert vector(taught[1]).max() == 0.0  # from the first, who was there before
        in_threads((teach, first, taught[0], 10, 0.1), (teach, second, taught[1], 10, 0.3))
        assert first.round >= 1
        with late:
            assert late.round >= 1
            assert 0.0 < vector(taught[2]).max() < 9.0
            wait_until(lambda: len(late.participants()) == 3, what="all to be seen")
            names = {one.name: one for one in late.participants()}
            assert set(names) == {"first <b>", "second", "late"}
            assert names["late"].you
            assert names["first <b>"].steps == 10
            jobs = zip((first, second, late), taught, (0.1, 0.3, 0.2), strict=True)
            in_threads(*((teach, one, tensors, 10, way) for one, tensors, way in jobs))
            ends = in_threads((first.finish,), (second.finish,), (late.finish,))
            assert all(end.last and len(end.peers) == 3 for end in ends)
            torch.testing.assert_close(vector(taught[0]), vector(taught[1]))
            torch.testing.assert_close(vector(taught[0]), vector(taught[2]))
        wait_until(lambda: {one.name: one.state for one in first.participants()}["late"] == "left", what="goodbye")
    assert changes
    assert first.closed
    with pytest.raises(SessionError, match="has left"):
        first.after_step()


def test_a_child_that_is_killed_comes_back_and_a_stopped_one_holds_nobody_up(invite: str) -> None:
    taught = [parameters(), parameters()]
    options = {"every_steps": 5, "patience": 2.0}
    with (
        Together(invite, "killed", taught[0], **options) as first,
        Together(invite, "killed", taught[1], **options) as second,
    ):
        in_threads((teach, first, taught[0], 5, 0.1), (teach, second, taught[1], 5, 0.1))
        assert (first.round, second.round) == (1, 1)
        assert second._process is not None
        stopped = psutil.Process(second._process.pid)
        stopped.suspend()
        outcomes = teach(first, taught[0], 5, 0.1)
        assert [one.kind for one in outcomes] == ["alone"]
        assert outcomes[0].seconds < 2.0 + 2.0 + 2.0  # patience, the grace of a coordinator, a busy machine
        wait_until(lambda: first.participants()[1].state == "lost", 20, what="the stopped one to count as lost")
        assert teach(first, taught[0], 5, 0.1)[0].seconds < 1.0
        stopped.kill()
        back = threading.Event()

        def go_on(together: Together, tensors: dict[str, torch.nn.Parameter]) -> None:
            deadline = time.monotonic() + 60
            while not back.is_set() and time.monotonic() < deadline:
                if any(one.kind == "averaged" for one in teach(together, tensors, 5, 0.1)):
                    back.set()

        in_threads((go_on, first, taught[0]), (go_on, second, taught[1]))
        assert back.is_set()
        in_threads((first.finish,), (second.finish,))
        torch.testing.assert_close(vector(taught[0]), vector(taught[1]))


def test_who_pauses_is_not_waited_for(invite: str) -> None:
    taught = [parameters(), parameters()]
    with (
        Together(invite, "paused", taught[0], every_steps=5, patience=20.0) as first,
        Together(invite, "paused", taught[1], every_steps=5, patience=20.0) as second,
    ):
        second.pause()
        wait_until(lambda: [one.state for one in first.participants()] == ["training", "paused"], what="the pause")
        outcomes = teach(first, taught[0], 10, 0.1)
        assert [one.kind for one in outcomes] == ["alone", "alone"]
        assert max(one.seconds for one in outcomes) < 5.0
        second.resume()
        wait_until(lambda: [one.state for one in first.participants()] == ["training", "training"], what="the end")


def test_closing_while_others_are_waited_for_does_not_hang(invite: str) -> None:
    taught = [parameters(), parameters()]
    with Together(invite, "closing", taught[0], every_steps=1, patience=60.0) as first:
        second = Together(invite, "closing", taught[1], every_steps=1, patience=60.0).start()
        wait_until(lambda: len(first.participants()) == 2, what="both")
        waiting = ThreadPoolExecutor(1)
        round_ = waiting.submit(second.after_step, 1)
        time.sleep(0.3)
        second.close()
        assert round_.result(timeout=10).kind == "alone"
        waiting.shutdown()
        assert first.after_step(1).kind == "alone"  # type: ignore[union-attr]


def test_an_interrupt_ends_the_wait_and_the_next_round_works(invite: str) -> None:
    taught = [parameters(), parameters()]
    with (
        Together(invite, "interrupt", taught[0], every_steps=5, patience=30.0) as first,
        Together(invite, "interrupt", taught[1], every_steps=5, patience=30.0) as second,
    ):
        wait_until(lambda: len(first.participants()) == 2, what="both")
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            teach(first, taught[0], 5, 0.1)
        outcomes = in_threads((teach, first, taught[0], 5, 0.1), (teach, second, taught[1], 5, 0.1))
        assert [one[-1].kind for one in outcomes] == ["averaged", "averaged"]


# -- who cannot take part ----------------------------------------------------------------------------------------


def test_a_stranger_and_another_configuration_get_a_reason(invite: str) -> None:
    with pytest.raises(InviteError):
        Together("nbr1-nonsense", "facts", parameters())
    with Together(invite, "reasons", parameters(), method="lora"):
        foreign = str(SwarmKey().invite(Invite.parse(invite).addresses))
        with pytest.raises(PeerError, match="another swarm"):
            Together(foreign, "reasons", parameters()).start()
        other = {"w": torch.nn.Parameter(torch.zeros(40, 51)), "b": torch.nn.Parameter(torch.zeros(3))}
        with pytest.raises(UserInputError, match=r"their w is \[40, 50\], yours \[40, 51\]"):
            Together(invite, "reasons", other, method="lora").start()
        with pytest.raises(UserInputError, match="method 'lora', you 'prompt'"):
            Together(invite, "reasons", parameters(), method="prompt").start()


def test_what_is_not_a_number_is_not_even_sent(invite: str) -> None:
    taught = parameters()
    with Together(invite, "diverged", taught, every_steps=2) as together:
        together.after_step()
        with torch.no_grad():
            taught["w"][3, 4] = float("nan")
        with pytest.raises(UserInputError, match="w has NaN"):
            together.after_step()


# -- transformers' Trainer ---------------------------------------------------------------------------------------


def test_the_trainer_teaches_together_by_a_callback(invite: str, tmp_path: Path) -> None:
    import transformers

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((x @ self.weight - labels) ** 2).mean()}

    both = threading.Barrier(2)

    def train(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 4, generator=generator)
        labels = x @ torch.tensor([1.0, -2.0, 3.0, 0.5])
        rows = [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]
        model = Line()
        arguments = transformers.TrainingArguments(
            str(tmp_path / f"{seed}"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=5,
            learning_rate=0.05,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        with Together(invite, "trainer", model, every_steps=4) as together:
            both.wait(60)  # or one is through before the other is there
            wait_until(lambda: len(together.participants()) == 2, what="the other")
            transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[together.callback()]).train()
            assert together.steps == 20
            assert together.samples == 160
            assert any(one.kind == "averaged" for one in together.history)
        return model.weight.detach()

    first, second = in_threads((train, 1), (train, 2))
    torch.testing.assert_close(first, second)


# -- what is left ------------------------------------------------------------------------------------------------


def test_nothing_is_left_when_the_process_that_trains_is_killed(invite: str) -> None:
    """As a kernel that is killed: its child, the child's daemon and their files go too."""
    code = (
        "import sys, time, torch\n"
        "from nbrunner.tuning.together import Together\n"
        f"one = Together({invite!r}, 'orphan', {{'w': torch.zeros(9)}}).start()\n"
        "print(one._process.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    place = Path(tempfile.gettempdir())
    before = set(place.glob("nbrunner-together-*"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        family = [child, *child.children(recursive=True)]
        assert any(one.name() == "p2pd" for one in family)
        assert len(set(place.glob("nbrunner-together-*")) - before) >= 1
        parent.kill()
    wait_until(lambda: not any(one.is_running() for one in family), 10, what="the child and its daemon to end")
    mine = [path for path in set(place.glob("nbrunner-together-*")) - before if str(child.pid) in str(path)]
    assert not mine


def test_a_script_that_closes_nothing_leaves_nothing(invite: str) -> None:
    code = (
        "import torch\n"
        "from nbrunner.tuning.together import Together\n"
        f"one = Together({invite!r}, 'script', {{'w': torch.zeros(9)}}, every_steps=1).start()\n"
        "print(one.after_step().kind, one._process._folder.name, flush=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    kind, folder = ran.stdout.split()
    assert kind == "alone"
    assert not Path(folder).exists()


def test_the_process_that_trains_does_not_load_hivemind_and_is_not_forked(invite: str) -> None:
    code = (
        "import sys, torch\n"
        "from nbrunner.tuning.together import Together\n"
        f"with Together({invite!r}, 'light', {{'w': torch.zeros(9)}}, every_steps=1) as one:\n"
        "    one.after_step()\n"
        "print('hivemind' in sys.modules, 'transformers' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["False", "False"], ran.stderr
