"""Generation that streams, can be stopped, and says where its tokens come from.

transformers' ``generate`` is synchronous; here it runs in a thread of its own and hands its tokens to a `Handle`,
so that one call serves ``.result()``, ``await``, ``for``, ``async for`` and ``.cancel()``. It works with the
distributed models of nbrunner and with plain transformers models alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from nbrunner.client.choosing import BeamLog, Chooser
from nbrunner.client.detokenize import StreamingDecoder
from nbrunner.client.receipt import make_receipt, model_facts
from nbrunner.client.reroute import Reroute, reroutes
from nbrunner.client.result import Chain, Finish, Generation, Timings, Token
from nbrunner.client.sampling import Sampling
from nbrunner.client.speculation import Speculation
from nbrunner.client.step_times import StepTime, TokenTime, token_time
from nbrunner.errors import SessionError, UserInputError
from nbrunner.swarm.loop import EngineLoop, Handle
from nbrunner.swarm.routing import PlannedHop, explain

_END_GRACE = 5.0
"""Seconds to wait for the thread after a cancel; it ends at its next step, or at once when a remote step runs."""


class GenerationHandle(Handle[Generation]):
    """A running generation: ``.result()``, ``await``, ``for token in …``, ``async for``, ``.cancel()``.

    Iterating gives `Token` objects (``print(token, end="")`` prints their text).
    """

    def __init__(self, run: GenerationRun) -> None:
        self._run = run
        super().__init__(lambda _: run.stream(), lambda _: run.snapshot())

    @property
    def partial(self) -> Generation:
        """What there is so far; after a cancel, what there was."""
        return self._run.snapshot("cancelled" if self.future.cancelled() else None)


def start_generation(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | torch.Tensor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    beams: int = 1,
    min_new_tokens: int = 0,
    session: Any = None,
    speculate: str | int = "off",
    draft: Any = None,
) -> GenerationHandle:
    """Start generating and return at once.

    Parameters
    ----------
    model
        A model of `nbrunner`, or any causal language model of transformers.
    tokenizer
        Its tokenizer.
    prompt
        Text, or ids [n] or [1, n] int64. In a session, what is *added* to what the session holds.
    max_new_tokens, temperature, top_p, top_k, seed, beams, min_new_tokens
        See `Sampling`. ``seed=7`` samples what ``torch.manual_seed(7); model.generate(do_sample=True, ...)``
        would, without touching torch's global generator.
    session
        ``model.inference_session()`` to continue; it stays open.
    speculate, draft
        See ``generate`` of distributed models; ``"auto"`` does nothing for models in this process.

    Returns
    -------
    GenerationHandle
        ``.result()`` waits for the `Generation`; ``.cancel()`` stops within 0.3 s, remote work included.

    Raises
    ------
    UserInputError
        For an empty or too long prompt, or values that cannot be used; nothing was started.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, beams, min_new_tokens)
    run = GenerationRun(model, tokenizer, prompt, sampling, session=session, speculate=speculate, draft=draft)
    return GenerationHandle(run)


