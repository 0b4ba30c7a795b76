"""Runs over two spans: the same as on the whole model here, paused, stopped and gone on with, and used."""

from __future__ import annotations

import asyncio
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import wait_until
from inprocess_swarm import InProcessSwarm
from tuning_models import (
    FACTS,
    REVIEWS,
    TINY,
    assert_same_learned,
    assert_same_losses,
    distributed,
    plain,
    tokenizer,
    two_spans,
)
from tuning_runs import PauseAt, begin

import nbrunner
from nbrunner.client.generation import GenerationRun
from nbrunner.client.sampling import Sampling
from nbrunner.errors import SessionError, UserInputError
from nbrunner.tuning.hooks import Participant
from nbrunner.tuning.samples import answer
from nbrunner.tuning.taught import TaughtModel
from nbrunner.tuning.trainer import RunTrainer

__all__ = ["begin", "distributed", "tokenizer", "two_spans"]

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

METHODS = {
    "prompt": {},
    "prompt, accumulated": {"gradient_accumulation": 2},
    "p-tuning": {"method": "p-tuning", "lr": 1e-3},
    "lora": {"method": "lora", "lr": 5e-3, "rank": 4},
    "lora, every module, accumulated": {
        "method": "lora",
        "lr": 5e-3,
        "target_modules": "all-linear",
        "gradient_accumulation": 2,
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_what_the_whole_model_here_learns(begin, distributed, name):
    options = {**METHODS[name], "eval_data": FACTS[:3], "eval_every": 3}
    run, local = begin(distributed, **options), begin(plain(), **options)
    run.result(60)
    local.result(60)
    assert_same_losses(run, local, within=1e-5)
    evaluated = dict(local.history.curve("eval_loss"))
    assert dict(run.history.curve("eval_loss")) == pytest.approx(evaluated, rel=1e-5)
    assert list(evaluated) == [0, 3, 6]
    assert_same_learned(run, local)
    assert evaluated[6] < evaluated[0]


def test_it_learns_labels_as_the_whole_model_here(begin, distributed, two_spans):
    options = {"method": "classify", "eval_data": REVIEWS, "max_steps": 12}
    ours = nbrunner.AutoDistributedModelForSequenceClassification.from_pretrained(
        TINY, invite=two_spans.invite, num_labels=2
    )
    try:
        here = plain("AutoModelForSequenceClassification", num_labels=2)
        here.score.load_state_dict(ours.score.state_dict())
        run, local = begin(ours, REVIEWS, **options), begin(here, REVIEWS, **options)
        run.result(60)
        local.result(60)
    finally:
        ours.close()
    assert run.classes == ("bad", "good")
    assert run.model.config.id2label == {0: "bad", 1: "good"}
    assert_same_losses(run, local, within=1e-5)
    assert_same_learned(run, local)
    assert run.history["eval_accuracy"] == local.history["eval_accuracy"]
    # from a model that generates, a classifier on the same servers is made
    made = begin(distributed, REVIEWS, **options, samples=[REVIEWS[2]["text"]])
    result = made.result(60)
    assert result.eval_accuracy == 1.0
    assert result.answers[-1].texts[0].startswith("good 0.")


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_the_model_itself_stays_as_it_is(begin, distributed, tokenizer, method):
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    before = distributed(ids, use_cache=False).logits
    begin(distributed, method=method).result(60)
    assert not any(one.requires_grad for one in distributed.parameters())
    assert distributed.config.use_cache
    torch.testing.assert_close(distributed(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_its_adapter_is_a_peft_directory(begin, distributed, tokenizer, method):
    run = begin(distributed, method=method)
    result = run.result(60)
    loaded = peft.PeftModel.from_pretrained(plain(), result.adapter)
    ids = tokenizer(FACTS[0]["prompt"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        with run.held():
            found = run.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = "prompt" if method == "lora" else "lora"
    with pytest.raises(UserInputError, match=f"with which the method '{other}' cannot go on: {method}, "):
        begin(distributed, method=other, adapter=result.adapter)
    assert begin(distributed, method=method, adapter=run, max_steps=2).result(60).steps == 2
    again = begin(distributed, method=method, adapter=result, max_steps=2)
    again.result(60)
    assert again.history["loss"][0] < run.history["loss"][0]  # of the same rows: it would be the same from nothing


def test_pause_holds_nothing_on_the_servers_and_changes_nothing(begin, distributed, two_spans):
    hook = PauseAt(3)
    run = begin(distributed, samples=[FACTS[0]["prompt"]], eval_data=FACTS[:2], hooks=[hook])
    hook.run = run
    assert run.control.wait_for(lambda state: state == "paused", 60)
    assert run.step == 3
    checkpoint = run.checkpoint().result(20)
    assert checkpoint.name == "checkpoint-000003"
    assert run.sample().result(20).texts[0]
    assert run.sample(["7 plus 5 is"]).result(20).step == 3
    wait_until(lambda: not any(server.host.quotas.sessions for server in two_spans.servers), 10)
    assert not any(server.host.kept.nbytes or server.host.sums.nbytes for server in two_spans.servers)
    assert run.progress.participants == (Participant("me", "online", steps=3),)
    with pytest.raises(TimeoutError, match="step 3 of 6"):
        run.result(0.1)
    run.resume()
    result = run.result(60)
    straight = begin(distributed, eval_data=FACTS[:2])
    straight.result(60)
    assert_same_losses(run, straight, within=1e-6)
    assert [one.when for one in result.answers] == ["before", "during", "during", "after"]
    assert hook.calls[0] == "begin 0"
    assert "waits" in hook.calls
    assert hook.calls[-2:] == ["complete", "end"]
    assert [one for one in hook.calls if one.startswith("after")] == [f"after {step}" for step in range(1, 7)]


def test_another_learning_rate_holds_from_the_next_step(begin, distributed):
    hook = PauseAt(2)
    run = begin(distributed, hooks=[hook], schedule="constant")
    hook.run = run
    run.control.wait_for(lambda state: state == "paused", 60)
    run.set_lr(1e-3)
    run.resume()
    run.result(60)
    assert run.history["lr"] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [(mark.step, mark.text) for mark in run.history.marks] == [(2, "learning rate 0.01 → 0.001")]
    assert run.figure().to_dict()["layout"]["annotations"][0]["hovertext"] == "learning rate 0.01 → 0.001"
    with pytest.raises(UserInputError, match="lr must be a number"):
        run.set_lr(-1)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "lora", "deep-prompt"])
def test_stopped_and_gone_on_with_it_comes_to_the_same(begin, distributed, method):
    options: dict[str, Any] = {
        "method": method,
        "max_steps": 8,
        "lr": 5e-3,
        "gradient_accumulation": 2,
        **({"dropout": 0.2} if method == "lora" else {}),
    }
    straight = begin(distributed, **options)
    hook = PauseAt(4)
    run = begin(distributed, **options, hooks=[hook], samples=["Velmora"])
    hook.run = run
    run.control.wait_for(lambda state: state == "paused", 60)
    run.set_lr(2e-3)
    straight.result(60)
    run.stop()
    assert run.result(30).state == "stopped"
    with pytest.raises(SessionError, match=r"nbrunner\.resume"):
        run.resume()
    again = nbrunner.resume(run.folder.path, distributed, lr=5e-3)
    begin.keep(again)
    again.result(60)
    whens = [one.when for one in again.answers]
    assert (whens[0], whens[-1]) == ("before", "after")
    assert whens.count("before") == 1
    assert again.history["step"] == list(range(1, 9))
    assert_same_losses(again, straight, within=1e-6)
    assert_same_learned(again, straight, within=1e-5)
    assert "resumed" in [mark.kind for mark in again.history.marks]
    with pytest.raises(UserInputError, match="this run is complete after 8 steps"):
        nbrunner.resume(run.folder.path, distributed)
    with pytest.raises(UserInputError, match="cannot go on with another rank"):
        nbrunner.resume(run.folder.path, distributed, rank=4)
    with pytest.raises(UserInputError, match="give the model that this run teaches"):
        nbrunner.resume(run.folder.path)
    longer = nbrunner.resume(run.folder.path, distributed, max_steps=9)
    begin.keep(longer)
    assert longer.result(60).steps == 9


@pytest.mark.parametrize("method", ["lora", "prompt", "p-tuning", "deep-prompt"])
def test_what_was_taught_generates_before_it_is_saved(begin, distributed, two_spans, tokenizer, method):
    hook = PauseAt(3)
    run = begin(distributed, method=method, hooks=[hook], max_steps=30, lr=5e-2)
    hook.run = run
    assert run.control.wait_for(lambda state: state == "paused", 60)
    prompt = FACTS[0]["prompt"]
    generation = GenerationRun(TaughtModel(run), run.tokenizer, prompt, Sampling(max_new_tokens=6))
    text = asyncio.run(_text(generation))
    assert len(generation.snapshot().chain) == 2
    assert len(generation.snapshot().times) == len(generation.tokens)
    wait_until(lambda: not any(server.host.quotas.sessions for server in two_spans.servers), 10)
    assert not (run.folder.path / "adapter").exists()
    run.stop()
    adapter = run.result(30).adapter
    if method == "deep-prompt":  # PEFT knows nothing of these
        with run.held() as taught:
            assert text == answer(taught, tokenizer, prompt, new_tokens=6)
        return
    here = peft.PeftModel.from_pretrained(plain(), adapter)
    ids = tokenizer(prompt, return_tensors="pt")
    expected = here.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


async def _text(generation: Any) -> str:
    return "".join([str(token) async for token in generation.stream()])


def test_it_is_offered_used_by_others_and_withdrawn(begin, tmp_path, tokenizer):
    swarm = InProcessSwarm(TINY)
    swarm.add(0, 4, accept_adapters=True)
    swarm.add(4, 8, accept_adapters=True)
    model, other = (
        nbrunner.AutoDistributedModelForCausalLM.from_pretrained(TINY, invite=swarm.invite) for _ in range(2)
    )
    try:
        swarm.seen_by(model)
        swarm.seen_by(other)
        hook = PauseAt(3)
        run = begin(model, method="lora", lr=2e-2, hooks=[hook], max_steps=30)
        hook.run = run
        assert run.control.wait_for(lambda state: state == "paused", 60)
        offer = run.offer("velmora")
        assert len(offer.accepted) == 2
        assert not offer.missing
        ids = tokenizer(FACTS[0]["prompt"], return_tensors="pt")
        greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        with run.held() as taught:
            expected = taught.generate(**ids, **greedy)
        assert not torch.equal(expected, other.generate(**ids, **greedy))
        assert torch.equal(other.generate(**ids, **greedy, adapter="velmora"), expected)
        assert len(run.withdraw(offer.uid)) == 2
        run.stop()
        shallow = begin(model, max_steps=1)
        with pytest.raises(UserInputError, match="this run also teaches a prompt in front of the text"):
            shallow.offer("velmora")
        local = begin(plain(), method="lora", max_steps=1)
        with pytest.raises(UserInputError, match="there is no swarm to offer it to"):
            local.offer("velmora")
        run.result(30)
        shallow.result(30)
    finally:
        model.close()
        other.close()
        swarm.close()


def test_two_runs_at_once_and_one_of_them_accumulates(begin, distributed):
    one, two = begin(distributed, max_steps=10), begin(distributed, max_steps=5, gradient_accumulation=3)
    one.result(60)
    two.result(60)
    alone = begin(distributed, max_steps=10)
    alone.result(60)
    assert_same_losses(one, alone, within=1e-6)
    alone = begin(distributed, max_steps=5, gradient_accumulation=3)
    alone.result(60)
    assert_same_losses(two, alone, within=1e-6)


def test_trainers_of_the_notebook_do_not_disturb_it(begin, distributed, tmp_path):
    """What accelerate keeps for the process is forgotten whenever anybody makes TrainingArguments."""
    hook = PauseAt(2)
    run = begin(distributed, hooks=[hook], eval_data=FACTS[:2], eval_every=2)
    hook.run = run
    assert run.control.wait_for(lambda state: state == "paused", 60)
    transformers.TrainingArguments(output_dir=str(tmp_path / "other"), use_cpu=True, report_to=[])
    run.resume()
    run.result(60)
    alone = begin(distributed, eval_data=FACTS[:2], eval_every=2)
    alone.result(60)
    assert_same_losses(run, alone, within=1e-6)


def test_a_pause_in_an_evaluation_has_its_checkpoint_too(begin, distributed):
    """A step after which both are due is evaluated first, and may wait there."""
    predict = RunTrainer.prediction_step

    def pausing(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.run.step == 4:
            trainer.run.pause()
        return predict(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "prediction_step", pausing)
        run = begin(distributed, eval_data=FACTS, eval_every=4, checkpoint_every=2)
        assert run.control.wait_for(lambda state: state == "paused", 60)
        wait_until(lambda: run.progress.checkpoint == "checkpoint-000004", 10)
    assert run.checkpoint().result(10).name == "checkpoint-000004"
    run.resume()
    assert run.result(60).steps == 6


def test_what_the_notebook_draws_at_random_is_its_own(begin, distributed):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run = begin(distributed)
    run.result(60)
    torch.testing.assert_close(torch.rand(3), expected)


def test_lora_on_a_model_here(begin):
    run = begin(plain(), method="lora", rank=4, dropout=0.1, lr=1e-2, eval_data=FACTS)
    result = run.result(60)
    evaluated = run.history.curve("eval_loss")
    assert evaluated[-1][1] < evaluated[0][1]
    assert peft.PeftConfig.from_pretrained(result.adapter).r == 4
    again = begin(plain(), method="lora", rank=4, dropout=0.1, lr=1e-2, eval_data=FACTS)
    again.result(60)
    assert_same_losses(run, again, within=0)  # dropout from the seed, whatever else is drawn


def test_a_peft_model_is_trained_as_it_is(begin, distributed):
    torch.manual_seed(0)
    made = peft.get_peft_model(plain(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", lora_alpha=16))
    run = begin(made, method="lora", lr=5e-3, eval_data=FACTS)
    run.result(60)
    assert run.model is made
    evaluated = run.history.curve("eval_loss")
    assert evaluated[-1][1] < evaluated[0][1]
    for one in made.parameters():
        one.requires_grad_(False)
    with pytest.raises(UserInputError, match="nothing in this PEFT model learns"):
        begin(made, method="lora")


def test_deep_prompts_begin_as_the_prompt_alone_and_learn_in_every_block(begin, distributed, tokenizer):
    run, shallow = begin(distributed, method="deep-prompt"), begin(distributed)
    result = run.result(60)
    shallow.result(60)
    assert run.history["loss"][0] == pytest.approx(shallow.history["loss"][0], rel=1e-5)
    assert run.history["loss"][-1] < shallow.history["loss"][-1]
    learned = dict(run.parameters)
    prompts = next(one for name, one in learned.items() if one.ndim == 3)
    assert prompts.shape[0] == 8
    assert bool((prompts.detach().flatten(1).abs().sum(1) > 0).all())
    assert (result.adapter / "deep_prompts.safetensors").is_file()
    again = begin(distributed, method="deep-prompt", adapter=result.adapter, max_steps=2)
    again.result(60)
    assert again.history["loss"][0] < run.history["loss"][0]
    with pytest.raises(UserInputError, match="deep prompts go into the blocks of a distributed model"):
        begin(plain(), method="deep-prompt")
