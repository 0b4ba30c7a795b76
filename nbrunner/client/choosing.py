"""Choosing tokens inside transformers' ``generate``, without the global random generator."""

from __future__ import annotations

import collections
import math
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nbrunner.client.sampling import Sampling


class Chooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token and leaves transformers nothing else to choose.

    So sampling can have its own generator (several cells may sample at once, and none disturbs the global one),
    and the token's log-probability is known without keeping a row of the vocabulary's size for every step.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.logprobs: collections.deque[float] = collections.deque()
        self._seed = sampling.seed or 0
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        self._greedy = sampling.temperature == 0
        if not self._greedy:
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k is not None:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p is not None and sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._greedy:
            choice = scores.argmax(-1, keepdim=True)
        else:
            if self._generator is None:
                self._generator = torch.Generator(scores.device).manual_seed(self._seed)
            probabilities = torch.softmax(self._warpers(input_ids, scores), dim=-1)
            choice = torch.multinomial(probabilities, num_samples=1, generator=self._generator)
        logprob = scores.gather(-1, choice)[0, 0] - torch.logsumexp(scores[0], dim=-1)
        self.logprobs.append(float(logprob))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, choice, 0.0)  # type: ignore[return-value]


class BeamLog(LogitsProcessor):  # type: ignore[misc]
    """Keeps, for each step and beam, the few log-probabilities that beam search can choose from."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        top = torch.log_softmax(scores, dim=-1).topk(min(self._keep, scores.shape[-1]))
        self._steps.append((top.indices.cpu(), top.values.cpu()))
        return scores

    def chosen(self, output: Any, *, prompt_tokens: int) -> list[tuple[int, float]]:
        """(id, log-probability) of every token of the best sequence."""
        ids = output.sequences[0, prompt_tokens:].tolist()
        rows = output.beam_indices[0].tolist()
        result = []
        for token, row, (indices, values) in zip(ids, rows, self._steps, strict=False):
            if row < 0:
                break
            where = (indices[row] == token).nonzero()
            result.append((token, float(values[row, where[0, 0]]) if len(where) else math.nan))
        return result
