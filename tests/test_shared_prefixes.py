"""Sessions that hold the same first tokens together: addresses, frozen tokens, and what each of them computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import torch
from client_models import save_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.checks import small_enough
from parity.families import names, tiny_config

from nbrunner.blocks import batching, prefix_attention
from nbrunner.blocks.batching import Batcher, Joining, SpanStep
from nbrunner.blocks.batching_probe import choose_joining
from nbrunner.blocks.cache import PAGE_TOKENS, ForkedLayer, SpanCache
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.prefix_attention import KeysInPieces
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import NBRunnerError
from nbrunner.protocol.adapters import AdapterUse
from nbrunner.protocol.edits import EditOp
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.sessions import OpenSession
from nbrunner.protocol.steps import CacheOp, Hop, Step
from nbrunner.protocol.tensors import pack
from nbrunner.server.content import Content
from nbrunner.server.host import can_share_prefixes
from nbrunner.server.quotas import Quotas
from nbrunner.server.session_memory import SHARED_TOKENS, FrozenBytes, SessionMemory

# -- addresses -----------------------------------------------------------------------------------------------------

WIDTH = 6
EMPTY = Content(b"seed")


def tokens(count: int, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def part(position: int, hidden: torch.Tensor, **more: torch.Tensor) -> tuple[Step, dict[str, RawTensor]]:
    end = position + hidden.shape[1]
    step = Step(1, 1, position, end, position, [Hop("peer", "0" * 32, 0, 1)])
    return step, {name: pack(name, tensor) for name, tensor in {"hidden": hidden, **more}.items()}


def content_of(hidden: torch.Tensor, cuts: Sequence[int] = (), begin: Content = EMPTY, **more: Any) -> Content:
    """Of tokens that come in parts."""
    ends = sorted({*cuts, hidden.shape[1]})
    for first, last in itertools.pairwise([0, *ends]):
        found = begin.followed_by(*part(first, hidden[:, first:last], **more))
        assert found is not None
        begin = found
    return begin


@given(
    common=st.integers(0, 70),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    rows=st.integers(1, 3),
    cuts=st.tuples(*[st.lists(st.integers(1, 30), max_size=3)] * 2),
)
def test_addresses_tell_how_much_is_common_however_it_came(common: int, ends: Any, rows: int, cuts: Any) -> None:
    both = tokens(common, rows=rows)
    one, other = (
        content_of(
            torch.cat([both, tokens(1 + more, rows=rows, seed=1 + index)], 1),
            [cut for cut in cuts[index] if cut <= common + more],
        )
        for index, more in enumerate(ends)
    )
    assert one.common(other) == other.common(one) == common // PAGE_TOKENS * PAGE_TOKENS


def test_everything_that_outputs_depend_on_is_in_the_address() -> None:
    hidden = tokens(48)
    plain = content_of(hidden)
    assert plain.common(content_of(hidden)) == 48
    assert plain.common(content_of(hidden, positions=torch.arange(48)[None])) == 0
    shifted = content_of(hidden, positions=torch.arange(1, 49)[None])
    assert shifted.common(content_of(hidden, positions=torch.arange(48)[None])) == 0
    assert plain.common(content_of(hidden.double().to(torch.bfloat16))) == 0
    assert plain.common(content_of(hidden.reshape(1, 48, 2, 3))) == 0
    assert plain.common(content_of(torch.cat([hidden, hidden]))) == 0
    carried = content_of(hidden, **{"carry.1": tokens(48, seed=3)})
    assert carried.common(content_of(hidden, **{"carry.1": tokens(48, seed=4)})) == 0
    assert plain.common(content_of(hidden, mask=torch.ones(1, 48, dtype=torch.bool))) == 48


def test_sessions_that_are_opened_otherwise_have_nothing_in_common() -> None:
    opened = OpenSession("0" * 32, "model", 0, 4)
    vector = {"edit.0": pack("edit.0", tokens(1)[0, 0])}
    other = {"edit.0": pack("edit.0", tokens(1, seed=1)[0, 0])}
    ways = [
        Content.of_session("me", opened, {}),
        Content.of_session("you", opened, {}),
        Content.of_session("me", msgspec.structs.replace(opened, end=3), {}),
        Content.of_session("me", msgspec.structs.replace(opened, adapter=AdapterUse(["a" * 64])), {}),
        Content.of_session("me", msgspec.structs.replace(opened, edits=[EditOp("zero", 1)]), {}),
        Content.of_session("me", opened, vector),
        Content.of_session("me", opened, other),
    ]
    assert len({way.seed for way in ways}) == len(ways)
    again = msgspec.structs.replace(opened, session="1" * 32, upstream="peer", wait=True)
    assert Content.of_session("me", again, {}).seed == ways[0].seed
    addressed = [content_of(tokens(32), begin=way) for way in ways]
    for one, two in itertools.combinations(addressed, 2):
        assert one.common(two) == 0


def test_what_cannot_be_addressed_is_not() -> None:
    hidden = tokens(40)
    held = content_of(hidden)
    padded = torch.ones(1, 80, dtype=torch.bool)
    padded[0, 3] = False
    assert held.followed_by(*part(41, hidden)) is None  # a gap
    assert held.followed_by(*part(0, hidden)) is None  # nothing new
    assert held.followed_by(*part(40, hidden, mask=padded)) is None
    assert held.followed_by(*part(40, hidden, mask=padded[:, :50])) is None
    assert held.followed_by(*part(40, hidden, mask=padded.long())) is None
    assert held.followed_by(*part(40, hidden, positions=torch.arange(9)[None])) is None
    assert held.followed_by(*part(40, hidden, positions=torch.arange(40))) is None
    assert held.followed_by(*part(40, hidden, **{"carry.1": tokens(3)})) is None
    assert held.followed_by(*part(40, tokens(9, rows=2))) is None
    overlapping = held.followed_by(*part(24, torch.cat([hidden[:, 24:], tokens(9, seed=5)], 1)))
    assert overlapping is not None
    assert overlapping.common(content_of(torch.cat([hidden, tokens(9, seed=5)], 1))) == 48


def test_after_a_rollback_only_what_is_left_counts() -> None:
    held = content_of(tokens(64))
    cropped = held.after([CacheOp("crop", 40)])
    assert held.common(cropped) == 32
    assert cropped.followed_by(*part(40, tokens(9))) is None
    assert cropped.after([CacheOp("crop", 16)]).common(held) == 16
    assert held.after([CacheOp("crop", 64)]) is held
    assert held.after([CacheOp("reset")]) == EMPTY
    for op in (CacheOp("select", rows=[0, 0]), CacheOp("repeat", 2)):
        assert held.after([op]).common(held) == 0
        assert held.after([op], kept=50).common(held) == 48


# -- sessions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    folder = tmp_path_factory.mktemp("llama")
    save_plain("llama", folder)
    torch.set_num_threads(1)
    return BlockSpan.load(resolve_checkpoint(folder), 0, 4, dtype="float32")


@pytest.fixture(scope="module")
def batcher(span: BlockSpan) -> Batcher:
    return Batcher(span, choose_joining(span))


def states(span: BlockSpan, ids: Sequence[int], rows: int = 1) -> torch.Tensor:
    """``[rows, tokens, width]``, the same for the same ids."""
    table = torch.randn(8, *span.hidden_shape, generator=torch.Generator().manual_seed(7))
    return table[list(ids)][None].expand(rows, -1, -1).contiguous()


@dataclass
class Twice:
    """One session, sharing what it can with others, and by itself."""

    span: BlockSpan
    frozen: FrozenBytes
    others: list[Twice]
    memory: SessionMemory = field(init=False)
    alone: SpanCache = field(init=False)
    outputs: torch.Tensor | None = None
    rows: int = 1
    adopted: int = 0

    def __post_init__(self) -> None:
        caches = [self.span.new_cache() for _ in range(2)]
        assert caches[0] is not None
        assert caches[1] is not None
        self.memory, self.alone = SessionMemory(caches[0], EMPTY, self.frozen, "peer"), caches[1]
        self.others.append(self)

    @property
    def length(self) -> int:
        return self.alone.length

    def take_over(self, hidden: torch.Tensor) -> Content | None:
        """As the server does before it computes a part."""
        content = self.memory.content
        if content.tokens != self.length or hidden.shape[1] < SHARED_TOKENS:
            return None
        following = content.followed_by(*part(self.length, hidden))
        assert following is not None
        others = [one for one in self.others if one is not self]
        best = max(others, key=lambda one: following.common(one.memory.content), default=None)
        if best is not None:
            common = following.common(best.memory.content)
            if common > self.length and common >= SHARED_TOKENS:
                self.memory.start_like(best.memory, common)
                self.adopted = common
        return following

    def begin(self, ids: Sequence[int]) -> tuple[SpanStep, torch.Tensor, Content | None]:
        if not self.length:
            self.rows = 1
        hidden = states(self.span, ids, self.rows)
        following, before = self.take_over(hidden), self.length
        right = self.span.forward(hidden, cache=self.alone).hidden
        self.outputs = right if self.outputs is None or not before else torch.cat([self.outputs, right], 1)
        left = hidden[:, self.memory.transcript.length - before :]
        return SpanStep(left, self.memory.cache), right, following

    def finish(self, output: torch.Tensor | None, following: Content | None) -> None:
        if output is not None:
            self.memory.transcript.append({"hidden": output})
        if following is not None:
            self.memory.content = following
        self.check()

    def apply(self, op: CacheOp) -> None:
        shared, freezing = self.memory.expected([op])
        before = self.frozen.nbytes()
        self.memory.apply(op)
        assert self.memory.cache.prefix.tokens == shared
        assert (self.frozen.nbytes() > before) == (freezing > 0)
        if op.kind == "reset" or (op.kind == "crop" and not op.count):
            self.alone.reset()
            self.outputs = None
        elif self.length and self.outputs is not None:
            if op.kind == "crop":
                self.alone.crop(max(self.length - op.count, 0))
                self.outputs = self.outputs[:, : op.count]
            else:
                each = torch.arange(self.rows)
                rows = torch.tensor(op.rows) if op.kind == "select" else each.repeat_interleave(op.count)
                self.alone.select(rows)
                self.outputs, self.rows = self.outputs[rows], len(rows)
        self.check()

    def check(self) -> None:
        memory = self.memory
        assert memory.cache.length == memory.transcript.length == self.length
        assert memory.cache.get_seq_length() == self.length
        if self.length and self.outputs is not None:
            assert memory.cache.batch_rows == self.alone.batch_rows == self.rows
            for begin in {0, self.length // 3, max(self.length - 1, 0)}:
                window = memory.transcript.window(begin, self.length)["hidden"]
                torch.testing.assert_close(window, self.outputs[:, begin:], rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(memory.cache.layers, self.alone.layers, strict=True):
                torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def run(batcher: Batcher, begun: Sequence[tuple[Twice, tuple[SpanStep, torch.Tensor, Content | None]]]) -> None:
    steps = [step for _, (step, _, _) in begun if step.tokens]
    found = iter(batcher.forward(steps))
    for session, (step, right, following) in begun:
        output = next(found) if step.tokens else None
        assert not isinstance(output, Exception), output
        if output is not None:
            torch.testing.assert_close(output.hidden, right[:, -step.tokens :], rtol=1e-4, atol=1e-5)
        session.finish(None if output is None else output.hidden, following)


# few different prompts, so that sessions often begin alike; ids of later parts too
prompts = st.tuples(st.sampled_from([0, 1]), st.integers(1, 90))
actions = st.one_of(
    st.tuples(st.just("open"), st.lists(prompts, min_size=1, max_size=3)),
    st.tuples(st.just("open"), st.lists(prompts, min_size=1, max_size=1)),
    st.tuples(st.just("more"), prompts),
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("crop"), st.integers(0, 100)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("reset"), st.none()),
    st.tuples(st.just("close"), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(schedule=st.lists(st.tuples(st.integers(0, 4), actions), min_size=3, max_size=14), joined=st.booleans())
@torch.inference_mode()
def test_any_schedule_gives_what_each_session_gives_alone(
    schedule: Any, joined: bool, span: BlockSpan, batcher: Batcher
) -> None:
    frozen, sessions = FrozenBytes(), []
    session: Twice | None = None
    together = batcher if joined else Batcher(span, Joining())
    for which, (kind, value) in schedule:
        if kind == "open":
            session = Twice(span, frozen, sessions)
            for number, count in value:
                run(together, [(session, session.begin(_ids(number, count)))])
            continue
        if not sessions:
            continue
        session = sessions[which % len(sessions)]
        if kind == "close":
            sessions.remove(session)
        elif kind == "more":
            run(together, [(session, session.begin(_ids(*value)))])
        elif kind == "decode":
            for step in range(value):
                run(together, [(one, one.begin([step])) for one in sessions])
        elif kind in ("crop", "reset"):
            session.apply(CacheOp(kind, value or 0))
        elif session.length and session.rows * (value if kind == "repeat" else 1) <= 6:
            rows = [row % session.rows for row in value] if kind == "select" else []
            session.apply(CacheOp(kind, 0 if rows else value, rows) if rows else CacheOp(kind, value))
    sessions.clear()
    session = None
    assert frozen.nbytes() == 0


def _ids(number: int, count: int) -> list[int]:
    return [(number + position) % 7 for position in range(count)]


@pytest.fixture
def three(span: BlockSpan, batcher: Batcher) -> Iterator[tuple[FrozenBytes, list[Twice]]]:
    """Sessions with 96 tokens in common, and a few of their own."""
    frozen, sessions = FrozenBytes(), []
    with torch.inference_mode():
        for number in range(3):
            session = Twice(span, frozen, sessions)
            run(batcher, [(session, session.begin([*_ids(0, 96), number, number]))])
        yield frozen, sessions


def total(frozen: FrozenBytes, sessions: Sequence[Twice]) -> int:
    return frozen.nbytes() + sum(session.memory.nbytes for session in sessions)


def test_bytes_are_held_once(three: Any, span: BlockSpan) -> None:
    frozen, sessions = three
    storages: dict[int, int] = {}
    for session in sessions:
        pieces = session.memory.cache.prefix.pieces
        assert [piece.tokens for piece in pieces] == [96]
        held = [*pieces[0].frozen.outputs.values(), *session.memory.transcript._held[1].values()]
        held += [tensor for pair in pieces[0].frozen.layers.values() for tensor in pair]
        held += list(session.memory.cache._tensors())
        storages |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == total(frozen, sessions)
    by_themselves = sum(session.alone.nbytes() for session in sessions)
    outputs = 3 * 112 * span.hidden_shape[0] * 4
    assert total(frozen, sessions) < 0.6 * (by_themselves + outputs)


def test_bytes_count_for_their_peer(three: Any) -> None:
    frozen, _ = three
    quotas = Quotas(Limits(cache_bytes=1 << 20, peer_cache_bytes=1 << 20), more=frozen.nbytes)
    held = frozen.nbytes()
    assert held == frozen.nbytes("peer") == quotas.bytes_used == quotas.bytes_of_peer("peer") > 0
    assert frozen.nbytes("another") == quotas.bytes_of_peer("another") == 0
    assert quotas.bytes_left == (1 << 20) - held
    assert not quotas.peer_may_have("peer", "session", (1 << 20) - held + 1)
    assert quotas.peer_may_have("another", "session", 1 << 20)


def test_reordering_beams_copies_nothing_of_the_prompt(three: Any, batcher: Batcher) -> None:
    frozen, sessions = three
    session = sessions[0]
    session.apply(CacheOp("repeat", 4))
    held, prompt = frozen.nbytes(), [piece.frozen for piece in session.memory.cache.prefix.pieces]
    for _ in range(3):
        run(batcher, [(session, session.begin([5]))])
        session.apply(CacheOp("select", rows=[2, 2, 0, 1]))
    assert [piece.frozen for piece in session.memory.cache.prefix.pieces] == prompt
    assert frozen.nbytes() == held
    layers = [layer for layer in session.memory.cache.layers if isinstance(layer, ForkedLayer)]
    assert all(layer._keys is not None and layer._keys.shape[2] <= PAGE_TOKENS for layer in layers)


def test_a_rollback_into_the_common_part_leaves_the_others_alone(three: Any, batcher: Batcher) -> None:
    _, sessions = three
    first, second, _ = sessions
    first.apply(CacheOp("crop", 50))
    run(batcher, [(first, first.begin([6, 6, 6]))])
    run(batcher, [(one, one.begin([3])) for one in sessions])
    second.apply(CacheOp("reset"))
    run(batcher, [(second, second.begin(_ids(0, 64)))])
    assert second.adopted == 64
    run(batcher, [(one, one.begin([4])) for one in sessions])


def test_a_step_that_finds_no_memory_to_freeze_changes_nothing(
    three: Any, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, sessions = three
    first, before = sessions[0], frozen.nbytes()

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(ForkedLayer, "behind", full)
    with pytest.raises(MemoryError):
        first.memory.freeze(first.length)
    monkeypatch.undo()
    first.check()
    assert frozen.nbytes() == before
    run(batcher, [(one, one.begin([3])) for one in sessions])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt#350m", "qwen2_moe", "qwen3", "granite", "phi", "olmo2"])
@torch.inference_mode()
def test_attention_in_pieces_is_attention(family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces, one of them common to all rows, and tokens of their own; by itself and together with another."""
    save_plain(family, tmp_path)
    span = BlockSpan.load(resolve_checkpoint(tmp_path), 0, 4, dtype="float32")
    batcher = Batcher(span, choose_joining(span))
    assert batcher.layout == "packed"
    monkeypatch.setattr(batching, "LONG_TOKENS", 40)
    attended: list[int] = []
    attend = KeysInPieces.attend
    monkeypatch.setattr(KeysInPieces, "attend", lambda *args: attended.append(len(args[0].parts)) or attend(*args))
    prompt = torch.randn(1, 40, *span.hidden_shape)
    others = torch.randn(1, 20, *span.hidden_shape)
    caches = [span.new_cache() for _ in range(4)]
    for cache in caches[:2]:
        assert cache is not None
        span.forward(prompt, cache=cache)
        if cache is caches[0]:
            cache.freeze(24, {})
            cache.freeze(40, {})
        cache.repeat(3)
    for cache in caches[2:]:
        span.forward(others, cache=cache)
    for together in (False, True, False, True):
        hidden, other = torch.randn(3, 1, *span.hidden_shape), torch.randn(1, 1, *span.hidden_shape)
        places = torch.tensor([[caches[1].length]])
        steps = [SpanStep(hidden, caches[0], position_ids=places)]
        if together:
            steps.append(SpanStep(other, caches[2], position_ids=torch.tensor([[caches[2].length]])))
            right = span.forward(other, cache=caches[3], position_ids=torch.tensor([[caches[3].length]])).hidden
        attended.clear()
        found = batcher.forward(steps)
        assert attended == [3] * 4
        expected = span.forward(hidden, cache=caches[1], position_ids=places).hidden
        torch.testing.assert_close(found[0].hidden, expected, rtol=1e-4, atol=1e-5)
        if together:
            torch.testing.assert_close(found[1].hidden, right, rtol=1e-4, atol=1e-5)
        for cache in caches[:2]:
            cache.select([2, 0, 0])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@torch.inference_mode()
