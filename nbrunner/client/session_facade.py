"""The session that users hold: the tokens said so far, and the caches of them on the servers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from nbrunner.blocks.lora import Learned
from nbrunner.client.edits import Edit
from nbrunner.client.inputs import check_ids, check_length, check_mask, planned_length, position_limit
from nbrunner.client.remote_cache import RemoteCache, session_opener
from nbrunner.client.step_times import StepTime
from nbrunner.errors import SessionError, UserInputError

if TYPE_CHECKING:
    from nbrunner.client.model import DistributedModel


class Session:
    """One conversation with a model, over several ``generate`` calls.

    Made by ``model.inference_session()``; a context manager. Its servers are chosen at its first step, and replaced
    when they fail. An interrupted ``generate`` leaves it at the last token whose step was finished.

    Parameters
    ----------
    model
        A distributed model.
    max_length
        Tokens beyond which it refuses to grow; None for no limit of its own.
    edits
        Made at every step.
    named
        An adapter of the servers', used at every step.
    """

    def __init__(
        self,
        model: DistributedModel,
        max_length: int | None = None,
        *,
        edits: Sequence[Edit] = (),
        named: Learned | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise UserInputError(f"max_length must be at least 1, not {max_length}")
        self._model = model
        self._named = named
        self._max_length = max_length
        self._tokens: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._busy = threading.Lock()
        runner = model.runner
        self._cache = RemoteCache(session_opener(runner), runner.num_blocks, planned_edits=edits)

    # -- what it holds -------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> torch.Tensor:
        """[batch, length] int64 on the CPU, everything given and generated so far; [0, 0] in the beginning."""
        return torch.empty(0, 0, dtype=torch.long) if self._tokens is None else self._tokens

    @property
    def attention_mask(self) -> torch.Tensor:
        """[batch, length] int64, 0 for padding."""
        return torch.ones_like(self.tokens) if self._mask is None else self._mask.long()

    @property
    def max_length(self) -> int | None:
        """Tokens beyond which the session refuses to grow."""
        return self._max_length

    @property
    def position(self) -> int:
        """Tokens whose caches exist. The last token that was generated is not among them: it enters the model next.

        Setting it rolls back to exactly so many tokens; what is generated then equals a fresh run on these.
        """
        return self._cache.get_seq_length()

    @position.setter
    def position(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserInputError(f"position must be a number of tokens, not {value!r}")
        held = self.tokens.shape[1]
        if not 0 <= value <= held:
            raise SessionError(f"cannot set position to {value}: the session holds {held} tokens, give 0 to {held}")
        with self._alone():
            if value == 0:
                self._tokens = self._mask = None
            else:
                self._tokens = self.tokens[:, :value]
                self._mask = None if self._mask is None else self._mask[:, :value]
            self._cache.keep(value)

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each server, in order; empty before the first step."""
        session = self._cache.session
        return [] if session is None else list(session.chain)

    @property
    def timings(self) -> list[Any]:
        """What the servers said about the last steps, oldest first: for each step one entry a server and part."""
        return list(self._cache.timings)

    @property
    def last_step(self) -> StepTime | None:
        """How long the last step took, and what the servers said about it; None before the first."""
        return self._cache.last_step

    @property
    def queued(self) -> str:
        """Where it waits for a server's memory just now, with place and estimate; empty if it does not."""
        return str(getattr(self._cache.session, "queued", ""))

    @property
    def lost(self) -> list[tuple[str, str]]:
        """(PeerID, why) of every server that failed this session so far, oldest first; also during a step."""
        return list(getattr(self._cache.session, "lost", ()))

    @property
    def closed(self) -> bool:
        return self._cache.closed

    def close(self) -> None:
        """Free the caches on the servers."""
        self._cache.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        if self.closed:
            return f"<Session closed, {length} tokens>"
        batch = f" × {rows} rows" if rows > 1 else ""
        return f"<Session of {length} tokens{batch} over {len(self.chain)} servers>"

    # -- generate ------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``model.generate(…, session=self)``; see there."""
        with self._alone():
            return self._generate(inputs, args, kwargs)

    def _generate(self, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "input_ids" in kwargs:
            if inputs is not None:
                raise UserInputError("give the prompt once: as the first argument or as input_ids")
            inputs = kwargs.pop("input_ids")
        for name in ("inputs_embeds", "past_key_values"):
            if kwargs.get(name) is not None:
                raise UserInputError(f"{name} cannot be used in a session, which keeps tokens and caches itself")
        if kwargs.get("use_cache") is False:
            raise UserInputError("a session is a cache: use_cache=False cannot be used with one")
        config = _generation_config(self._model, args, kwargs)
        full, mask = self._with_new(inputs, kwargs.pop("attention_mask", None), config)
        self._check_length(config, kwargs, full.shape[1])
        held, cache, before = self.tokens.shape[1], self._cache, self._tokens
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        self._prepare_cache(full, copies, config, kwargs)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _WithoutHistory(kwargs["streamer"], held)
        device = self._model.device
        wide = torch.ones_like(full) if mask is None else mask.long()
        try:
            with self._model._closing_caches() as keep, self._model._adapting(self._named):
                result = keep(
                    self._model._generate(
                        full.to(device), *args, attention_mask=wide.to(device), past_key_values=cache, **kwargs
                    )
                )
        except BaseException:
            self._settle_after_failure(before, full, mask, copies)
            raise
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        self._settle(sequences.cpu(), mask, full.shape[1], _ends(config))
        if isinstance(result, torch.Tensor):
            return sequences[:, held:]
        result.sequences = sequences[:, held:]
        return result

    def _with_new(
        self, inputs: torch.Tensor | None, given_mask: Any, config: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens, and their mask as bool or None."""
        tokens = self._tokens
        if inputs is None or (isinstance(inputs, torch.Tensor) and inputs.ndim == 2 and inputs.shape[1] == 0):
            if tokens is None:
                raise UserInputError("the session is empty: its first generate() needs a prompt")
            return tokens, self._mask
        vocabulary = self._model.nbrunner_skeleton.base.get_input_embeddings().num_embeddings
        inputs = check_ids(inputs, vocabulary).cpu()
        if tokens is None:
            tokens = inputs[:, :0]
        if inputs.shape[0] != tokens.shape[0]:
            raise UserInputError(f"the session has {tokens.shape[0]} rows, the new tokens have {inputs.shape[0]}")
        full = torch.cat([tokens, inputs], dim=1)
        if given_mask is None:
            new = _mask_of_padding(inputs, config)
        elif isinstance(given_mask, torch.Tensor) and given_mask.shape == full.shape:
            return full, check_mask(given_mask, *full.shape)
        else:
            new = check_mask(given_mask, *inputs.shape)
        old = self._mask
        if new is None and old is None:
            return full, None
        old = torch.ones_like(tokens, dtype=torch.bool) if old is None else old
        new = torch.ones_like(inputs, dtype=torch.bool) if new is None else new
        return full, torch.cat([old, new], dim=1)

    def _check_length(self, config: Any, kwargs: dict[str, Any], prompt: int) -> None:
        total = planned_length(self._model.generation_config, config, kwargs, prompt)
        if self._max_length is not None and total > self._max_length:
            raise UserInputError(
                f"{prompt} tokens and up to {total - prompt} new ones are more than the session's max_length of "
                f"{self._max_length}: lower max_new_tokens, or open a session without max_length"
            )
        base = self._model.nbrunner_skeleton.base
        check_length(*position_limit(base, base.config), prompt, total)

    def _prepare_cache(self, full: torch.Tensor, copies: int, config: Any, kwargs: dict[str, Any]) -> None:
        cache = self._cache
        # the model must be given at least one token to have something to predict from
        cache.keep(min(cache.get_seq_length(), full.shape[1] - 1))
        drafted = kwargs.get("assistant_model") is not None or config.prompt_lookup_num_tokens is not None
        if drafted and cache.get_seq_length():
            # transformers feeds the whole prompt in the first round of assisted decoding, cache or no cache
            cache.reset()
        if copies > 1:
            cache.batch_repeat_interleave(copies)
            cache.expect_copies(copies)

    # -- afterwards ----------------------------------------------------------------------------------------------

    def _settle(self, sequences: torch.Tensor, mask: torch.Tensor | None, prompt: int, ends: list[int]) -> None:
        """Take over what was generated, and make rows and length of the caches fit it."""
        rows = sequences.shape[0]
        if mask is not None:
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
        real = _before_end(sequences[:, prompt:], ends)
        if mask is not None or not bool(real.all()):
            mask = torch.ones_like(sequences[:, :prompt], dtype=torch.bool) if mask is None else mask
            mask = torch.cat([mask, real], dim=1)
        self._tokens, self._mask = sequences.clone(), mask
        self._align_cache(sequences)

    def _settle_after_failure(
        self, before: torch.Tensor | None, full: torch.Tensor, mask: torch.Tensor | None, copies: int
    ) -> None:
        cached = self._cache.ids
        if copies == 1 and cached is not None and cached.shape[1] >= full.shape[1]:
            self._tokens = cached.clone()
            if mask is not None:
                new = torch.ones_like(cached[:, full.shape[1] :], dtype=torch.bool)
                self._mask = torch.cat([mask, new], dim=1)
        elif before is None:
            self._cache.reset()
        else:
            self._align_cache(before)

    def _align_cache(self, target: torch.Tensor) -> None:
        """Keep, for each row of ``target``, the cached row that begins most like it, as far as it is the same."""
        cache = self._cache
        cached = cache.ids
        if cached is None:
            cache.reset()
            return
        width = min(cached.shape[1], target.shape[1])
        groups = math.gcd(cached.shape[0], target.shape[0])
        each, wanted = cached.shape[0] // groups, target.shape[0] // groups
        chosen, same = [], width
        for row in range(target.shape[0]):
            first = row // wanted * each
            candidates = cached[first : first + each, :width]
            common = (candidates == target[row, :width]).long().cumprod(dim=1).sum(dim=1)
            best = int(common.argmax())
            # rows that go on as they are need no reordering: prefer the row of the same number
            if each == wanted and int(common[row % wanted]) == int(common[best]):
                best = row % wanted
            chosen.append(first + best)
            same = min(same, int(common[best]))
        cache.batch_select_indices(torch.tensor(chosen))
        cache.keep(same)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.closed:
            raise SessionError("this session is closed; open another with model.inference_session()")
        if not self._busy.acquire(blocking=False):
            raise SessionError("this session is generating already; wait for it, or use a second session")
        try:
            yield
        finally:
            self._busy.release()


class _WithoutHistory:
    """A streamer that is shown what is new in this call, not the whole conversation again."""

    def __init__(self, streamer: Any, held: int) -> None:
        self._streamer = streamer
        self._held = held
        self._first = True

    def put(self, value: torch.Tensor) -> None:
        if self._first:
            self._first = False
            value = value[..., self._held :]
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def _generation_config(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The generation config in force, as ``generate`` will put it together."""
    given = args[0] if args else kwargs.get("generation_config")
    config, _ = model._prepare_generation_config(
        given, **{k: v for k, v in kwargs.items() if k != "generation_config"}
    )
    return config


def _ends(config: Any) -> list[int]:
    ends = config.eos_token_id
    if ends is None:
        return []
    return [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]


def _before_end(new: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Which generated tokens are text: those up to and with a row's first end token. The rest is filling."""
    if not ends or new.shape[0] == 1:
        return torch.ones_like(new, dtype=torch.bool)
    ended = torch.isin(new, torch.tensor(ends)).long()
    return ended.cumsum(dim=1) - ended == 0


def _mask_of_padding(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
    """The mask that transformers infers for a prompt without one: padding is padding unless it also ends texts."""
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is None or pad == ends or (isinstance(ends, (list, tuple)) and pad in ends):
        return None
    return check_mask(ids != pad, *ids.shape)
