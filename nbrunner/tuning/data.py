"""What a model is taught: rows in any of the usual forms, checked before anything starts.

A row is a text, or a dict with ``text``; ``prompt`` and ``completion``; ``messages``; or ``text`` and ``label``.
They come in a list, a pandas DataFrame, a ``datasets.Dataset``, a file, or as the lines of a cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbrunner.errors import UserInputError

Label = str | int

_FORMS = "a text, {'text': …}, {'prompt': …, 'completion': …} or {'messages': [{'role': …, 'content': …}, …]}"
_LABELLED = "{'text': …, 'label': …}"
_SHOWN = 160
"""Characters of a bad row that are shown."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes
    ----------
    prompt
        What is given and not learned; empty for a plain text.
    text
        What is learned, or classified.
    messages
        A chat, whose assistant's turns are learned; empty otherwise.
    label
        Of a text to classify.
    """

    text: str = ""
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    label: Label | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as it was given, ready for JSON."""
        if self.messages:
            return {"messages": [dict(one) for one in self.messages]}
        if self.label is not None:
            return {"text": self.text, "label": self.label}
        return {"prompt": self.prompt, "completion": self.text} if self.prompt else {"text": self.text}


@dataclass(frozen=True)
class Examples:
    """Checked rows. ``name``: what to call them in messages."""

    rows: tuple[Row, ...]
    name: str = field(default="data", compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[Label]:
        """Different labels, sorted."""
        return sorted(
            {row.label for row in self.rows if row.label is not None}, key=lambda one: (str(type(one)), one)
        )

    def dumps(self) -> str:
        """As JSON lines."""
        return "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in self.rows)

    @property
    def digest(self) -> str:
        """Equal exactly when the rows are."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()


def read_examples(data: Any, *, labelled: bool = False, name: str = "data") -> Examples:
    """Check rows in whatever form they are.

    Parameters
    ----------
    data
        A list, DataFrame, ``datasets.Dataset`` or other sized collection of rows; a `pathlib.Path` to a file of
        JSON lines or plain lines; `Examples`, as they are.
    labelled
        Rows are to be classified: each needs a ``label``, all strings or all whole numbers.
    name
        What to call it in messages.

    Raises
    ------
    UserInputError
        With the first row that cannot be used, and what was expected.
    """
    if isinstance(data, Examples):
        name = data.name
        data = [row.as_dict() for row in data.rows]
    rows = _rows_of(data, name)
    if not rows:
        raise UserInputError(f"{name} is empty: give at least one example, as {_LABELLED if labelled else _FORMS}.")
    read = _labelled_row if labelled else _text_row
    found: list[Row] = []
    for index, row in enumerate(rows):
        try:
            found.append(read(row))
        except _Bad as why:
            raise UserInputError(f"row {index} of {name} {why}: {_short(row)}") from None
    if labelled:
        _check_labels(found, name)
    return Examples(tuple(found), name)


def parse_lines(body: str, *, name: str = "the cell") -> list[Any]:
    """The rows of a cell or file: JSON lines if the first one is an object, otherwise plain lines.

    Raises
    ------
    UserInputError
        A line that is no JSON where the first was.
    """
    # not splitlines: JSON may hold the other characters that it takes for the ends of lines
    lines = [(number, line.strip()) for number, line in enumerate(body.split("\n"), start=1) if line.strip()]
    if not lines or not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    rows = []
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserInputError(
                f"line {number} of {name} is no JSON ({error.msg}, column {error.colno}), and the first was: "
                f"{_short(line)}"
            ) from None
    return rows


def _rows_of(data: Any, name: str) -> Sequence[Any]:
    if isinstance(data, Path):
        try:
            return parse_lines(data.read_text("utf-8"), name=data.name)
        except (OSError, UnicodeDecodeError) as error:
            raise UserInputError(f"{name} cannot be read: {error}") from None
    if isinstance(data, str):
        raise UserInputError(
            f"{name} is one text; give a list of examples, or a pathlib.Path if it names a file: {_short(data)}"
        )
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # pandas, or what looks like it
        return list(data.to_dict("records"))
    if isinstance(data, Mapping):
        splits = ", ".join(map(repr, list(data)[:6]))
        raise UserInputError(f"{name} is a mapping with {splits}; give one of its parts, or a list of rows.")
    if not isinstance(data, Iterable) or isinstance(data, (bytes, bytearray)):
        raise UserInputError(f"{name} is {type(data).__name__}; give a list of examples, a DataFrame or a Dataset.")
    if not hasattr(data, "__len__"):
        raise UserInputError(
            f"{name} has no length (a {type(data).__name__}); give a list of it: which rows come when must be "
            "known to continue a run where it was."
        )
    return list(data)


class _Bad(Exception):  # noqa: N818
    """Why a row cannot be used; the message goes behind *row 3 of data*."""


def _text_row(row: Any) -> Row:
    if isinstance(row, str):
        return Row(text=_text(row, "text"))
    if not isinstance(row, Mapping):
        raise _Bad(f"is {_kind(row)}, not {_FORMS}")
    if "messages" in row:
        return Row(messages=_messages(row["messages"]))
    if "prompt" in row and "completion" in row:
        # a prompt may be empty: then everything is learned
        prompt = row["prompt"] if row["prompt"] == "" else _text(row["prompt"], "prompt")
        return Row(prompt=prompt, text=_text(row["completion"], "completion"))
    if "text" in row:
        return Row(text=_text(row["text"], "text"))
    raise _Bad(f"has {_names(row)}; it needs 'text', or 'prompt' and 'completion', or 'messages'")


def _labelled_row(row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise _Bad(f"is {_kind(row)}, not {_LABELLED}")
    if "text" not in row or "label" not in row:
        raise _Bad(f"has {_names(row)}; to classify, each row needs 'text' and 'label'")
    label = row["label"]
    if hasattr(label, "item") and not isinstance(label, (str, int)):  # numpy's numbers, from a DataFrame
        label = label.item()
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, float) and math.isnan(label):
        raise _Bad("has no label")
    if isinstance(label, float) and label.is_integer():  # a DataFrame's numbers are, if one of them is missing
        label = int(label)
    if not isinstance(label, (str, int)) or label == "":
        raise _Bad(f"has {_kind(label)} as its label; a label is a name or a whole number")
    return Row(text=_text(row["text"], "text"), label=label)


def _check_labels(rows: Sequence[Row], name: str) -> None:
    first = rows[0].label
    for index, row in enumerate(rows):
        if isinstance(row.label, str) != isinstance(first, str):
            raise UserInputError(
                f"row {index} of {name} has the label {row.label!r}, and row 0 has {first!r}: names and numbers do "
                "not go together."
            )
        if isinstance(row.label, int) and row.label < 0:
            raise UserInputError(f"row {index} of {name} has the label {row.label}; numbers count from 0.")


def _messages(messages: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes, Mapping)):
        raise _Bad(f"has {_kind(messages)} as its messages, not a list")
    found = []
    for number, one in enumerate(messages):
        if not isinstance(one, Mapping) or not {"role", "content"} <= one.keys():
            raise _Bad(f"has a message {number} without 'role' and 'content'")
        if not isinstance(one["role"], str) or not isinstance(one["content"], str):
            raise _Bad(f"has a message {number} whose role or content is not a text")
        found.append({"role": one["role"], "content": one["content"]})
    if not any(one["role"] == "assistant" and one["content"] for one in found):
        raise _Bad("has no message of the assistant, so that there is nothing to learn")
    return tuple(found)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"has {_kind(value)} as its {what}, not a text")
    if not value.strip():
        raise _Bad(f"has an empty {what}")
    return value


def _names(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(row)[:8])) or "nothing in it"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (None)"
    if isinstance(value, float) and math.isnan(value):
        return "nothing (nan)"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def _short(row: Any) -> str:
    shown = row if isinstance(row, str) else repr(row)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