def test_all_families_that_share_compute_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "LONG_TOKENS", 30)
    shared, different = 0, {}
    for name in names():
        folder = tmp_path / name
        folder.mkdir()
        try:
            if not small_enough(tiny_config(name)):
                continue
            save_plain(name, folder)
            checkpoint = resolve_checkpoint(folder)
            span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32")
        except (NBRunnerError, TypeError, ValueError, AttributeError, ImportError, LookupError, RuntimeError):
            continue  # what cannot be run at all is for tests/test_parity.py
        batcher = Batcher(span, choose_joining(span))
        if not can_share_prefixes(span, batcher):
            continue
        shared += 1
        difference = _difference_of_sharing(span, batcher)
        if difference > 1e-5:
            different[name] = difference
    assert different == {}
    assert shared >= 60


def _difference_of_sharing(span: BlockSpan, batcher: Batcher) -> float:
    """Of a prompt whose first 32 tokens are frozen, then two rows: relative to the largest number."""
    ours, theirs = span.new_cache(), span.new_cache()
    assert ours is not None
    assert theirs is not None
    prompt, worst = torch.randn(1, 36, *span.hidden_shape), 0.0
    for cache in (ours, theirs):
        span.forward(prompt, cache=cache)
        if cache is ours:
            cache.freeze(32, {})
        cache.repeat(2)
    for tokens in (2, 1, 1):
        hidden = torch.randn(2, tokens, *span.hidden_shape)
        places = torch.arange(theirs.length, theirs.length + tokens)[None]
        (found,) = batcher.forward([SpanStep(hidden, ours, position_ids=places)])
        assert not isinstance(found, Exception), found
        right = span.forward(hidden, cache=theirs, position_ids=places).hidden
        worst = max(worst, float((found.hidden - right).abs().max() / right.abs().max()))
        ours.select([1, 1])
        theirs.select([1, 1])
    return worst


def test_without_torchs_operator_keys_are_put_together(span: BlockSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> Any:
        raise AttributeError

    def wrong(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return query, query[..., 0]

    for broken in (gone, wrong):
        prefix_attention._works.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(prefix_attention, "_attend", broken)
            assert not prefix_attention._works(torch.float32)
            assert not Batcher(span)._in_pieces
        prefix_attention._works.cache_clear()
    assert Batcher(span)._in_pieces


@pytest.mark.parametrize(
    ("family", "shares"),
    [("llama", True), ("gpt2", True), ("mistral", False), ("qwen3_next", False), ("llama#dynamic_rope", False)],
)
def test_only_full_attention_shares(family: str, shares: bool, tmp_path: Any) -> None:
    save_plain(family, tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks)
    assert can_share_prefixes(span, Batcher(span)) is shares
    cache = SpanCache(tiny_config(family), range(2), start=0, end=2)
    assert cache.shareable is (shares or "rope" in family)