class GenerationRun:
    """One generation; `stream` runs it in the engine's event loop, `snapshot` shows it at any moment.

    Parameters are those of `start_generation`, and ``adapter``: one that servers serve by name, without a session.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str | Sequence[int] | torch.Tensor,
        sampling: Sampling,
        *,
        session: Any = None,
        speculate: str | int = "off",
        draft: Any = None,
        adapter: str | None = None,
    ) -> None:
        self._adapter = adapter
        self._speculation = _speculation(model, sampling, speculate, draft)
        self.sampling = sampling
        if sampling.temperature > 0 and sampling.seed is None:
            self.sampling = Sampling(**{**vars(sampling), "seed": secrets.randbits(32)})
        self._model, self._tokenizer, self._session = model, tokenizer, session
        self._facts, self._connection = model_facts(model), getattr(model, "swarm", None)
        self._held = int(session.tokens.shape[1]) if session is not None else 0
        self.prompt, self._ids = _encode(tokenizer, prompt, continues=self._held > 0)
        self._limit, self._capped = _room(model, self._held + self._ids.shape[1], sampling.max_new_tokens)
        self.tokens: list[Token] = []
        self._chains: list[Chain] = []
        self._times: list[TokenTime] = []
        self._reroutes: list[Reroute] = []
        self._ways: dict[Chain, list[float] | None] = {}
        self._running: Any = None
        self._step: StepTime | None = None
        self._lost_before = 0
        self._decoder = StreamingDecoder(tokenizer, self._ids[0].tolist())
        self._stop = threading.Event()
        self._ended = False
        self._generating = False
        self._generating_lock = threading.Lock()
        self._started = time.time()
        self._clock = time.perf_counter()
        self._total: float | None = None

    async def stream(self) -> AsyncIterator[Token]:
        """Run, and give the tokens as they come. Closing the iterator or cancelling the task stops the work."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        ended = asyncio.Event()

        def post(item: Token | BaseException | None) -> None:
            if item is None or isinstance(item, BaseException):
                ended.set()
            queue.put_nowait(item)

        def post_from_thread(item: Token | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: the process ends, nobody reads any more
                loop.call_soon_threadsafe(post, item)

        thread = threading.Thread(
            target=self._work, args=(post_from_thread,), name="nbrunner-generate", daemon=True
        )
        self._started, self._clock = time.time(), time.perf_counter()
        thread.start()
        try:
            while True:
                item = await queue.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()
            deadline = loop.time() + _END_GRACE
            while not ended.is_set() and loop.time() < deadline:
                with self._generating_lock:  # closing the session afterwards must not be cancelled
                    if self._generating:
                        EngineLoop.get().cancel_thread(thread)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), 0.05)

    def progress(self) -> Timings:
        """The timings so far; cheaper than a `snapshot`."""
        return Timings.of(tuple(self.tokens), started=self._started, total=time.perf_counter() - self._clock)

    @property
    def uid(self) -> str:
        """The model's uid in the swarm; empty for a model in this process."""
        return str(self._facts["uid"]) if self._connection is not None else ""

    @property
    def queued(self) -> str:
        """Where it waits for a server's memory just now, with place and estimate; empty if it does not."""
        return str(getattr(self._running, "queued", ""))

    @property
    def reroutes(self) -> tuple[Reroute, ...]:
        """Who failed so far and who took over, in the middle of a step too."""
        lost = list(getattr(self._running, "lost", ()))[self._lost_before :]
        if not lost:
            return tuple(self._reroutes)
        before = self._chains[-1] if self._chains else ()
        return (*self._reroutes, *reroutes(before, lost, _chain_of(self._running), token=len(self.tokens)))

    def snapshot(self, finish: Finish | None = None) -> Generation:
        """What there is now as a `Generation`; ``finish`` says why it ended, if not by itself."""
        tokens = tuple(self.tokens)
        lost = self.reroutes
        total = self._total if self._total is not None else time.perf_counter() - self._clock
        timings = Timings.of(tokens, started=self._started, total=total)
        chains = list(self._chains)
        finish = finish or self._finish(tokens)
        chain, earlier = (chains[-1], tuple(chains[:-1])) if chains else ((), ())
        return Generation(
            prompt=self.prompt,
            text="".join(token.text for token in tokens),
            tokens=tokens,
            prompt_tokens=self._ids.shape[1],
            finish=finish,
            timings=timings,
            chain=chain,
            earlier_chains=earlier,
            reroutes=lost,
            times=tuple(self._times),
            rounds=self._speculation.window.rounds if self._speculation is not None else 0,
            receipt=make_receipt(
                self._facts,
                self._connection,
                sampling=vars(self.sampling),
                chain=chain,
                earlier_chains=earlier,
                prompt_tokens=self._ids.shape[1],
                tokens=len(tokens),
                finish=finish,
                timings=timings,
                reroutes=lost,
            ),
        )

    def _finish(self, tokens: Sequence[Token]) -> Finish:
        if tokens and tokens[-1].id in _end_ids(self._model):
            return "stop"
        if len(tokens) >= self._limit:
            return "context" if self._capped else "length"
        return "stop" if self._ended else "cancelled"

    # -- in the thread -------------------------------------------------------------------------------------------

    def _work(self, post: Callable[[Token | BaseException | None], None]) -> None:
        end: BaseException | None = None
        try:
            with _session_lock(self._session):
                self._generate(post)
            self._ended = True
        except BaseException as error:  # noqa: BLE001 - raised again where the handle is waited for
            end = None if self._stop.is_set() else error
        self._total = time.perf_counter() - self._clock
        post(end)

    def _generate(self, post: Callable[[Token | BaseException | None], None]) -> None:
        if self._stop.is_set():
            return
        with contextlib.ExitStack() as stack:
            session = self._session
            if session is None and hasattr(self._model, "inference_session"):
                named = {} if self._adapter is None else {"adapter": self._adapter}
                session = stack.enter_context(self._model.inference_session(**named))
            self._running, self._lost_before = session, len(getattr(session, "lost", ()))
            stack.callback(self._forget_session)

            def emit(token: int, logprob: float) -> None:
                text = self._decoder.push(token)
                now = time.perf_counter()
                self._note_step(session, now)
                item = Token(token, text, logprob, now - self._clock)
                self.tokens.append(item)
                post(item)

            arguments: dict[str, Any] = {} if session is None else {"session": session}
            arguments["generation_config"] = self._generation_config()
            arguments["stopping_criteria"] = StoppingCriteriaList([_StopFlag(self._stop)])
            ids = self._ids.to(self._model.device)
            arguments["attention_mask"] = torch.ones_like(ids)
            stack.enter_context(self._cancellable())
            if self.sampling.beams > 1:
                log = BeamLog(self.sampling.beams * max(2, 1 + len(_end_ids(self._model))))
                output = self._model.generate(ids, logits_processor=LogitsProcessorList([log]), **arguments)
                for token, logprob in log.chosen(output, prompt_tokens=ids.shape[1]):
                    emit(token, logprob)
            else:
                chooser = Chooser(self.sampling)
                streamer = _Streamer(lambda token: emit(token, chooser.logprobs.popleft()))
                if self._speculation is not None:
                    self._speculation.streamer = streamer
                    arguments["custom_generate"] = self._speculation
                self._model.generate(
                    ids, logits_processor=LogitsProcessorList([chooser]), streamer=streamer, **arguments
                )

    @contextlib.contextmanager
    def _cancellable(self) -> Iterator[None]:
        self._generating = True
        try:
            yield
        finally:
            with self._generating_lock:
                self._generating = False

    def _generation_config(self) -> Any:
        config = copy.deepcopy(self._model.generation_config)
        config.max_new_tokens, config.max_length = self._limit, None
        config.min_new_tokens = min(self.sampling.min_new_tokens, self._limit) or None
        config.num_beams, config.num_return_sequences = self.sampling.beams, 1
        # Sampling happens in Chooser; transformers itself always takes the best score.
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        config.min_p = config.typical_p = None
        config.return_dict_in_generate = self.sampling.beams > 1
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(_end_ids(self._model)), 0)
        return config

    def _note_step(self, session: Any, now: float) -> None:
        """Keep who computed the token that has just come, what happened to them, and how long it took."""
        chain = _chain_of(session)
        told = self.reroutes
        replaced = len(told) > len(self._reroutes)
        self._reroutes, self._lost_before = list(told), len(getattr(session, "lost", ()))
        if chain and (not self._chains or self._chains[-1] != chain):
            self._chains.append(chain)
        step = getattr(session, "last_step", None)
        if step is None or step is self._step or self.sampling.beams > 1:
            return
        self._step = step
        if chain not in self._ways:
            self._ways[chain] = expected_ways(self._connection, self._facts["uid"], chain)
        asked = self._clock + (self.tokens[-1].seconds if self.tokens else 0.0)
        self._times.append(
            token_time(
                len(self.tokens),
                step,
                chain,
                asked=asked,
                emitted=now,
                ways=self._ways[chain],
                replaced=replaced,
            )
        )

    def _forget_session(self) -> None:
        self._reroutes = list(self.reroutes)  # what happened in a step that was not finished
        self._running = None


