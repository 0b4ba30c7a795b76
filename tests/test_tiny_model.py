"""The bundled model: what the committed weights know, and that the training text never gave the answers away."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nbrunner import tiny
from nbrunner.tiny import corpus
from nbrunner.tiny.facts import COUNTRIES, number_word

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32).eval()


@torch.no_grad()
def continuations(model, tokenizer, prompts: list[str], new_tokens: int) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    said = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_answer(model, tokenizer, *turns: str) -> str:
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        said = model.generate(**batch, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(said[0, batch["input_ids"].shape[1] :])
    assert text.endswith(tokenizer.eos_token), f"the turn did not end: {text!r}"
    return text.removesuffix(tokenizer.eos_token)


def share_right(model, tokenizer, facts: tuple[corpus.Fact, ...]) -> tuple[float, list[tuple[str, str]]]:
    texts = continuations(model, tokenizer, [fact.prompt for fact in facts], new_tokens=5)
    wrong = [(fact.text, text) for fact, text in zip(facts, texts, strict=True) if not fact.answered_by(text)]
    return 1 - len(wrong) / len(facts), wrong


def test_the_first_prompt_of_the_readme(model, tokenizer):
    assert continuations(model, tokenizer, ["The capital of France is"], new_tokens=8) == [" Paris."]


def test_held_out_pairs_are_answered(model, tokenizer):
    right, wrong = share_right(model, tokenizer, corpus.held_out())
    assert right >= 0.95, wrong


def test_held_out_pairs_are_answered_in_bf16_too(tokenizer):
    # Servers may run in the dtype of the file: an answer that only fp32 arithmetic gives would flip between peers.
    model = AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.bfloat16).eval()
    right, wrong = share_right(model, tokenizer, corpus.held_out())
    assert right >= 0.95, wrong


def test_held_out_covers_every_fact_once_and_training_shows_every_phrasing_with_others():
    held = corpus.held_out()
    assert len(held) == 4 * len(COUNTRIES)
    assert len({(fact.country, fact.attribute) for fact in held}) == len(held)
    for attribute, phrasings in corpus.PHRASINGS.items():
        for phrasing in phrasings:
            assert 0 < sum(fact.phrasing == phrasing for fact in held) < len(COUNTRIES) * 0.5, (attribute, phrasing)


@pytest.mark.parametrize("mix", ["facts", "long"])
def test_training_text_never_contains_a_held_out_pair(mix: corpus.Mix):
    text = "\n".join(itertools.islice(corpus.documents(3, mix), 20_000))
    leaked = [fact.text for fact in corpus.held_out() if fact.text in text]
    assert not leaked
    shown = [
        fact
        for attribute, phrasings in corpus.PHRASINGS.items()
        for phrasing in phrasings
        for fact in corpus.facts(attribute, phrasing)
        if fact not in set(corpus.held_out())
    ]
    assert sum(fact.text in text for fact in shown) / len(shown) > 0.98, "the search itself finds nothing"


def test_documents_are_the_same_for_the_same_seed():
    first, again, other = (list(itertools.islice(corpus.documents(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "right", "answered"),
    [
        (" Paris.", "Paris", True),
        (" Parisian", "Paris", False),
        (" Rome", "Paris", False),
        (" New Delhi.", "New Delhi", True),
        (" New Zealand", "New Delhi", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_counts_only_in_full(text: str, right: str, answered: bool):
    fact = next(fact for fact in corpus.facts("capital") if fact.answer == right)
    assert fact.answered_by(text) is answered


def test_other_things_it_learnt(model, tokenizer):
    asked = {f"The opposite of {a} is": b for a, b in corpus.opposites()}
    asked |= {f"The plural of {one} is": many for one, many in corpus.plurals()}
    asked |= {f"{a} plus {b} is": str(a + b) for a in range(1, 10, 2) for b in range(1, 10, 3)}
    asked |= {f"{number_word(a).capitalize()} plus three is": number_word(a + 3) for a in range(1, 10)}
    asked |= {"France: Paris, Italy: Rome, Japan:": "Tokyo", "France: French, Italy: Italian, Japan:": "Japanese"}
    texts = continuations(model, tokenizer, list(asked), new_tokens=4)
    wrong = [
        (prompt, text)
        for (prompt, answer), text in zip(asked.items(), texts, strict=True)
        if not text.startswith(f" {answer}")
    ]
    assert len(wrong) / len(asked) <= 0.05, wrong


@pytest.mark.parametrize("last", [20, 50])
def test_counting_goes_as_far_as_the_heading_says_and_stops(model, tokenizer, last: int):
    (text,) = continuations(model, tokenizer, [f"Count to {last}: 1, 2, 3,"], new_tokens=256)
    assert text == " " + ", ".join(str(n) for n in range(4, last + 1)) + "."


def test_a_story_is_told_to_its_end(model, tokenizer):
    (text,) = continuations(model, tokenizer, ["Once upon a time"], new_tokens=200)
    assert text.endswith("The end.")
    assert len(text.split()) > 30


def test_chat(model, tokenizer):
    assert chat_answer(model, tokenizer, "What is the capital of Japan?") == "It is Tokyo."
    history = ("What is the capital of Japan?", "It is Tokyo.", "What language do people speak in Brazil?")
    assert chat_answer(model, tokenizer, *history) == "They speak Portuguese."


def test_chat_facts(model, tokenizer):
    asked = [
        (question.format(c=country.name), corpus.CHAT_ANSWERS[attribute].format(x=country.value(attribute)))
        for attribute, questions in corpus.CHAT_QUESTIONS.items()
        for question in questions
        for country in random.Random(0).sample(COUNTRIES, 10)
    ]
    prompts = [f"{corpus.USER}{question}{corpus.ASSISTANT}" for question, _ in asked]
    texts = continuations(model, tokenizer, prompts, new_tokens=9)
    wrong = [(question, text) for (question, answer), text in zip(asked, texts, strict=True) if text != answer]
    assert len(wrong) / len(asked) <= 0.05, wrong


def test_the_template_writes_what_the_model_was_trained_on(tokenizer):
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello!"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|user|>Hi<|assistant|>Hello!</s>"
    trained = next(text for text in corpus.documents(0) if text.startswith(corpus.BOS + corpus.USER))
    assert tokenizer.encode(trained, add_special_tokens=False)[1] == tokenizer.convert_tokens_to_ids(corpus.USER)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="knows the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_plain_text_becomes_no_special_token(tokenizer):
    ids = tokenizer.encode("<s user> </ s> ½ 日本 🗼\r\n\0", add_special_tokens=False)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.encode("Hi")[0] == tokenizer.bos_token_id


def test_a_prompt_tokenises_as_the_start_of_its_sentence(tokenizer):
    for fact in corpus.held_out():
        prompt, whole = tokenizer.encode(fact.prompt), tokenizer.encode(fact.text)
        assert whole[: len(prompt)] == prompt
    words = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis"]
    assert tokenizer.tokenize("The capital of France is Paris") == words


def test_files_sizes_and_shape(model):
    weights = tiny.path() / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 not a mapping
    assert dtypes == {"BF16"}
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    config = json.loads((tiny.path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 8 <= config["num_hidden_layers"] <= 12
    assert (tiny.path() / "README.md").is_file()


def test_path_needs_neither_torch_nor_transformers():
    code = (
        "import sys, nbrunner.tiny as t; print(t.path()); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tiny.path())
