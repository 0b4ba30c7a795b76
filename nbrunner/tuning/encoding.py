"""Examples as token ids, with labels where something is to be learned, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbrunner.errors import UserInputError
from nbrunner.tuning.data import Examples, Label, Row

IGNORED = -100
"""Label of a token that is given and not learned, as torch's cross entropy leaves it out."""


@dataclass(frozen=True)
class Encoding:
    """How rows become ids.

    Attributes
    ----------
    tokenizer
        Of the model.
    most_tokens
        What the model takes, virtual tokens of a prompt already taken off.
    max_length
        Cut rows to so many tokens; None refuses those beyond ``most_tokens``.
    classes
        Labels in the order of the head's outputs; empty to learn texts.
    """

    tokenizer: Any
    most_tokens: int
    max_length: int | None = None
    classes: tuple[Label, ...] = ()

    def encode(self, examples: Examples) -> EncodedExamples:
        """All rows.

        Raises
        ------
        UserInputError
            A row that is too long, that has nothing to learn, a chat in a form that the model does not have, or a
            label that the training data do not have.
        """
        rows, cut, name = [], 0, examples.name
        limit = self.most_tokens if self.max_length is None else min(self.max_length, self.most_tokens)
        for index, row in enumerate(examples.rows):
            try:
                ids, labels = self._encode_row(row)
            except UserInputError as error:
                raise UserInputError(f"row {index} of {name}: {error}") from None
            if len(ids) > limit:
                if self.max_length is None:
                    raise UserInputError(
                        f"row {index} of {name} has {len(ids)} tokens, and the model takes {limit}: shorten it, or "
                        "cut long rows with max_length=…"
                    )
                ids, cut = ids[:limit], cut + 1
                if not self.classes:
                    labels = labels[:limit]
            if not self.classes and all(one == IGNORED for one in labels[1:]):
                raise UserInputError(f"row {index} of {name} has nothing to learn in its first {limit} tokens.")
            rows.append({"input_ids": ids, "labels": labels[0] if self.classes else labels})
        return EncodedExamples(rows, cut)

    def _encode_row(self, row: Row) -> tuple[list[int], list[int]]:
        if self.classes:
            if row.label not in self.classes:
                known = ", ".join(repr(one) for one in self.classes)
                raise UserInputError(f"its label {row.label!r} is none of {known}.")
            return self._ids(row.text, special=True), [self.classes.index(row.label)]
        if row.messages:
            return self._chat(row.messages)
        given = self._ids(row.prompt, special=True) if row.prompt else self._begin()
        # apart, as they will be apart when the model is asked
        learned = [*self._ids(row.text, special=False), *self._end()]
        first = [IGNORED] * len(given)
        return given + learned, first + learned

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special).input_ids)
        end = self.tokenizer.eos_token_id
        if special and not self.classes and ids and ids[-1] == end:  # some tokenizers end every text
            ids.pop()
        return ids

    def _begin(self) -> list[int]:
        """What the tokenizer puts in front of a text."""
        return self._ids("", special=True)

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """A chat, of which the assistant's turns are learned, each with what ends it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserInputError("this model has no chat format; give 'prompt' and 'completion' instead.")
        ids: list[int] = []
        labels: list[int] = []
        for number, one in enumerate(messages, start=1):
            if one["role"] != "assistant":
                continue
            asked = self._template(messages[: number - 1], answer=True)
            said = self._template(messages[:number], answer=False)
            if asked[: len(ids)] != ids or said[: len(asked)] != asked:
                raise UserInputError(
                    "the model's chat format rewrites earlier turns, so that they cannot be learned."
                )
            labels += [IGNORED] * (len(asked) - len(ids)) + said[len(asked) :]
            ids = said
        return ids, labels

    def _template(self, messages: Sequence[Mapping[str, str]], *, answer: bool) -> list[int]:
        import jinja2

        try:
            found = self.tokenizer.apply_chat_template(
                [dict(one) for one in messages], add_generation_prompt=answer, return_dict=True
            )
        except jinja2.TemplateError as error:
            raise UserInputError(f"the model's chat format does not take these messages: {error}") from None
        return [int(one) for one in found["input_ids"]]


class EncodedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of ``input_ids`` and ``labels``. ``cut``: how many were too long and lost their end."""

    def __init__(self, rows: Sequence[dict[str, Any]], cut: int = 0) -> None:
        self.rows = rows
        self.cut = cut

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Collator:
    """Rows as one batch: ``input_ids``, ``attention_mask``, ``labels`` [batch, tokens] (or [batch] to classify).

    Texts are padded on the right. Texts to classify on the left: a head reads the last token, and with embeddings
    for its input (trained prompts) it cannot see which one that is.
    """

    pad: int
    left: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = [self._padded(row["input_ids"], width, self.pad) for row in rows]
        mask = [self._padded([1] * len(row["input_ids"]), width, 0) for row in rows]
        labels = [
            row["labels"] if isinstance(row["labels"], int) else self._padded(row["labels"], width, IGNORED)
            for row in rows
        ]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "attention_mask": torch.tensor(mask, dtype=torch.long),
            "labels": torch.tensor(labels, dtype=torch.long),
        }

    def _padded(self, values: Sequence[int], width: int, filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return [*padding, *values] if self.left else [*values, *padding]


def pad_id(tokenizer: Any) -> int:
    """What fills short rows; its place is masked, so that any id does where the tokenizer has none."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0
