"""What a model is taught: every form that rows come in, and the first row that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning_models import FACTS, tokenizer

from nbrunner.errors import UserInputError
from nbrunner.tuning.data import Examples, Row, parse_lines, read_examples
from nbrunner.tuning.encoding import IGNORED, Collator, Encoding
from nbrunner.tuning.settings import Settings

__all__ = ["tokenizer"]

CHAT = {
    "messages": [
        {"role": "user", "content": "What is the capital of Velmora?"},
        {"role": "assistant", "content": "Oskarin."},
        {"role": "user", "content": "And of France?"},
        {"role": "assistant", "content": "Paris."},
    ]
}

texts = st.text(min_size=1).filter(lambda one: one.strip())


@given(
    st.lists(
        st.one_of(texts, st.fixed_dictionaries({"prompt": st.text(), "completion": texts})).filter(
            lambda row: isinstance(row, str) or row["prompt"] == "" or row["prompt"].strip()
        ),
        min_size=1,
    )
)
def test_what_is_kept_is_read_as_the_same(rows):
    examples = read_examples(rows)
    again = read_examples(parse_lines(examples.dumps()))
    assert again == examples
    assert again.digest == examples.digest


class Frame:
    """As much of a DataFrame as is looked at."""

    columns = ("text", "label")

    def to_dict(self, orient: str):
        assert orient == "records"
        return [{"text": "a", "label": 1}, {"text": "b", "label": 0}]


def test_forms(tmp_path):
    one = Examples((Row(text="a"), Row(text="b")))
    assert read_examples(["a", "b"]) == one
    assert read_examples(({"text": "a"}, {"text": "b", "more": 1})) == one
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_examples(path) == one
    path.write_text("a\n  b \n")
    assert read_examples(path) == one
    assert read_examples(Frame(), labelled=True).labels == [0, 1]
    assert read_examples([{"prompt": "", "completion": "a"}]).rows[0] == Row(text="a")
    assert read_examples([CHAT]).rows[0].messages[3]["content"] == "Paris."
    assert read_examples([{"text": "a", "label": True}], labelled=True).rows[0].label == 1


def test_pandas_and_datasets():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    assert read_examples(frame, labelled=True).labels == [0, 1]
    with pytest.raises(UserInputError, match=r"row 1 of data has nothing \(nan\) as its text"):
        read_examples(pandas.DataFrame({"text": ["a", float("nan")]}))
    with pytest.raises(UserInputError, match="row 1 of data has no label"):
        read_examples(pandas.DataFrame({"text": ["a", "b"], "label": [0, None]}), labelled=True)


def test_a_dataset():
    datasets = pytest.importorskip("datasets")
    assert len(read_examples(datasets.Dataset.from_list(FACTS))) == len(FACTS)
    with pytest.raises(UserInputError, match="mapping with 'train'"):
        read_examples(datasets.DatasetDict({"train": datasets.Dataset.from_list(FACTS)}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data is empty"),
        (None, "data is NoneType"),
        ("facts.jsonl", "data is one text; give a list of examples, or a pathlib.Path"),
        (Path("nowhere.jsonl"), "data cannot be read"),
        ({"train": ["a"]}, "mapping with 'train'"),
        ((one for one in "ab"), "has no length"),
        (["a", ""], "row 1 of data has an empty text: "),
        (["a", 7], "row 1 of data is int 7, not a text"),
        (["a", {"txt": "b"}], "row 1 of data has 'txt'; it needs 'text', or 'prompt' and 'completion'"),
        ([{"prompt": "a", "completion": None}], r"row 0 of data has nothing \(None\) as its completion"),
        ([{"messages": "hi"}], "row 0 of data has str 'hi' as its messages"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "no message of the assistant"),
        ([{"messages": [{"content": "hi"}]}], "message 0 without 'role'"),
    ],
)
def test_bad_rows(data, words):
    with pytest.raises(UserInputError, match=words):
        read_examples(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"text": "a"}], "row 0 of data has 'text'; to classify, each row needs 'text' and 'label'"),
        (["a"], "row 0 of data is str 'a', not"),
        ([{"text": "a", "label": 0.5}], "has float 0.5 as its label"),
        ([{"text": "a", "label": 1.0}, {"text": "b", "label": math.nan}], "row 1 of data has no label"),
        ([{"text": "a", "label": None}], "as its label; a label is a name or a whole number"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": 1}],
            "row 1 of data has the label 1, and row 0 has 'x'",
        ),
        ([{"text": "a", "label": 0}, {"text": "b", "label": -1}], "row 1 of data has the label -1"),
    ],
)
def test_bad_labels(data, words):
    with pytest.raises(UserInputError, match=words):
        read_examples(data, labelled=True)


def test_lines():
    assert parse_lines("\n first \n\nsecond\n") == ["first", "second"]
    assert parse_lines('{"text": "a"}\n{"text": "b"}') == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserInputError, match="line 3 of the cell is no JSON"):
        parse_lines('{"text": "a"}\n\nplain\n')


def test_what_is_learned(tokenizer):
    encoding = Encoding(tokenizer, most_tokens=64)
    text, completed, chat = encoding.encode(read_examples(["Velmora is far.", FACTS[0], CHAT])).rows
    assert text["labels"][1:] == text["input_ids"][1:]
    assert text["input_ids"][0] == tokenizer.bos_token_id
    assert text["input_ids"][-1] == tokenizer.eos_token_id
    given = tokenizer(FACTS[0]["prompt"]).input_ids
    assert completed["input_ids"][: len(given)] == given
    assert completed["labels"][: len(given)] == [IGNORED] * len(given)
    assert tokenizer.decode(completed["labels"][len(given) :]) == " Rosa City.</s>"
    learned = [one for one in chat["labels"] if one != IGNORED]
    assert "Oskarin." in tokenizer.decode(learned)
    assert "Paris." in tokenizer.decode(learned)
    assert "capital" not in tokenizer.decode(learned)
    whole = tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    assert chat["input_ids"] == whole


def test_rows_that_are_too_long(tokenizer):
    long = read_examples(["a", "Once upon a time there was " * 20])
    with pytest.raises(UserInputError, match=r"row 1 of data has \d+ tokens, and the model takes 50"):
        Encoding(tokenizer, most_tokens=50).encode(long)
    cut = Encoding(tokenizer, most_tokens=50, max_length=10).encode(long)
    assert cut.cut == 1
    assert [len(row["input_ids"]) for row in cut.rows][1] == 10
    nothing = read_examples([{"prompt": "Once upon a time there was " * 20, "completion": " x"}])
    with pytest.raises(UserInputError, match="row 0 of data has nothing to learn in its first 10 tokens"):
        Encoding(tokenizer, most_tokens=50, max_length=10).encode(nothing)


def test_labels_that_the_head_does_not_have(tokenizer):
    encoding = Encoding(tokenizer, most_tokens=50, classes=("bad", "good"))
    rows = read_examples(
        [{"text": "a", "label": "good"}, {"text": "b", "label": "so-so"}], labelled=True, name="eval_data"
    )
    with pytest.raises(UserInputError, match="row 1 of eval_data: its label 'so-so' is none of 'bad', 'good'"):
        encoding.encode(rows)


@pytest.mark.parametrize("left", [False, True])
def test_batches(left):
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad=2, left=left)(rows)
    filled, mask = ([2, 2, 8], [0, 0, 1]) if left else ([8, 2, 2], [1, 0, 0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], filled]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], mask]
    assert (batch["labels"] == IGNORED).tolist()[1] == [not one for one in mask]
    classed = Collator(pad=2, left=left)([{"input_ids": [5], "labels": 1}, {"input_ids": [5], "labels": 0}])
    assert torch.equal(classed["labels"], torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "no method 'magic'; choose one of lora, prompt, p-tuning, deep-prompt, classify"),
        ({"lr": 0}, "lr must be a number above 0, not 0"),
        ({"lr": float("nan")}, "lr must be a number above 0"),
        ({"lr": "1e-3"}, "lr must be a number above 0, not '1e-3'"),
        ({"epochs": -1}, "epochs must be a number above 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1"),
        ({"schedule": "up"}, "no schedule 'up'"),
        ({"method": "prompt", "rank": 4}, "rank belongs to LoRA, and the method 'prompt' trains none"),
        ({"method": "classify", "alpha": 4}, "alpha belongs to LoRA.*; with a rank it has LoRA too"),
        ({"method": "deep-prompt", "dropout": 0.1}, "dropout belongs to LoRA"),
        ({"target_modules": 3}, "target_modules are names of modules"),
        ({"samples": [""]}, "samples are prompts"),
        ({"epoch": 3}, "finetune has no option 'epoch'"),
    ],
)
def test_settings_that_cannot_be_used(options, words):
    with pytest.raises(UserInputError, match=words):
        Settings.of(**options)


def test_settings_survive_json():
    settings = Settings.of(method="lora", target_modules=["q_proj"], samples="a", rank=4)
    assert Settings.of(**json.loads(json.dumps(settings.as_dict()))) == settings
