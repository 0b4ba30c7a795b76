"""The parts of a run that need no model: control, history, costs, and the folder."""

from __future__ import annotations

import json
import threading

import pytest
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.client.runner import Pass
from nbrunner.client.watch import PassWatch
from nbrunner.errors import SessionError, UserInputError
from nbrunner.tuning.control import Control, StopRun
from nbrunner.tuning.costs import Costs, recent, seconds_left, step_costs
from nbrunner.tuning.data import read_examples
from nbrunner.tuning.folder import RunFolder, checkpoint_name
from nbrunner.tuning.history import COLUMNS, History


class Steps:
    """A thread that comes by the gate, as a training does."""

    def __init__(self) -> None:
        self.control, self.count = Control(), 0
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Steps:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.control.stop()
        self._thread.join(10)

    def _work(self) -> None:
        try:
            while True:
                self.control.gate()
                self.count += 1
        except StopRun:
            self.control.end("stopped")


def test_pause_resume_and_stop():
    seen = []
    with Steps() as steps:
        control = steps.control
        control.on_change(lambda: seen.append(control.state))
        wait_until(lambda: steps.count > 3)
        assert control.state == "running"
        control.pause()
        assert control.wait_for(lambda state: state == "paused", 10)
        count = steps.count
        done = control.between_steps(lambda: "done")
        assert done.result(10) == "done"
        assert steps.count == count
        assert control.state == "paused"
        control.resume()
        wait_until(lambda: steps.count > count)
    assert control.state == "stopped"
    assert "paused" in seen
    with pytest.raises(SessionError, match="has ended"):
        control.between_steps(lambda: None)
    control.pause()  # of no use, and no error
    assert control.state == "stopped"


def test_what_was_asked_for_last_is_refused_and_not_lost():
    control = Control()
    control.stop()
    jobs = [control.between_steps(lambda: 1), control.between_steps(lambda: 1 / 0)]
    with pytest.raises(StopRun):
        control.gate()
    assert jobs[0].result(0) == 1
    with pytest.raises(ZeroDivisionError):
        jobs[1].result(0)
    late = control.between_steps(lambda: 2)
    control.end("stopped")
    with pytest.raises(SessionError, match="ended before it came to this"):
        late.result(0)


def test_held_between_steps():
    with Steps() as steps:
        with steps.control.held(10):
            count = steps.count
            with steps.control.held(10):
                pass
            assert steps.count == count
        wait_until(lambda: steps.count > count)
    with steps.control.held(1):  # it has ended: nothing to wait for
        pass
    with pytest.raises(TimeoutError), Control().held(0.01):
        pass


def test_trouble_waits_for_somebody():
    control = Control()
    failed = threading.Event()

    def work() -> None:
        try:
            control.trouble(ValueError("no"))
        except StopRun:
            failed.set()
        control.end("done")

    thread = threading.Thread(target=work)
    thread.start()
    assert control.wait_for(lambda state: state == "paused", 10)
    assert str(control.error) == "no"
    control.resume()
    thread.join(10)
    assert control.error is None
    assert not failed.is_set()


def test_a_listener_that_fails_harms_nobody():
    control = Control()
    control.on_change(lambda: 1 / 0)
    control.pause()
    control.resume()


# -- history -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_the_smoothed_loss_stays_between(losses):
    history = History()
    for step, loss in enumerate(losses, start=1):
        row = history.learned(step, loss)
        assert min(losses[:step]) - 1e-9 <= row.smoothed <= max(losses[:step]) + 1e-9
    assert history["loss"] == losses


