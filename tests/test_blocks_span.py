"""One span: parts of it, wrong input, dtypes, threads, and state that must not leak between sessions."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from parity.families import tiny_config
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import Checkpoint, resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import UserInputError

torch.set_num_threads(1)


def saved(name: str, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(folder, max_shard_size="100KB")
    return resolve_checkpoint(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Checkpoint:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def span(llama) -> BlockSpan:
    return BlockSpan.load(llama, 1, 4, dtype="float32")


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))


def test_a_span_is_its_parts_run_one_after_the_other(span, hidden) -> None:
    whole = span.forward(hidden, collect=True)
    first = span.forward(hidden, start=1, end=2, collect=True)
    rest = span.forward(first.hidden, start=2, end=4, collect=True)
    assert torch.equal(rest.hidden, whole.hidden)
    assert len(whole.collected) == 3
    for one, other in zip(whole.collected, first.collected + rest.collected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "longcat_flash"])
def test_a_step_may_be_run_in_parts_over_one_cache(name, tmp_path) -> None:
    checkpoint = saved(name, tmp_path)
    span = BlockSpan.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32")
    whole, parts = span.new_cache(), span.new_cache()
    middle = span.end // 2
    for tokens in (11, 1, 1, 3):
        hidden = torch.randn(2, tokens, 64)
        expected = span.forward(hidden, cache=whole).hidden
        half = span.forward(hidden, cache=parts, end=middle)
        assert parts.length == whole.length - tokens
        found = span.forward(half.hidden, cache=parts, start=middle, carry=half.carry).hidden
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert parts.length == whole.length


def test_a_session_on_a_part_of_a_span(span, hidden) -> None:
    cache = span.new_cache(2, 3)
    first = span.forward(hidden[:, :4], cache=cache).hidden
    second = span.forward(hidden[:, 4:], cache=cache).hidden
    expected = span.forward(hidden, start=2, end=3).hidden
    torch.testing.assert_close(torch.cat([first, second], 1), expected, atol=1e-6, rtol=0)
    with pytest.raises(UserInputError, match="inside the session's blocks"):
        span.forward(hidden, cache=cache, start=1, end=3)


def test_a_mask_of_ones_is_no_mask(span, hidden) -> None:
    expected = span.forward(hidden).hidden
    for mask in (torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.uint8)):
        assert torch.equal(span.forward(hidden, attention_mask=mask).hidden, expected)


def test_padding_does_not_change_a_row(span, hidden) -> None:
    padded = torch.cat([torch.randn(2, 3, 64), hidden], 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    # Were positions to begin at 0 after the padding, transformers would see packed sequences there, mask or not.
    found = span.forward(padded, attention_mask=mask, position_ids=torch.arange(9).unsqueeze(0)).hidden[:, 3:]
    torch.testing.assert_close(found, span.forward(hidden).hidden, atol=1e-6, rtol=0)


def test_wrong_input_is_refused_and_changes_nothing(span, hidden) -> None:
    cache = span.new_cache()
    span.forward(hidden, cache=cache)
    wrong = [
        ({"hidden": hidden[..., :32]}, "shape"),
        ({"hidden": hidden[:, :0]}, "at least one"),
        ({"hidden": hidden[:1]}, "2 rows"),
        ({"hidden": hidden, "attention_mask": torch.ones(2, 6)}, "attention mask"),
        ({"hidden": hidden, "position_ids": torch.arange(5).unsqueeze(0)}, "positions"),
        ({"hidden": hidden, "start": 0}, "not inside"),
        ({"hidden": hidden, "start": 2, "end": 2}, "not inside"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserInputError, match=message):
            span.forward(cache=cache, **arguments)
        assert cache.length == cache.get_seq_length(1) == 6
    with pytest.raises(UserInputError, match="gradient"):
        span.backward(hidden, hidden[:, :2])


def test_a_carry_that_is_missing_is_named(tmp_path) -> None:
    checkpoint = saved("zaya", tmp_path)
    span = BlockSpan.load(checkpoint, 2, 4, dtype="float32")
    assert span.carry_at(2) == {1}
    with pytest.raises(UserInputError, match="part 1 of what block 1 returned"):
        span.forward(torch.randn(1, 3, 64))


@pytest.mark.parametrize("bad", [(2, 2), (-1, 2), (3, 5), (4, 5)])
def test_blocks_out_of_range(llama, bad) -> None:
    with pytest.raises(UserInputError, match="has blocks 0:4"):
        BlockSpan.load(llama, *bad)


def test_dtype(llama) -> None:
    assert BlockSpan.load(llama, 0, 1).dtype == torch.float32  # as saved
    low = BlockSpan.load(llama, 0, 1, dtype="bfloat16")
    assert low.dtype == low.forward(torch.randn(1, 2, 64)).hidden.dtype == torch.bfloat16
    assert low.nbytes < BlockSpan.load(llama, 0, 1).nbytes
    for wrong in ("int8", "float99"):
        with pytest.raises(UserInputError, match="dtype"):
            BlockSpan.load(llama, 0, 1, dtype=wrong)


def test_a_long_session_does_not_change_a_later_short_one(tmp_path) -> None:
    """ "dynamic" rotary tables remember the longest sequence; without putting them back this differs by 2e-4."""
    span = BlockSpan.load(saved("llama#dynamic_rope", tmp_path), 0, 4, dtype="float32")
    short = torch.randn(1, 20, 64)
    before = span.forward(short).hidden
    cache = span.new_cache()
    span.forward(torch.randn(1, 60, 64), cache=cache)
    assert torch.equal(span.forward(short).hidden, before)
    span.backward(short, torch.ones_like(short))
    assert torch.equal(span.forward(short).hidden, before)


def test_gradients_after_a_session(span, hidden) -> None:
    """Caches are made in inference mode, whose tensors would break autograd if they came back."""
    expected = span.backward(hidden, torch.ones_like(hidden)).hidden
    span.forward(hidden, cache=span.new_cache())
    found = span.backward(hidden, torch.ones_like(hidden))
    assert torch.equal(found.hidden, expected)
    assert not found.carry
    with torch.inference_mode():
        assert torch.equal(span.backward(hidden, torch.ones_like(hidden)).hidden, expected)


def test_the_gradient_of_parts_is_that_of_the_whole(tmp_path) -> None:
    span = BlockSpan.load(saved("zaya", tmp_path), 0, 4, dtype="float32")
    hidden, gradient = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    whole = span.backward(hidden, gradient).hidden
    first = span.forward(hidden, end=2)
    assert set(first.carry) == {1}
    back = span.backward(first.hidden, gradient, start=2, carry=first.carry)
    assert set(back.carry) == {1}  # without it this gradient is wrong
    found = span.backward(hidden, back.hidden, end=2, grad_carry=back.carry).hidden
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)
    without = span.backward(hidden, back.hidden, end=2).hidden
    assert not torch.allclose(without, whole, atol=1e-6, rtol=1e-5)


def test_threads_take_turns(span, hidden) -> None:
    expected = [span.forward(hidden, start=1, end=end).hidden for end in (2, 3, 4)]
    wrong = []

    def work(index: int) -> None:
        outputs = [span.forward(hidden, start=1, end=2 + index).hidden for _ in range(30)]
        wrong.extend(index for output in outputs if not torch.equal(output, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_run_leaves_the_span_usable(span, hidden) -> None:
    expected = span.forward(hidden).hidden
    layer = span.model.model.layers._modules["2"]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        span.forward(hidden)
    hook.remove()
    assert torch.equal(span.forward(hidden).hidden, expected)


def test_only_the_span_is_loaded(llama) -> None:
    span = BlockSpan.load(llama, 1, 3)
    names = set(span.model.state_dict())
    assert names
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in names)
