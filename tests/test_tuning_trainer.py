"""A distributed model is a model like any other: transformers' Trainer and a plain loop train it unchanged."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from tuning_models import FACTS, REVIEWS, TINY, distributed, plain, tokenizer, two_spans

import nbrunner
from nbrunner.client.path_model import twin_of
from nbrunner.tuning.data import read_examples
from nbrunner.tuning.encoding import Collator, Encoding, pad_id

__all__ = ["distributed", "tokenizer", "two_spans"]

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]


def train(model: Any, rows: Any, collator: Any, folder: Any, **options: Any) -> tuple[list[float], list[float]]:
    """Losses and evaluations of transformers' own Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=2,
        **options,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3], data_collator=collator
    )
    trainer.train()
    log = trainer.state.log_history
    return [one["loss"] for one in log if "loss" in one], [one["eval_loss"] for one in log if "eval_loss" in one]


def encoded(tokenizer: Any, data: Any, classes: tuple[str, ...] = ()) -> list[Any]:
    encoding = Encoding(tokenizer, most_tokens=512, classes=classes)
    return encoding.encode(read_examples(data, labelled=bool(classes))).rows


def prompt_config(task: str = "CAUSAL_LM") -> Any:
    return peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=4, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB
    )


def lora_config() -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def with_peft(model: Any, config: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("config", [prompt_config, lora_config])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_trainer_with_peft_accumulation_and_evaluation(distributed, tokenizer, tmp_path, accumulate, config):
    rows, collator = encoded(tokenizer, FACTS), Collator(pad_id(tokenizer))
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 2, "eval_strategy": "epoch"}
    ours = train(with_peft(twin_of(distributed), config()), rows, collator, tmp_path, **options)
    theirs = train(with_peft(plain(), config()), rows, collator, tmp_path, **options)
    assert len(ours[0]) == 2 * 3 // accumulate
    assert len(ours[1]) == 2
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert ours[0][-1] < ours[0][0]


def test_trainer_with_a_head_for_labels(two_spans, tokenizer, tmp_path):
    rows = encoded(tokenizer, REVIEWS, ("bad", "good"))
    options = {"num_train_epochs": 3}
    torch.manual_seed(5)
    ours = nbrunner.AutoDistributedModelForSequenceClassification.from_pretrained(
        TINY, invite=two_spans.invite, num_labels=2
    )
    theirs = plain("AutoModelForSequenceClassification", num_labels=2)
    theirs.score.load_state_dict(ours.score.state_dict())
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.startswith("score"))
    try:
        found = train(ours, rows, Collator(pad_id(tokenizer)), tmp_path, **options)
    finally:
        ours.close()
    assert found[0] == pytest.approx(
        train(theirs, rows, Collator(pad_id(tokenizer)), tmp_path, **options)[0], rel=1e-5
    )
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("config", [prompt_config, lora_config])
def test_a_plain_loop(distributed, tokenizer, config):
    rows, collator = encoded(tokenizer, FACTS), Collator(pad_id(tokenizer))

    def losses(model: Any) -> list[float]:
        model = with_peft(model, config())
        model.train()
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
        found = []
        for step in range(4):
            for part in (rows[:3], rows[3:]):  # two passes of a step
                loss = model(**collator(part), use_cache=False).loss / 2
                loss.backward()
                found.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                model.eval()
                with torch.no_grad():
                    found.append(float(model(**collator(rows)).loss))
                model.train()
        return found

    ours, theirs = losses(twin_of(distributed)), losses(plain())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-2] < ours[0]  # the same rows
