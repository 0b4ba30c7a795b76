"""What makes a transformers model distributed: a mixin in front of the architecture's own class.

The model keeps its embeddings, final norm and head; its list of layers holds one `RemoteLayers`. Everything else,
``generate`` with its samplers and searches included, is the architecture's own code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lora import Learned
from nbrunner.blocks.shadows import ShadowedLayers
from nbrunner.blocks.skeleton import Skeleton, layers_are_replaced
from nbrunner.client.blocks_view import RemoteBlocks
from nbrunner.client.edits import Edit, Positions, compile_edits
from nbrunner.client.head_ahead import HeadAhead
from nbrunner.client.inputs import check_hidden, check_ids, check_length, check_mask, planned_length, position_limit
from nbrunner.client.named_adapters import Offer, ServedAdapter
from nbrunner.client.remote import LayersCall, RemoteLayers, current
from nbrunner.client.remote_cache import RemoteCache, session_opener
from nbrunner.client.runner import BlockRunner, RunnerSession
from nbrunner.client.session_facade import Session
from nbrunner.client.speculation import Speculation
from nbrunner.errors import SessionError, UserInputError

if TYPE_CHECKING:
    from nbrunner.blocks.checkpoint import Checkpoint
    from nbrunner.client.connection import SwarmConnection
    from nbrunner.client.trace import Trace


ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")


class DistributedModel:
    """Methods and hooks that go in front of a transformers model class; see `attach`."""

    # not at run time: transformers evaluates the annotations of a model class, and takes its config class from them
    if TYPE_CHECKING:
        config: Any
        generation_config: Any
        device: torch.device
        nbrunner_skeleton: Skeleton
        nbrunner_checkpoint: Checkpoint

        def get_output_embeddings(self) -> Any: ...

    # -- use -----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> RemoteBlocks:
        """The model's blocks: ``len``, ``[i]`` and ``[a:b]`` give modules to call on hidden states."""
        base = self.nbrunner_skeleton.base
        width = getattr(base.get_input_embeddings(), "embedding_dim", None)
        width = getattr(base.config.get_text_config(decoder=True), "hidden_size", width)
        learned = self._layers.learned
        return RemoteBlocks(self.runner, 0, self.runner.num_blocks, dtype=base.dtype, width=width, learned=learned)

    @property
    def runner(self) -> BlockRunner:
        """Who runs the blocks."""
        runner = self._layers.runner
        if runner is None:
            raise SessionError("this model was closed; load it again with from_pretrained")
        return runner

    @property
    def swarm(self) -> SwarmConnection | None:
        """The swarm that runs the blocks; None when something else does."""
        return getattr(self.runner, "swarm", None)

    @property
    def _layers(self) -> RemoteLayers:
        layers = self.nbrunner_skeleton.remote
        if not isinstance(layers, RemoteLayers):
            raise TypeError(f"the skeleton was built with {type(layers).__name__} for its layers")
        return layers

    def path(self, path: Sequence[Any]) -> Any:
        """The model with other blocks: some left out, repeated, in another order, or with modules between them.

        Parameters
        ----------
        path
            Block numbers, ranges of them, ``model.blocks[a:b]``, and modules from [batch, tokens, hidden] to the
            same, which are trained like any other and are given no tokens of earlier steps.

        Returns
        -------
        PreTrainedModel
            Of this model's class, with the same embeddings, norm and head (not copies) and everything that this one
            can do. Each place of the path counts as a layer, in hidden states, edits and traces. A block that is
            repeated has caches of its own each time. Closing it leaves this model open.

        Raises
        ------
        UserInputError
            A path without blocks, or with blocks that there are not; one that parts blocks which hand each other
            more than a hidden state.

        Examples
        --------
        ::

            model.path([0, 1, 2, 5, 6, 6, 7]).generate(prompt, max_new_tokens=8)
            adapted = model.path([*range(4), adapter, *range(4, 8)])      # adapter: any torch.nn.Module
        """
        from nbrunner.client.path_model import path_of

        return path_of(self, path)

    @contextmanager
    def _editing(self, edits: Sequence[Edit]) -> Iterator[None]:
        before, current.edits = current.edits, tuple(edits)
        try:
            yield
        finally:
            current.edits = before

    @contextmanager
    def _adapting(self, named: Learned | str | None) -> Iterator[None]:
        """Use an adapter that servers have by name, for the calls inside."""
        if named is None:
            yield
            return
        before = current.named
        current.named = (self.runner, self._find_adapter(named) if isinstance(named, str) else named)
        try:
            yield
        finally:
            current.named = before

    def _find_adapter(self, name: str) -> Learned:
        find = getattr(self.runner, "find_adapter", None)
        if find is None:
            raise UserInputError("adapters are served by name in swarms only")
        found: Learned = find(name)
        return found

    def __call__(
        self, *args: Any, edits: Sequence[Edit] | None = None, adapter: str | None = None, **kwargs: Any
    ) -> Any:
        """The architecture's own forward; ``edits`` (see `nbrunner.Edit`) are made on the way.

        ``adapter`` names one that servers serve (see `adapters`); only they are used then.
        """
        if not edits and adapter is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self._editing(edits or ()), self._adapting(adapter):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def adapters(self) -> list[ServedAdapter]:
        """The adapters that servers serve by name now, each with who serves it."""
        served: Callable[[], list[ServedAdapter]] = getattr(self.runner, "served_adapters", list)
        return served()

    def offer_adapter(self, name: str) -> Offer:
        """Offer what is learned in this model now to everybody in the swarm, under a name.

        Servers that were started with ``--accept-adapters`` serve it until they stop or you withdraw it, signed
        with this client's key. What was offered under the same name by this client before is replaced.

        Parameters
        ----------
        name
            Letters, digits, ``_``, ``.`` and ``-``.

        Returns
        -------
        Offer
            Its uid, who took it, who did not and why, and which blocks are missing for anybody to use it.

        Raises
        ------
        UserInputError
            A name that cannot be, or no adapter is active.
        """
        offer = getattr(self.runner, "offer_adapter", None)
        learned = self._layers.learned()
        if offer is None or learned is None or learned.adapter.uid:
            raise UserInputError(
                "there is nothing to offer: no adapter of your own is active in this model "
                "(peft.get_peft_model(model, peft.LoraConfig(…)))"
            )
        if ADAPTER_NAME.fullmatch(name) is None:
            raise UserInputError(f"{name!r} cannot name an adapter: use letters, digits, '_', '.' and '-'")
        found: Offer = offer(name, learned.copied())
        return found

    def withdraw_adapter(self, uid: str) -> list[str]:
        """Have an adapter that this client offered served no longer; PeerIDs of the servers that let it go."""
        withdraw: Callable[[str], list[str]] | None = getattr(self.runner, "withdraw_adapter", None)
        return withdraw(uid) if withdraw is not None else []

    def inference_session(
        self, max_length: int | None = None, *, edits: Sequence[Edit] = (), adapter: str | None = None
    ) -> Session:
        """A session whose caches outlive one ``generate`` call.

        Parameters
        ----------
        max_length
            Refuse to grow beyond so many tokens. Sessions grow as needed: nothing is reserved.
        edits
            Made at every step of the session; positions count from its beginning (see `nbrunner.Edit`).
        adapter
            Of the servers', by name (see `adapters`).

        Examples
        --------
        ::

            with model.inference_session() as session:
                model.generate(prompt, max_new_tokens=8, session=session)
                model.generate(more, max_new_tokens=8, session=session)   # only `more` is computed
                session.position = 5                                      # back to the first five tokens
        """
        named = None if adapter is None else self._find_adapter(adapter)
        return Session(self, max_length, edits=edits, named=named)

    def new_cache(self) -> RemoteCache:
        """An empty cache on the servers, to pass as ``past_key_values``."""
        cache = RemoteCache(session_opener(self.runner), self.runner.num_blocks, planned_edits=current.edits)
        if current.caches is not None:
            current.caches.append(cache)
        return cache

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        session: Session | None = None,
        edits: Sequence[Edit] = (),
        adapter: str | None = None,
        speculate: str | int = "off",
        draft_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``generate``, with some arguments more.

        Parameters
        ----------
        inputs
            [batch, tokens] prompt. With a session: what is new; None to go on with what it holds.
        session
            From `inference_session`: its caches are used and kept. ``sequences`` are what was given in this call
            and what was generated; ``session.tokens`` is everything.
        edits
            Of hidden states, made at the prompt's tokens and, where they are not bound to positions of it, at all
            that is generated (see `nbrunner.Edit`).
        adapter
            Name or uid of an adapter that servers serve (see `adapters`). Only servers that have it are used.
        speculate
            Guess several tokens and have the chain check them in one trip: ``"auto"`` guesses as many as pay off,
            a number always so many. The text is the same; works for batches too, where all texts go on as far as
            the one that was guessed worst.
        draft_model
            A small model in this process, of the same vocabulary, that guesses; None looks the text up in itself.

        Raises
        ------
        UserInputError
            Before anything is sent: an empty prompt, tokens outside the vocabulary, a prompt longer than the model
            or the session takes.
        MissingBlocksError
            Nobody serves some blocks, for longer than the retry budget.
        """
        if not hasattr(super(), "generate"):
            raise UserInputError(
                f"{type(self).__name__} has no language-model head to generate with: load the model with "
                "AutoDistributedModelForCausalLM"
            )
        if speculate != "off":
            found = Speculation.of(self, speculate, draft_model, kwargs.get("streamer"))
            kwargs |= {"custom_generate": found} if found is not None else {}
        elif draft_model is not None:
            raise UserInputError("a draft model guesses for speculate='auto' or a number: give it too")
        if session is not None:
            if edits:
                raise UserInputError("a session's edits are given when it begins: model.inference_session(edits=…)")
            if adapter is not None:
                raise UserInputError(
                    "a session's adapter is given when it begins: model.inference_session(adapter=…)"
                )
            return session.generate(inputs, *args, **kwargs)
        with self._closing_caches() as keep, self._editing(edits), self._adapting(adapter):
            self._check_generate(inputs, args, kwargs)
            return keep(self._generate(inputs, *args, **kwargs))

    def trace(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        *,
        layers: Sequence[int] | None = None,
        positions: Positions = None,
        keep: Sequence[str] = ("norm", "similarity", "lens", "kl"),
        top_k: int = 5,
        tokens: Sequence[int | str] | None = None,
        edits: Sequence[Edit] = (),
        tokenizer: Any = None,
        limit: int = 256 << 20,
    ) -> Trace:
        """Run a text once, without caches, and look at its hidden states.

        Parameters
        ----------
        prompt
            One text, or its token ids.
        layers
            States to look at, rising, negative from the end; all by default. See `Trace` for their numbers.
        positions
            As in `Edit`; all by default.
        keep
            Some of ``norm``; ``similarity`` (cosine to the previous and to the last state); ``lens`` (most probable
            tokens and entropy); ``kl`` (of the prediction to the lens); ``hidden`` (the states themselves).
        top_k
            How many tokens of the lens.
        tokens
            Token ids, or texts of one token: also their probability and rank.
        edits
            Made in this run.
        tokenizer
            By default the one saved with the model.
        limit
            Bytes of states that may move; asking for more is refused before anything is sent.

        Raises
        ------
        UserInputError
            Before anything is sent.
        MissingBlocksError
        """
        from nbrunner.client.tracing import trace

        return trace(
            self,
            prompt,
            layers=layers,
            positions=positions,
            keep=keep,
            top_k=top_k,
            tokens=tokens,
            edits=edits,
            tokenizer=tokenizer,
            limit=limit,
        )

    def close(self) -> None:
        """Leave the swarm. The model cannot be used any more; its sessions are closed."""
        runner, self._layers.runner = self._layers.runner, None
        if runner is not None:
            runner.close()

    # -- set-up --------------------------------------------------------------------------------------------------

    def attach(self, runner: BlockRunner) -> None:
        """Connect the layers to who runs them. Once, after `nbrunner.blocks.skeleton.load_client_model`."""
        skeleton = self.nbrunner_skeleton
        self._layers.omits_positions = _counts_positions(skeleton)
        self._layers.runner = runner
        self._layers.head = HeadAhead.of(self)
        if isinstance(skeleton.layers, ShadowedLayers):
            self._layers.look_for_adapters(skeleton.layers)
        skeleton.base.register_forward_pre_hook(self._before_base, with_kwargs=True)
        skeleton.base.register_forward_hook(_after_base, with_kwargs=True, always_call=True)

    # -- around the outer model's forward ------------------------------------------------------------------------

    def _before_base(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        kwargs = {**_by_name(base, args), **kwargs}
        if layers_are_replaced():
            return (), kwargs  # a lens, perhaps in the middle of a pass whose states it is shown
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None:
            check_ids(ids, base.get_input_embeddings().num_embeddings)
        elif embeds is not None:
            check_hidden(embeds, embeds.dtype, None, name="inputs_embeds")
        entry = ids if ids is not None else embeds
        if entry is None:
            raise UserInputError("give the model input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise UserInputError("output_attentions is not available: attention weights stay on the servers")
        cache, implicit = self._cache_for(base, kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        edits = self._edits_for(cache, entry)
        capture = kwargs.get("output_hidden_states")
        if capture is None:
            capture = getattr(base.config, "output_hidden_states", False)
        call = LayersCall(
            cache=cache,
            cache_is_implicit=implicit,
            ids=ids,
            mask=check_mask(kwargs.get("attention_mask"), entry.shape[0], past + entry.shape[1]),
            positions=kwargs.get("position_ids"),
            capture=bool(capture),
            edits=edits,
        )
        if "output_hidden_states" in kwargs:
            kwargs["output_hidden_states"] = False  # ours come from the servers, see _after_base
        returns_dict = kwargs.get("return_dict")
        if returns_dict is None:
            returns_dict = getattr(base.config, "return_dict", True)
        if not returns_dict:
            kwargs["return_dict"] = True
        call.as_tuple = not returns_dict
        current.call = call
        return (), kwargs

    def _edits_for(self, cache: RemoteCache | None, entry: torch.Tensor) -> Edits | None:
        planned = current.edits if cache is None else cache.planned_edits
        if cache is not None:
            if current.edits and current.edits != cache.planned_edits:
                raise UserInputError("these caches were begun with other edits; begin new ones to change them")
            if cache.edits is not None:
                return cache.edits
        if not planned:
            return None
        edits = compile_edits(
            planned,
            tokens=entry.shape[1],
            num_blocks=self.runner.num_blocks,
            hidden_shape=self.nbrunner_skeleton.hidden_shape,
            rows=entry.shape[0] if cache is None else None,
        )
        if cache is not None:
            cache.edits = edits
        return edits

    def _cache_for(self, base: Any, kwargs: dict[str, Any]) -> tuple[RemoteCache | None, bool]:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if not isinstance(cache, RemoteCache):
                raise UserInputError(
                    f"past_key_values is a {type(cache).__name__}; the caches of this model are on servers: "
                    "pass what the model returned, or model.new_cache()"
                )
            return cache, False
        asked = kwargs.get("use_cache")
        wanted = asked if asked is not None else getattr(base.config, "use_cache", True)
        if not wanted or not self.nbrunner_skeleton.cached:
            return None, False
        cache = kwargs["past_key_values"] = self.new_cache()
        return cache, asked is None

    # -- around generate -----------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _check_generate(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None:
            return
        base = self.nbrunner_skeleton.base
        check_ids(ids, base.get_input_embeddings().num_embeddings)
        if kwargs.get("past_key_values") is None:
            check_mask(kwargs.get("attention_mask"), *ids.shape)
        given = args[0] if args else kwargs.get("generation_config")
        total = planned_length(self.generation_config, given, kwargs, ids.shape[1])
        check_length(*position_limit(base, base.config), ids.shape[1], total)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
            return
        if generation_config.use_cache is False or not self.nbrunner_skeleton.cached:
            return
        cache = model_kwargs["past_key_values"] = self.new_cache()
        cache.expect_copies(max(generation_config.num_beams, generation_config.num_return_sequences))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    @contextmanager
    def _closing_caches(self) -> Iterator[Any]:
        """Close the caches that come to be inside, but for one that the result hands on to the caller."""
        created: list[RemoteCache] = []
        outer, current.caches = current.caches, created
        kept: list[Any] = []

        def keep(result: Any) -> Any:
            kept.append(getattr(result, "past_key_values", None))
            return result

        try:
            yield keep
        finally:
            current.caches = outer
            for cache in created:
                if not any(cache is one for one in kept):
                    cache.close()


def _by_name(base: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    if not args:
        return {}
    return dict(zip(inspect.signature(base.forward).parameters, args, strict=False))


def _after_base(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    if layers_are_replaced():
        return output
    call, current.call = current.call, None
    if call is None or not hasattr(output, "keys"):
        return output
    if call.cache is not None:
        output["past_key_values"] = call.cache
    if call.captured is not None:
        output["hidden_states"] = (*call.captured, output.last_hidden_state)
    return output.to_tuple() if call.as_tuple else output


@torch.no_grad()
def _counts_positions(skeleton: Skeleton) -> bool:
    """Whether the architecture, left without position ids, counts on from what its cache holds.

    Bamba does not: it starts at 0 in every step. Found by comparing what the layers are given with and without.
    """
    if not skeleton.cached or "position_ids" not in skeleton.accepts:
        return False
    past, given = 3, []
    device = next(skeleton.base.parameters()).device
    layer = skeleton.layer
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    layer.probing = True
    try:
        for positions in (None, torch.tensor([[past]], device=device)):
            cache = RemoteCache(_no_session, skeleton.num_blocks, length=past)
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            skeleton.base(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    finally:
        layer.probing = False
        hook.remove()
    without, with_positions = given
    return _same_tensors(without, with_positions)


def _same_tensors(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_tensors(one[name], other[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same_tensors, one, other))
    return type(one) is type(other)


def _no_session(edits: Edits | None, adapter: SpanAdapter | None) -> RunnerSession:
    raise SessionError("a probe runs no blocks")
