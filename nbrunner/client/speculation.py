"""Several tokens for one trip through the chain: guess what follows, let the chain check all of it at once.

Every token that is kept was chosen from the model's own scores, by the same processors and the same random numbers
as without guesses; a guess only decides how many of them one round may bring (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192, for guesses that are certain: a token drawn from the model's distribution that
equals the guess is accepted, any other one takes its place). So greedy text is the same, and so is sampled text
of a seed, as far as the scores of a checked token equal those of one computed by itself.
"""

from __future__ import annotations

import inspect
import time
from typing import Any, Protocol

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from nbrunner.client.window import Window
from nbrunner.errors import UserInputError

LONGEST_MATCH = 4
"""Tokens at the end of a text that are looked for earlier in it: long ones say more of what follows."""

AUTO = "auto"
OFF = "off"
MOST_FIXED = 64


class Proposer(Protocol):
    """Guesses what follows."""

    def propose(self, ids: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Up to `count` guesses [rows, 0 to count] for what follows ``ids`` [rows, tokens].

        ``mask`` [rows, up to tokens] is 0 where there is padding; tokens beyond it are text.
        """


class PromptLookup:
    """What followed the last time the text said the same (Saxena 2023, prompt lookup decoding). Costs nothing."""

    def propose(self, ids: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
        rows = [_continued(row, count) for row in ids.tolist()]
        shortest = min(len(row) for row in rows)
        return torch.tensor([row[:shortest] for row in rows], dtype=torch.long).reshape(len(rows), shortest)


def _continued(tokens: list[int], count: int) -> list[int]:
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        end = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == end:
                found = tokens[start + length : start + length + count]
                # what repeats itself goes on repeating
                while len(found) < count:
                    found += found[: count - len(found)] or found
                return found[:count]
    return []


class Draft:
    """A small model in this process that guesses greedily, with caches of its own.

    Parameters
    ----------
    model
        A causal language model of transformers with the vocabulary of the one it guesses for.
    vocabulary
        Tokens of that one.

    Raises
    ------
    UserInputError
        Another vocabulary.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        own = model.config.get_text_config().vocab_size
        if own != vocabulary:
            raise UserInputError(
                f"the draft model has {own} tokens, this model {vocabulary}: a draft must have the same vocabulary"
            )
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._held = torch.empty(0, 0, dtype=torch.long)

    @torch.no_grad()
    def propose(self, ids: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
        if count < 1:
            return ids[:, :0]
        ids = ids.to(self._model.device)
        self._keep_common(ids)
        mask = torch.ones_like(ids[:, :0]) if mask is None else mask.to(ids)
        given, found = ids[:, self._held.shape[1] :], []
        for number in range(count):
            width = ids.shape[1] + number
            wide = torch.cat([mask, mask.new_ones(ids.shape[0], width - mask.shape[1])], dim=1)
            positions = (wide.cumsum(dim=1) - 1).clamp(min=0)[:, -given.shape[1] :]
            where = {"position_ids": positions} if self._takes_positions else {}
            output = self._model(
                input_ids=given, attention_mask=wide, past_key_values=self._cache, use_cache=True, **where
            )
            self._cache, given = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(given)
        guesses = torch.cat(found, dim=1)
        self._held = torch.cat([ids, guesses[:, :-1]], dim=1)
        return guesses.cpu()

    def _keep_common(self, ids: torch.Tensor) -> None:
        """Keep of the caches what is true of these texts, and at least one token to be computed."""
        held = self._held
        width = min(held.shape[1], ids.shape[1] - 1) if held.shape[0] == ids.shape[0] else 0
        same = (held[:, :width] == ids[:, :width]).all(dim=0).long().cumprod(0).sum() if width else 0
        common = int(same)
        if self._cache is not None and common and getattr(self._cache, "is_croppable", True):
            if common < held.shape[1]:
                self._cache.crop(common - held.shape[1])
            self._held = held[:, :common]
        else:
            self._cache, self._held = None, ids[:, :0]


class Speculation:
    """How to generate with guesses: what ``generate`` takes as ``custom_generate``, for one call.

    Parameters
    ----------
    proposer
        Who guesses.
    window
        How much; counts rounds and tokens.
    streamer
        Is given the tokens: transformers gives the prompt to its own, and does not hand it on.
    """

    def __init__(self, proposer: Proposer, window: Window, streamer: Any = None) -> None:
        self.proposer = proposer
        self.window = window
        self.streamer = streamer

    @classmethod
    def of(cls, model: Any, how: str | int, draft: Any = None, streamer: Any = None) -> Speculation | None:
        """That for what was asked; None to go without.

        Parameters
        ----------
        how
            ``"auto"``: as many guesses as pay off; a number: always that many; ``"off"`` or 0.
        draft
            A model in this process that guesses; None looks the text up in itself.

        Raises
        ------
        UserInputError
            For anything else.
        """
        if how == AUTO:
            window = Window()
        elif how == OFF or (how == 0 and not isinstance(how, bool)):
            return None
        elif isinstance(how, int) and not isinstance(how, bool) and 1 <= how <= MOST_FIXED:
            window = Window(fixed=how)
        else:
            raise UserInputError(
                f"speculate is 'auto', 'off', or a number of tokens from 1 to {MOST_FIXED}, not {how!r}"
            )
        vocabulary = model.get_input_embeddings().num_embeddings
        return cls(PromptLookup() if draft is None else Draft(draft, vocabulary), window, streamer)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """As transformers calls a decoding method."""
        loop = _Decoding(
            model,
            logits_processor,
            stopping_criteria,
            generation_config,
            self.streamer,
            self.proposer,
            self.window,
            model_kwargs,
        )
        return loop.run(input_ids)


class _Decoding:
    """One ``generate`` call; the counterpart of transformers' own sampling loop."""

    def __init__(
        self,
        model: Any,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        proposer: Proposer,
        window: Window,
        kwargs: dict[str, Any],
    ) -> None:
        if config.num_beams > 1:
            raise UserInputError(
                "beams search all ways at once and cannot be guessed: use speculate='off' with beams"
            )
        if config.output_hidden_states or config.output_attentions:
            raise UserInputError("states are given step by step: use speculate='off' with output_hidden_states")
        if not kwargs.get("use_cache", True) or kwargs.get("past_key_values") is None:
            raise UserInputError("guesses are checked over caches: use speculate='off' without them")
        self._model, self._processors, self._criteria, self._config = model, processors, criteria, config
        self._streamer, self._proposer, self._window, self._kwargs = streamer, proposer, window, kwargs
        self._keep = config.return_dict_in_generate
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._accepts = inspect.signature(model.forward).parameters

    def run(self, ids: torch.Tensor) -> Any:
        unfinished = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        self._cache.activate_past_recording()
        guesses, rounds = ids[:, :0], 0
        while bool(unfinished.any()):
            began = time.perf_counter()
            logits = self._check(ids, guesses, first=rounds == 0)
            before = ids.shape[1]
            ids, unfinished = self._choose(ids, guesses, logits, unfinished)
            brought = ids.shape[1] - before
            self._cache.crop(min(0, ids.shape[1] - 1 - self._cache.get_seq_length()))
            self._window.learn(
                guessed=guesses.shape[1],
                accepted=brought - 1 if brought <= guesses.shape[1] else guesses.shape[1],
                seconds=time.perf_counter() - began,
                first=rounds == 0,
            )
            rounds += 1
            if bool(unfinished.any()):
                guesses = self._guess(ids)
        if self._streamer is not None:
            self._streamer.end()
        if not self._keep:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=tuple(self._scores) if self._config.output_scores else None,
            logits=tuple(self._logits) if self._config.output_logits else None,
            past_key_values=self._cache,
        )

    @property
    def _cache(self) -> Any:
        return self._kwargs["past_key_values"]

    def _guess(self, ids: torch.Tensor) -> torch.Tensor:
        room = self._config.max_length - ids.shape[1] - 1
        count = min(self._window.size(rolls_back=_rolls_back(self._cache)), room)
        if count < 1:
            return ids[:, :0]
        began = time.perf_counter()
        guesses = self._proposer.propose(ids, count, self._kwargs.get("attention_mask"))[:, :count].to(ids.device)
        if guesses.shape[1]:
            self._window.guessing(seconds=(time.perf_counter() - began) / guesses.shape[1])
        return guesses

    def _check(self, ids: torch.Tensor, guesses: torch.Tensor, *, first: bool) -> torch.Tensor:
        """Logits [rows, guesses + 1, vocabulary] behind the text and behind each guess, in one pass."""
        count = guesses.shape[1]
        text = torch.cat([ids, guesses], dim=1)
        kwargs = dict(self._kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] < text.shape[1]:
            more = mask.new_ones(mask.shape[0], text.shape[1] - mask.shape[1])
            kwargs["attention_mask"] = torch.cat([mask, more], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] < text.shape[1]:
            more = torch.arange(1, text.shape[1] - positions.shape[-1] + 1, device=positions.device)
            kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + more], dim=-1)
        inputs = self._model.prepare_inputs_for_generation(
            text,
            next_sequence_length=text.shape[1] - self._cache.get_seq_length(),
            is_first_iteration=first,
            **kwargs,
        )
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = count + 1
        output = self._model(**inputs, return_dict=True)
        return output.logits[:, -count - 1 :].to(copy=True, dtype=torch.float32, device=ids.device)  # type: ignore[no-any-return]

    def _choose(
        self, ids: torch.Tensor, guesses: torch.Tensor, logits: torch.Tensor, unfinished: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on token by token as long as every text that is not finished says what was guessed."""
        for number in range(logits.shape[1]):
            scores = self._processors(ids, logits[:, number].clone())
            if self._keep and self._config.output_scores:
                self._scores.append(scores)
            if self._keep and self._config.output_logits:
                self._logits.append(logits[:, number])
            if self._config.do_sample:
                chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                chosen = scores.argmax(dim=-1)
            if self._config._pad_token_tensor is not None:
                chosen = torch.where(unfinished, chosen, self._config._pad_token_tensor.to(chosen.device))
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if self._streamer is not None:
                self._streamer.put(chosen.cpu())
            unfinished = unfinished & ~self._criteria(ids, scores).bool()
            if number == guesses.shape[1] or not bool(unfinished.any()):
                break
            if not bool((chosen == guesses[:, number])[unfinished].all()):
                break
        return ids, unfinished


def _rolls_back(cache: Any) -> bool:
    """Whether wrong guesses can be taken out of the caches again without computing the text anew."""
    return bool(getattr(getattr(cache, "session", None), "croppable", True))
