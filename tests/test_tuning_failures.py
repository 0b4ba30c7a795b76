"""Runs that are killed, lose a server, run out of memory or of numbers, are interrupted, or could never begin."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from typing import Any

import pytest
import torch
from helpers import ROOT, wait_until
from inprocess_swarm import InProcessSwarm, changed_results, spoiled
from tuning_models import FACTS, TINY, assert_same_learned, assert_same_losses, distributed, two_spans
from tuning_runs import QUICK, PauseAt, begin

import nbrunner
from nbrunner.errors import NBRunnerError, TrainingError, UserInputError
from nbrunner.tuning.run import TrainingRun

__all__ = ["begin", "distributed", "two_spans"]

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]


@pytest.fixture
def short_folder():
    """A temporary folder whose name leaves room for a socket's path, as `tmp_path` does not."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_a_killed_process_loses_nothing(begin, distributed, two_spans, tmp_path, short_folder):
    options = {**QUICK, "method": "lora", "max_steps": 12, "checkpoint_every": 2}
    script = textwrap.dedent("""
        import json, sys, nbrunner
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], invite=sys.argv[2])
        run = nbrunner.finetune(model, json.loads(sys.argv[3]), out_dir=sys.argv[4], **json.loads(sys.argv[5]))
        run.result()
    """)
    folder = tmp_path / "killed"
    arguments = [str(TINY), str(two_spans.invite), json.dumps(FACTS), str(folder), json.dumps(options)]
    # a killed client leaves the folder of its daemon's socket; the next one that starts on the machine removes it
    environment = {**os.environ, "TMPDIR": short_folder}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        done = lambda: len(list(folder.glob("checkpoint-*"))) > 1 or process.poll() is not None  # noqa: E731
        wait_until(done, 90, what="two checkpoints")
        assert process.poll() is None, process.stderr.read().decode()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    # joined anew, as after a restart; the first to join also removes what the killed process left behind
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(TINY, invite=two_spans.invite)
    try:
        run = nbrunner.resume(folder, model)
        begin.keep(run)
        began = run.step
        assert 2 <= began < 12
        run.result(60)
    finally:
        model.close()
    straight = begin(distributed, **options)
    straight.result(60)
    assert run.history["step"] == list(range(1, 13))
    assert_same_losses(run, straight, within=1e-6)
    assert_same_learned(run, straight, within=1e-5)


@pytest.mark.parametrize("how", ["gone", "bad data"])
def test_the_only_server_of_some_blocks_fails_and_another_comes(begin, tmp_path, how):
    swarm = InProcessSwarm(TINY)
    swarm.add(0, 4)
    lost = swarm.add(4, 8)
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(TINY, invite=swarm.invite, retry_budget=1.0)
    try:
        swarm.seen_by(model)
        hook = PauseAt(2)
        run = begin(model, hooks=[hook])
        hook.run = run
        run.control.wait_for(lambda state: state == "paused", 60)
        with spoiled(lost, lambda hidden: hidden * float("nan")):
            if how == "gone":
                swarm.remove(lost)
            run.resume()
            with pytest.raises(TrainingError, match=r"paused before step 3: .*\[4, 8\)") as why:
                run.result(60)
        assert "checkpoint-000002" in str(why.value)
        assert run.state == "paused"
        assert run.history.marks[-1].kind == "error"
        swarm.add(4, 8)
        run.resume()
        assert run.result(60).steps == 6
        straight = begin(model)
        straight.result(60)
        assert_same_losses(run, straight, within=1e-6)
        assert_same_learned(run, straight, within=1e-5)
    finally:
        model.close()
        swarm.close()


def test_a_server_without_memory_pauses_it_with_its_checkpoint(begin, distributed, two_spans):
    hook = PauseAt(2)
    run = begin(distributed, method="lora", hooks=[hook])
    hook.run = run
    run.control.wait_for(lambda state: state == "paused", 60)

    def full(result: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with changed_results(two_spans.servers[1], full):
        run.resume()
        with pytest.raises(
            TrainingError, match=r"paused before step 3: .*no memory for this request now; send fewer"
        ):
            run.result(60)
        assert run.folder.last_checkpoint.name == "checkpoint-000002"
        assert "checkpoint-000002" in run.progress.error
    run.resume()
    assert run.result(60).steps == 6
    straight = begin(distributed, method="lora")
    straight.result(60)
    assert_same_losses(run, straight, within=1e-6)


def test_a_loss_that_is_no_number_ends_it_with_its_checkpoint(begin, distributed):
    hook = PauseAt(2)
    run = begin(distributed, hooks=[hook])
    hook.run = run
    run.control.wait_for(lambda state: state == "paused", 60)
    with torch.no_grad():
        kept = run.parameters[0][1].clone()
        run.parameters[0][1].fill_(float("inf"))
    run.resume()
    with pytest.raises(Exception, match=r"NaN or infinity|no number") as why:
        run.result(60)
    assert run.state == "failed"
    assert run.step == 2
    assert "checkpoint" in str(why.value)
    again = nbrunner.resume(run.folder.path, distributed, lr=1e-3)
    begin.keep(again)
    again.control.wait_for(lambda state: state != "starting", 60)
    assert again.result(60).steps == 6
    assert torch.isfinite(kept).all()


def test_awaited_and_interrupted(begin, distributed):
    run = begin(distributed, max_steps=400)

    async def wait() -> None:
        task = asyncio.ensure_future(_wait(run))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(wait())
    assert run.control.wait_for(lambda state: state == "paused", 30)
    run.resume()
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run.result(60)
    timer.join()
    assert run.control.wait_for(lambda state: state == "paused", 30)
    run.stop()
    assert asyncio.run(_wait(run)).state == "stopped"


async def _wait(run: TrainingRun) -> Any:
    return await run


def test_a_rank_over_the_limit_of_a_server_is_said(begin, distributed):
    run = begin(distributed, method="lora", rank=300)
    with pytest.raises(NBRunnerError, match=r"300.*256|256.*300"):
        run.result(60)
    assert run.state == "failed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": []}, "data is empty"),
        ({"method": "classify"}, "row 0 of data has 'prompt', 'completion'; to classify"),
        ({"method": "classify", "data": [{"text": "a", "label": 1}]}, "all rows have the label 1"),
        ({"target_modules": ["q_proj"]}, "target_modules belong to LoRA"),
        ({"adapter": "nowhere"}, "there is no PEFT adapter in nowhere"),
        ({"method": "lora", "adapter": 3}, "adapter is int; give the directory of a PEFT adapter, or a run"),
        ({"method": "lora", "adapter": "nowhere", "rank": 4}, "the adapter in nowhere has its own rank"),
        (
            {"prompt_tokens": 1024},
            "a prompt of 1024 tokens leaves no room for a text: the model takes 1024",
        ),
        ({"data": ["a b c " * 800]}, r"row 0 of data has \d+ tokens, and the model takes 1020"),
        ({"eval_data": ["a", 3]}, "row 1 of eval_data is int 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(distributed, tmp_path, options, words):
    data = options.pop("data", FACTS)
    with pytest.raises(UserInputError, match=words):
        nbrunner.finetune(distributed, data, out_dir=tmp_path / "run", **{**QUICK, **options})
    assert not (tmp_path / "run").exists()


def test_modules_that_do_not_exist_are_answered_with_those_that_do(distributed, tmp_path):
    options = {"method": "lora", "target_modules": ["q_proj", "query"], "out_dir": tmp_path / "run"}
    with pytest.raises(
        UserInputError, match="no module 'query' in this model's blocks; target_modules can be down_proj,"
    ):
        nbrunner.finetune(distributed, FACTS, **options)
