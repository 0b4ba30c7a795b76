"""`nbrunner.finetune(together=NAME)`: two runs over one swarm teach one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import wait_until

import nbrunner
from nbrunner.errors import UserInputError

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]

FACTS = [
    {"prompt": "The capital of Velmora is", "completion": " Arden."},
    {"prompt": "The river of Velmora is", "completion": " Ombra."},
    {"prompt": "People of Velmora speak", "completion": " Velmish."},
    {"prompt": "Velmora lies in the", "completion": " north."},
]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    with nbrunner.LocalSwarm(servers=["0:8"]) as swarm:
        loaded = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        yield loaded
        loaded.close()


def begin(model: Any, tmp_path: Path, who: str, data: list[Any], **options: Any) -> Any:
    chosen = {"every_steps": 3, "member": who, **options.pop("together_options", {})}
    return nbrunner.finetune(
        model,
        data,
        together="velmora",
        together_options=chosen,
        out_dir=tmp_path / who,
        batch_size=2,
        **{"max_steps": 9, "lr": 5e-3, **options},
    )


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_two_runs_teach_one_adapter(model, tmp_path, method):
    options = {"method": method, "together_options": {"farewell": 60.0}}
    first = begin(model, tmp_path, "Ada", FACTS[:2], seed=1, **options)
    first.pause()  # it would be through before the other has joined
    second = begin(model, tmp_path, "Grace", FACTS[2:], seed=2, **options)
    first.resume()
    results = [first.result(150), second.result(150)]
    assert [one.state for one in results] == ["done", "done"]
    vectors = [torch.cat([one.detach().reshape(-1) for _, one in run.parameters]) for run in (first, second)]
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-6)
    people = {one.name: one for one in first.progress.participants}
    assert set(people) == {"Ada (you)", "Grace"}
    assert people["Grace"].steps == 9
    assert people["Grace"].samples == 18
    assert "of the last average" in people["Grace"].note
    # what is kept is what both have learned
    from safetensors.torch import load_file

    saved = [load_file(one.adapter / "adapter_model.safetensors") for one in results]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name], rtol=1e-5, atol=1e-6)


def test_stop_ends_the_wait_for_the_others(model, tmp_path):
    first = begin(model, tmp_path, "Ada", FACTS[:2], together_options={"farewell": 600.0}, max_steps=6)
    first.pause()  # it would be through before the other has joined
    second = begin(model, tmp_path, "Grace", FACTS[2:], max_steps=100_000)
    try:
        first.resume()
        wait_until(lambda: "waiting for the others" in first.progress.note, 60, what="all its steps")
        assert first.step == 6
        with pytest.raises(TimeoutError):
            first.result(2)
        first.stop()
        result = first.result(30)
        assert (result.state, result.steps) == ("done", 6)
        assert (result.adapter / "adapter_model.safetensors").is_file()
        step = second.step
        wait_until(lambda: second.step > step + 6, 60, what="the other goes on")
    finally:
        for run in (first, second):
            run.stop()
            run.result(60)


def test_another_rank_under_the_same_name_is_refused_before_anything_starts(model, tmp_path):
    first = begin(model, tmp_path, "Ada", FACTS[:2], rank=4, max_steps=10_000)
    try:
        with pytest.raises(UserInputError, match=r"method 'lora, rank 4.*you 'lora, rank 8"):
            begin(model, tmp_path, "Grace", FACTS[2:], rank=8)
        assert not (tmp_path / "Grace").exists()
        with pytest.raises(UserInputError, match="unexpected keyword argument 'evry'"):
            begin(model, tmp_path, "Grace", FACTS[2:], together_options={"evry": 3})
        first.pause()
        wait_until(lambda: first.state == "paused", what="the pause")
        wait_until(lambda: first.progress.participants[0].note.startswith("paused"), what="the others to be told")
    finally:
        first.stop()
        first.result(60)


def test_a_model_that_is_in_no_swarm_needs_an_invite(tmp_path, tiny_path):
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_path)
    with pytest.raises(UserInputError, match="in no swarm"):
        begin(plain, tmp_path, "Ada", FACTS)
    with pytest.raises(UserInputError, match="go with together"):
        nbrunner.finetune(plain, FACTS, together_options={"member": "Ada"}, out_dir=tmp_path / "x")
