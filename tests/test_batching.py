"""Steps of several sessions in one pass give what each of them gives alone. All families: `make test-all`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.__main__ import quiet
from parity.checks import TOLERANCE, save_plain, small_enough
from parity.families import REPRESENTATIVE, in_this_release, names, tiny_config

from nbrunner.blocks.adapters import BlockAdapter, Lora, SpanAdapter
from nbrunner.blocks.batching import Batcher, Joining, Layout, SpanStep
from nbrunner.blocks.batching_probe import choose_joining
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import UnsupportedModelError
from nbrunner.protocol.edits import EditOp

LAYOUTS = {
    "bloom": "padded",
    "deepseek_v3": "concat",
    "falcon#alibi": "padded",
    "gemma3_text": "packed",
    "gpt2": "packed",
    "hy_v4": "serial",
    "llama#dynamic_rope": "packed",
    "longcat_flash": "concat",
    "mixtral": "packed",
    "opt#350m": "packed",
    "qwen3_next": "padded",
    "zaya": "padded",
}


@pytest.fixture(autouse=True)
def _one_thread_and_no_reports() -> None:
    quiet()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., BlockSpan]:
    def load(name: str, dtype: str = "float32") -> BlockSpan:
        torch.manual_seed(0)
        save_plain(tiny_config(name), tmp_path)
        checkpoint = resolve_checkpoint(tmp_path)
        return BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype=dtype)

    return load


@dataclass
class Conversation:
    """One session twice: joined with others, and alone."""

    span: BlockSpan
    rows: int = 1
    left: int = 0
    adapter: SpanAdapter | None = None
    edits: Edits | None = None
    collect: bool = False
    says_positions: bool = True
    caches: list[Any] = field(init=False)
    length: int = 0

    def __post_init__(self) -> None:
        self.caches = [self.span.new_cache(), self.span.new_cache()]

    def steps(self, tokens: int) -> list[SpanStep]:
        hidden = torch.randn(self.rows, tokens, *self.span.hidden_shape)
        self.length += tokens
        mask = positions = None
        if self.left:
            mask = torch.ones(self.rows, self.length, dtype=torch.bool)
            mask[0, : self.left] = False
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        elif self.says_positions:
            positions = torch.arange(self.length - tokens, self.length)[None]
        return [
            SpanStep(
                hidden,
                cache,
                mask,
                positions,
                collect=self.collect,
                edits=self.edits,
                adapter=self.adapter,
            )
            for cache in self.caches
        ]

    def each(self, operation: Callable[[Any], None]) -> None:
        for cache in self.caches:
            operation(cache)


def alone(span: BlockSpan, step: SpanStep) -> Any:
    return span.forward(
        step.hidden,
        cache=step.cache,
        attention_mask=step.attention_mask,
        position_ids=step.position_ids,
        collect=step.collect,
        edits=step.edits,
        adapters=step.adapter,
    )


def advance(batcher: Batcher, conversations: list[Conversation], tokens: list[int]) -> float:
    """One step of each, joined and alone; the largest difference, relative to the largest number."""
    pairs = [one.steps(count) for one, count in zip(conversations, tokens, strict=True)]
    worst = 0.0
    joined = batcher.forward([ours for ours, _ in pairs])
    for (ours, theirs), outcome, one in zip(pairs, joined, conversations, strict=True):
        assert not isinstance(outcome, Exception), outcome
        right = alone(batcher.span, theirs)
        assert outcome.hidden.shape == right.hidden.shape
        assert len(outcome.collected) == len(right.collected)
        assert outcome.carry.keys() == right.carry.keys()
        assert ours.cache.length == theirs.cache.length == one.length
        visible = slice(None)
        if theirs.attention_mask is not None:
            visible = theirs.attention_mask[:, -theirs.tokens :]
        tensors = [
            (outcome.hidden, right.hidden),
            *zip(outcome.collected, right.collected, strict=True),
            *((outcome.carry[part], right.carry[part]) for part in right.carry),
        ]
        for mine, other in tensors:
            difference = (mine[visible].float() - other[visible].float()).abs().max()
            worst = max(worst, float(difference / other[visible].float().abs().max()))
    return worst


def compare(span: BlockSpan, joining: Joining) -> float:
    """Four sessions of different lengths, one padded on the left, one with beams, through mixed steps."""
    batcher = Batcher(span, joining)
    conversations = [
        Conversation(span),
        Conversation(span, says_positions=False),
        Conversation(span, rows=2, left=4),
        Conversation(span, rows=3),
    ]
    worst = advance(batcher, conversations, [5, 13, 9, 3])
    for turn in range(10):
        worst = max(worst, advance(batcher, conversations, [1, 1, 1, 1] if turn % 3 else [1, 4, 1, 2]))
        if turn == 4:
            conversations[3].each(lambda cache: cache.select([2, 0]))
            conversations[3].rows = 2
        if turn == 6 and all(cache.croppable for cache in conversations[0].caches):
            conversations[0].each(lambda cache: cache.crop(3))
            conversations[0].length -= 3
    return worst


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_joined_steps_are_those_of_each_session_alone(name: str, load: Callable[..., BlockSpan]) -> None:
    if not in_this_release(name):
        pytest.skip(f"no {name} in this release of transformers")
    span = load(name)
    joining = choose_joining(span)
    assert joining.layout == LAYOUTS[name]
    assert compare(span, joining) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_joined_steps_of_all_families(tmp_path: Path) -> None:
    different, layouts = {}, []
    for name in names():
        folder = tmp_path / name
        folder.mkdir()
        try:
            config = tiny_config(name)
            if not small_enough(config):
                continue
            torch.manual_seed(0)
            save_plain(config, folder)
            checkpoint = resolve_checkpoint(folder)
            span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32")
        except (
            UnsupportedModelError,
            TypeError,
            ValueError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
        ):
            continue  # what cannot be run at all is for tests/test_parity.py
        if span.new_cache() is None:
            continue
        joining = choose_joining(span)
        layouts.append(joining.layout)
        difference = compare(span, joining)
        if TOLERANCE < difference <= 10 * TOLERANCE:  # rounding that many layers have blown up is none in float64
            exact = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float64")
            difference = compare(exact, joining)
        if not difference <= TOLERANCE:
            different[name] = (joining.layout, difference)
    assert not different
    assert sum(layout != "serial" for layout in layouts) >= 100, layouts


def adapter(span: BlockSpan, names: tuple[str, ...], seed: int) -> SpanAdapter:
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for block in range(span.start, span.end):
        modules = {}
        for name in names:
            inputs, outputs = span.linears(block)[name]
            a = torch.randn(4, inputs, generator=generator)
            b = torch.randn(outputs, 4, generator=generator)
            modules[name] = (Lora(a, b, 0.1),)
        blocks[block] = BlockAdapter(modules, torch.randn(3, *span.hidden_shape, generator=generator))
    return SpanAdapter(blocks)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ("self_attn.q_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_attn", "mlp.c_fc")),
        ("bloom", ("self_attention.query_key_value",)),
        ("deepseek_v3", ("self_attn.kv_b_proj",)),  # is given all keys, not the tokens of the pass: runs alone
    ],
)
def test_each_session_keeps_its_own_adapter_edits_and_captures(
    name: str, modules: tuple[str, ...], load: Callable[..., BlockSpan]
) -> None:
    span = load(name)
    batcher = Batcher(span, choose_joining(span))
    width = span.hidden_shape
    edits = Edits(
        (EditOp("add", 1, 0, None, vector=0), EditOp("scale", 2, 3, 6, factor=0.5)), {0: torch.randn(*width)}
    )
    conversations = [
        Conversation(span, adapter=adapter(span, modules, 1)),
        Conversation(span, rows=2, adapter=adapter(span, modules, 2), collect=True),
        Conversation(span, edits=edits, collect=True),
        Conversation(span, rows=2, left=2, edits=edits, adapter=adapter(span, modules, 3)),
        Conversation(span),
    ]
    worst = advance(batcher, conversations, [4, 6, 3, 5, 7])
    for _ in range(4):
        worst = max(worst, advance(batcher, conversations, [1] * 5))
    assert worst <= TOLERANCE
    joined = {batcher.key(one.steps(1)[0]) for one in conversations}
    assert len(joined) == (2 if name == "deepseek_v3" else 1)


def test_a_wrong_layout_is_noticed(load: Callable[..., BlockSpan]) -> None:
    """The comparison can fail: bloom's alibi needs the columns of the padded batch."""
    span = load("bloom")
    batcher = Batcher(span, Joining("packed"))
    conversations = [Conversation(span), Conversation(span)]
    pairs = [one.steps(count) for one, count in zip(conversations, [3, 6], strict=True)]
    outcomes = batcher.forward([ours for ours, _ in pairs])
    for outcome, (_, theirs) in zip(outcomes, pairs, strict=True):
        right = alone(span, theirs).hidden
        assert isinstance(outcome, Exception) or float((outcome.hidden - right).abs().max()) > 1e-3