def test_history_is_a_table():
    history = History()
    history.row(0).eval_loss = 3.0
    history.learned(1, 2.0, lr=0.1)
    history.learned(2, float("nan"))
    history.learned(3, 1.0)
    history.mark(2, "lr", "down")
    assert history.columns == COLUMNS
    assert history.shape == (4, len(COLUMNS))
    assert history["step"] == [0, 1, 2, 3]
    assert list(history) == list(COLUMNS)
    assert dict(history)["lr"] == [None, 0.1, None, None]
    assert history.to_dict("records")[1]["loss"] == 2.0
    assert history.curve("loss") == [(1, 2.0), (3, 1.0)]
    assert history.last.step == 3
    again = History.load(json.loads(json.dumps(history.dump())))
    assert again.marks == history.marks
    assert again["eval_loss"] == history["eval_loss"]
    with pytest.raises(KeyError, match="the columns are"):
        history["los"]


# -- costs ---------------------------------------------------------------------------------------------------------


def test_seconds_add_up_even_where_servers_work_at_once():
    passes = [
        Pass("a", 0, 4, 0.3, 0.5, 100, 50),
        Pass("b", 4, 8, 0.3, 0.4, 100, 50),
        Pass("b", 4, 8, 0.2, 0.3, 100, 50, backward=True),
        Pass("a", 0, 4, 0.4, 0.8, 100, 50, backward=True),
    ]
    costs = step_costs(PassWatch(passes, waited=1.0), seconds=1.5, tokens=300)  # 2 s of requests in 1 s
    assert costs.client == pytest.approx(0.5)
    assert costs.servers == pytest.approx({"a": 0.35, "b": 0.25})
    assert costs.client + costs.wire + sum(costs.servers.values()) == pytest.approx(costs.seconds)
    assert (costs.sent, costs.received) == (400, 200)
    assert (costs + costs).tokens_per_second == pytest.approx(200)


def test_time_left():
    slow, usual = Costs(seconds=10.0, steps=1), Costs(seconds=1.0, steps=1, tokens=5)
    assert seconds_left([], 7) is None
    assert seconds_left([slow], 7) == pytest.approx(70)
    assert seconds_left([slow, usual, usual], 7) == pytest.approx(7)
    assert recent([slow, *[usual] * 50]).steps == 20


# -- folder --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_there_or_not(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "lora")
    for step in (1, 2, 3):
        with folder.writing(checkpoint_name(step)) as staged:
            (staged / "what").write_text(str(step))
    assert [one.name for one in folder.checkpoints] == ["checkpoint-000002", "checkpoint-000003"]
    with pytest.raises(ZeroDivisionError), folder.writing(checkpoint_name(4)) as staged:
        (staged / "what").write_text(str(1 / 0))
    (folder.path / ".writing-killed").mkdir()
    with folder.writing(checkpoint_name(3)) as staged:  # once more
        (staged / "what").write_text("again")
    assert (folder.last_checkpoint / "what").read_text() == "again"
    assert sorted(one.name for one in folder.path.iterdir()) == [".lock", "checkpoint-000002", "checkpoint-000003"]
    folder.unlock()


def test_one_run_in_one_folder_and_one_process(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "lora")
    with pytest.raises(UserInputError, match="there is no run in"):
        RunFolder.open(tmp_path)
    folder.write({"settings": {}}, read_examples(["a"]), None)
    with pytest.raises(UserInputError, match="holds a run already"):
        RunFolder.create(tmp_path / "run", "lora")
    with pytest.raises(UserInputError, match="is open already"):
        RunFolder.open(tmp_path / "run")
    folder.unlock()
    again = RunFolder.open(tmp_path / "run")
    assert again.data(labelled=False) == (read_examples(["a"]), None)
    (again.path / "run.json").write_text('{"format": 99, "settings": {}}')
    with pytest.raises(UserInputError, match="later version"):
        again.read()
    (again.path / "run.json").write_text("{")
    with pytest.raises(UserInputError, match="cannot be read"):
        again.read()
    again.unlock()


def test_folders_without_a_name_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.create(None, "lora") for _ in range(3)]
    assert len({one.path for one in folders}) == 3
    for one in folders:
        one.unlock()
