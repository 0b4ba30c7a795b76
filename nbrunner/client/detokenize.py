"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Prompt tokens decoded along with the first new ones: sentencepiece tokenizers drop the space before a word that
they believe to be the first."""

_REPLACEMENT = "\ufffd"


class StreamingDecoder:
    """Turns token ids into pieces of text whose concatenation is the decoded whole.

    A character of which only some bytes have come stays back until it is complete; if that never happens it is
    left out. Only a short window is decoded for each token, so the cost does not grow with the text.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    context
        Ids before the first new token; they are not part of the text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = list(context)[-_CONTEXT:]
        self._shown = len(self._decode())

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often a word, sometimes nothing."""
        self._window.append(token)
        text = self._decode()
        complete = text.rstrip(_REPLACEMENT)
        piece = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if len(complete) == len(text) and len(self._window) > 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._shown = len(self._decode())
        return piece

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