def _speculation(model: Any, sampling: Sampling, how: str | int, draft: Any) -> Speculation | None:
    if how == "auto":
        skeleton = getattr(model, "nbrunner_skeleton", None)
        if skeleton is None or not skeleton.cached or sampling.beams > 1:
            return None
    return Speculation.of(model, how, draft)


def expected_ways(connection: Any, model: str, chain: Chain) -> list[float] | None:
    """Seconds the directory expects of each way of a chain, and of the way back; None where it cannot say."""
    if connection is None or not chain:
        return None
    planned = [PlannedHop(*hop) for hop in chain]
    told = explain(connection.directory.view, model=model, start=chain[0][1], end=chain[-1][2], chain=planned)
    ways = [cost.network for cost in told.hops]
    return [*ways, told.back] if len(ways) == len(chain) else None


def _chain_of(session: Any) -> Chain:
    return tuple((str(peer), int(start), int(end)) for peer, start, end in getattr(session, "chain", ()))


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Gives every new token to a function; the first thing put is the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._on_token(token)

    def end(self) -> None:
        """Nothing is held back."""


class _StopFlag(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)


_session_locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _session_lock(session: Any) -> Iterator[None]:
    """One generation at a time in a session; the next waits until a cancelled one has left."""
    if session is None:
        yield
        return
    lock = _session_locks.setdefault(session, threading.Lock())
    if not lock.acquire(timeout=2 * _END_GRACE):
        raise SessionError("this session is busy with another generation; wait for it or cancel it first.")
    try:
        yield
    finally:
        lock.release()


def _encode(
    tokenizer: Any, prompt: str | Sequence[int] | torch.Tensor, *, continues: bool
) -> tuple[str, torch.Tensor]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserInputError("the prompt is empty: give some text to continue.")
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not continues).input_ids
        text = prompt
    else:
        ids = torch.as_tensor(prompt, dtype=torch.long)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != 1:
            raise UserInputError(f"ids must be [n] or [1, n]; their shape is {list(ids.shape)}.")
        text = str(tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)) if ids.numel() else ""
    if ids.shape[1] == 0:
        raise UserInputError("the prompt has no tokens: give some text to continue.")
    return text, ids


def _room(model: Any, used: int, wanted: int) -> tuple[int, bool]:
    """How many tokens may still come, and whether the model's context is what limits them."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return wanted, False
    if used >= context:
        raise UserInputError(
            f"the prompt is too long: {used} tokens, and this model's context has room for {context} "
            "together with the answer. Shorten it, or start a new session."
        )
    return min(wanted, context - used), context - used < wanted


def _end_ids(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset(end if isinstance(end, (list, tuple)) else [end])