def test_a_failing_pass_fails_the_steps_in_it_and_no_others(
    load: Callable[..., BlockSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    span = load("llama")
    batcher = Batcher(span, choose_joining(span))
    one, two, partly = Conversation(span), Conversation(span), span.new_cache(1, 2)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(span, "forward_joined", broken)
    other = SpanStep(torch.randn(1, 2, *span.hidden_shape), partly)
    outcomes = batcher.forward([one.steps(2)[0], other, two.steps(2)[0]])
    assert [type(outcome).__name__ for outcome in outcomes] == ["MemoryError", "SpanOutput", "MemoryError"]
    assert span.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layout", ["packed", "padded", "concat"])
def test_bfloat16_rounds_and_no_more(layout: Layout, load: Callable[..., BlockSpan]) -> None:
    span = load("llama", "bfloat16")
    assert choose_joining(span).layout == "packed"
    batcher = Batcher(span, Joining(layout, {}))
    assert advance(batcher, [Conversation(span), Conversation(span, rows=2)], [5, 9]) < 0.05
    assert advance(batcher, [Conversation(span), Conversation(span, rows=2)], [1, 1]) < 0.05


def test_sessions_on_different_sides_of_a_rope_limit_are_not_joined(load: Callable[..., BlockSpan]) -> None:
    span = load("llama#dynamic_rope")
    batcher = Batcher(span, choose_joining(span))
    short, long = Conversation(span), Conversation(span)
    advance(batcher, [short, long], [3, 20])
    assert batcher.key(short.steps(1)[0]) is not None
    assert batcher.key(long.steps(1)[0]) is None
