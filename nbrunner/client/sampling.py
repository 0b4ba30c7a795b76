"""What may be asked for when tokens are chosen. Without torch, so that a cell's mistakes are told at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbrunner.errors import UserInputError


def temperature_unless_given(
    usual: float, *, top_p: float | None = None, top_k: int | None = None, beams: int = 1
) -> float:
    """The temperature where nobody said one: ``usual``, but beams take none, and who narrows a choice wants one."""
    if beams > 1:
        return 0.0
    return 1.0 if usual == 0 and not (top_p is None and top_k is None) else usual


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes
    ----------
    max_new_tokens
        At most this many.
    min_new_tokens
        The model may not end its text before so many.
    temperature
        0 takes the most likely token each time.
    top_p, top_k
        Sample among the most likely tokens only; None for all.
    seed
        Of the sampling; None picks one, and the receipt tells which.
    beams
        Beam search with this many beams; needs temperature 0 and does not stream.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    beams: int = 1
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserInputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserInputError(
                f"min_new_tokens must be between 0 and max_new_tokens, which is {self.max_new_tokens}; "
                f"not {self.min_new_tokens}."
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserInputError(f"temperature must be 0 (greedy) or above, not {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserInputError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise UserInputError(f"top_k must be at least 1, not {self.top_k}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserInputError(f"seed must be between 0 and 2**63 - 1, not {self.seed}.")
        if self.beams < 1:
            raise UserInputError(f"beams must be at least 1, not {self.beams}.")
        if self.beams > 1 and self.temperature > 0:
            raise UserInputError("beam search takes no temperature: use either beams or temperature.")
