"""Adapters of blocks: equal to PEFT's in a span, named by their content, checked as whatever comes from a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from client_models import left_padded, prompt, save_plain
from hypothesis import given
from hypothesis import strategies as st
from parity.chain import local_model
from test_peft_local import config, fill
from transformers import AutoModelForCausalLM

from nbrunner.blocks.adapters import (
    BlockAdapter,
    Lora,
    SpanAdapter,
    check_adapter,
)
from nbrunner.blocks.adapters_wire import pack_adapters, take_adapters
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.lora import learned_in
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import BadPeerDataError, PeerRefusedError, UserInputError
from nbrunner.protocol.adapters import AdapterPart, AdapterUse, LoraPart, PutAdapter
from nbrunner.protocol.frames import RawTensor, decode_frame, encode_frame
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.tensors import pack
from nbrunner.server.adapters import PEERS, AdapterStore, take_checked

WIDTHS = {"mlp.up": (6, 8), "mlp.down": (8, 6)}


def lora(rank: int = 2, *, inputs: int = 6, outputs: int = 8, seed: int = 0, **options: Any) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return Lora(a, b, options.pop("scaling", 0.5), **options)


def adapter(rank: int = 2, seed: int = 0) -> BlockAdapter:
    down = lora(rank, inputs=8, outputs=6, seed=seed + 1)
    return BlockAdapter({"mlp.up": (lora(rank, seed=seed),), "mlp.down": (down,)}, torch.ones(3, 6))


# -- names by content ----------------------------------------------------------------------------------------------


def test_the_digest_is_of_everything() -> None:
    one = adapter()
    assert one.digest == adapter().digest
    assert len(one.digest) == 32
    reordered = BlockAdapter(dict(reversed(one.modules.items())), one.prompt)
    assert reordered.digest == one.digest
    (up,) = one.modules["mlp.up"]
    others = [
        adapter(seed=1),
        BlockAdapter(one.modules, None),
        BlockAdapter(one.modules, one.prompt.reshape(6, 3)),
        BlockAdapter({**one.modules, "mlp.up": (Lora(up.a, up.b, 0.25),)}, one.prompt),
        BlockAdapter({**one.modules, "mlp.up": (Lora(up.a, up.b, 0.5, 0.1),)}, one.prompt),
        BlockAdapter({**one.modules, "mlp.up": (up, up)}, one.prompt),
        BlockAdapter({"mlp.gate": one.modules["mlp.up"], "mlp.down": one.modules["mlp.down"]}, one.prompt),
        BlockAdapter({**one.modules, "mlp.up": (Lora(up.a.half(), up.b, 0.5),)}, one.prompt),
    ]
    assert len({other.digest for other in [one, *others]}) == len(others) + 1


def test_to_the_wire_and_back() -> None:
    sent = {3: adapter(), 7: BlockAdapter({"x": (lora(1), lora(2, seed=4))}), 8: BlockAdapter({}, torch.ones(1, 6))}
    parts, tensors = pack_adapters(sent)
    header_and_body = b"".join(encode_frame(PutAdapter("m", parts), tensors))
    size = int.from_bytes(header_and_body[:4], "big")
    message, received = decode_frame(header_and_body[8 : 8 + size], header_and_body[8 + size :])
    assert isinstance(message, PutAdapter)
    found = take_adapters(message.parts, received)
    assert {block: one.digest for block, one in found.items()} == {block: one.digest for block, one in sent.items()}


# -- what peers send -----------------------------------------------------------------------------------------------


def broken(**changes: Any) -> tuple[list[AdapterPart], dict[str, RawTensor]]:
    parts, tensors = pack_adapters({3: adapter()})
    named = {one.spec.name: one for one in tensors}
    for name, tensor in changes.pop("tensors", {}).items():
        if tensor is None:
            del named[name]
        else:
            named[name] = pack(name, tensor)
    return changes.pop("parts", parts), named


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensors": {"lora.3.0.a": None}}, "missing"),
        ({"tensors": {"lora.3.9.a": torch.ones(1, 1)}}, "belongs to no adapter"),
        ({"tensors": {"prompt.3": torch.full((3, 6), float("nan"))}}, "NaN"),
        ({"tensors": {"lora.3.1.b": torch.full((8, 2), float("inf"))}}, "NaN or infinity"),
        ({"tensors": {"lora.3.0.a": torch.ones(2, 8, dtype=torch.int64)}}, "int64"),
        ({"tensors": {"lora.3.0.a": torch.ones(16)}}, "shape"),
        ({"parts": [AdapterPart(3)]}, "changes nothing"),
        ({"parts": [AdapterPart(3, [], True), AdapterPart(3, [], True)]}, "two adapters"),
        (
            {"parts": [AdapterPart(3, [LoraPart("mlp.up", 1.0), LoraPart("mlp.down", 1.0)], True)]},
            "not in the order",
        ),
    ],
)
def test_frames_that_are_no_adapters(changes: dict[str, Any], said: str) -> None:
    parts, tensors = broken(**changes)
    with pytest.raises(BadPeerDataError, match=said):
        take_adapters(parts, tensors)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (BlockAdapter({"mlp.gate": (lora(),)}), r"no such linear module; it has mlp\.down, mlp\.up"),
        (BlockAdapter({"mlp.up": (lora(inputs=5),)}), r"\[rank, 6\] and \[8, rank\] fit"),
        (BlockAdapter({"mlp.up": (lora(outputs=9),)}), "fit"),
        (BlockAdapter({"mlp.up": (Lora(torch.ones(2, 6), torch.ones(8, 3), 1.0),)}), "fit"),
        (BlockAdapter({"mlp.up": (Lora(torch.ones(0, 6), torch.ones(8, 0), 1.0),)}), "fit"),
        (BlockAdapter({"mlp.up": (lora(5),)}), "rank 5; up to 4"),
        (BlockAdapter({"mlp.up": (lora(scaling=float("nan")),)}), "scaling nan"),
        (BlockAdapter({}, torch.ones(9, 6)), "prompt of block 0"),
        (BlockAdapter({}, torch.ones(2, 7)), "prompt of block 0"),
    ],
)
def test_adapters_that_do_not_fit_a_block(one: BlockAdapter, said: str) -> None:
    with pytest.raises(BadPeerDataError, match=said):
        check_adapter(one, 0, widths=WIDTHS, hidden_shape=(6,), max_rank=4, max_prompt=8)


@given(st.data())
def test_a_changed_frame_is_refused_or_another_adapter(data: st.DataObject) -> None:
    """Whatever a peer does to the bytes, what is taken is well formed; nothing but a clear refusal comes out."""
    parts, tensors = pack_adapters({3: adapter(), 4: adapter(seed=5)})
    frame = bytearray(b"".join(encode_frame(PutAdapter("m", parts), tensors)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(8, len(frame) - 1))] = data.draw(st.integers(0, 255))
    size = int.from_bytes(frame[:4], "big")
    try:
        message, received = decode_frame(bytes(frame[8 : 8 + size]), bytes(frame[8 + size :]))
        if not isinstance(message, PutAdapter):
            return
        found = take_adapters(message.parts, received)
        for block, one in found.items():
            check_adapter(one, block, widths=WIDTHS, hidden_shape=(6,), max_rank=4, max_prompt=8)
    except BadPeerDataError:
        return
    for one in found.values():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in one.tensors.values())


# -- the store -----------------------------------------------------------------------------------------------------


def named(*adapters: BlockAdapter) -> dict[bytes, BlockAdapter]:
    return {one.digest: one for one in adapters}


ONES = [adapter(seed=10 * index) for index in range(12)]
SIZE = ONES[0].nbytes


def use(*adapters: BlockAdapter | None) -> AdapterUse:
    return AdapterUse([b"" if one is None else one.digest for one in adapters])


def test_the_oldest_goes_first_and_the_pinned_stay() -> None:
    store = AdapterStore(Limits(adapter_bytes=3 * SIZE))
    store.put("a", named(*ONES[:3]))
    assert store.use(use(ONES[0], None), 4, 6).blocks.keys() == {4}  # used: now the youngest
    pinned = use(ONES[2])
    store.use(pinned, 0, 1)
    store.pin(pinned)
    store.put("a", named(ONES[3]))
    with pytest.raises(PeerRefusedError, match="blocks 5 are not here") as caught:
        store.use(use(ONES[0], ONES[1]), 4, 6)
    assert caught.value.code == "adapter"
    store.put("a", named(ONES[4], ONES[5]))
    store.use(pinned, 0, 1)
    with pytest.raises(PeerRefusedError, match="you may keep") as caught:
        store.put("a", named(*ONES[6:9]))
    assert (caught.value.code, caught.value.retry_after) == ("limit", None)
    store.unpin(pinned)
    store.put("a", named(*ONES[6:9]))
    assert store.nbytes == store.nbytes_of("a") == 3 * SIZE


def test_a_peer_cannot_push_out_anothers() -> None:
    store = AdapterStore(Limits(adapter_bytes=2 * SIZE))
    store.put("a", named(*ONES[:2]))
    for one in ONES[2:]:
        store.put("b", named(one))
    store.use(use(*ONES[:2]), 0, 2)
    assert store.nbytes_of("b") == 2 * SIZE
    # a content that is there already costs whoever puts it nothing
    store.put("b", named(*ONES[:2]))
    assert (store.nbytes_of("a"), store.nbytes_of("b")) == (2 * SIZE, 2 * SIZE)


def test_many_peers_share_what_there_is() -> None:
    store = AdapterStore(Limits(adapter_bytes=SIZE))
    for index, one in enumerate(ONES):
        store.put(f"peer {index}", named(one))
    assert store.nbytes == PEERS * SIZE
    last = use(*ONES[-PEERS:])
    store.use(last, 0, PEERS)
    store.pin(last)
    with pytest.raises(PeerRefusedError) as caught:
        store.put("late", named(ONES[0]))
    assert (caught.value.code, caught.value.retry_after) == ("full", 5.0)


def test_one_name_a_block() -> None:
    store = AdapterStore(Limits())
    with pytest.raises(PeerRefusedError, match="1 adapters for blocks"):
        store.use(use(None), 0, 2)
    assert store.use(use(None, None), 0, 2) is None


# -- in a span -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_plain("llama", folder)
    return folder


@pytest.fixture(scope="module")
def span(folder: Path) -> BlockSpan:
    return BlockSpan.load(resolve_checkpoint(folder), 0, 4, dtype="float32")


def of_peft(folder: Path, seed: int, **options: Any) -> tuple[SpanAdapter, Any]:
    """An adapter as a client reads it from PEFT, and PEFT around the plain model with the same."""
    ours = peft.get_peft_model(local_model(resolve_checkpoint(folder), 2), config(**options))
    plain = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config(**options)
    )
    for model in (ours, plain):
        fill(model, seed)
    learned = learned_in(ours.base_model.model.nbrunner_skeleton.layers)
    assert learned is not None
    return learned.adapter, plain.eval()


def test_several_and_none_in_one_batch(folder: Path, span: BlockSpan) -> None:
    (a, with_a), (b, with_b) = of_peft(folder, 1), of_peft(folder, 2, target_modules=["v_proj"], r=2)
    ids, mask = prompt(5, 9), left_padded(5, 9)
    embeds = with_a.get_input_embeddings()(ids).detach()
    rows = [a, a, None, b, a]
    found = span.forward(embeds, attention_mask=mask, adapters=rows).hidden
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, plain in enumerate([with_a, with_a, bare, with_b, with_a]):
        inner = plain.base_model.model.model if plain is not bare else bare.model
        with torch.no_grad():
            expected = inner(ids, attention_mask=mask).last_hidden_state
            real = mask[row].bool()
            # to the last bit only if the products had the same number of rows
            torch.testing.assert_close(inner.norm(found[row])[real], expected[row][real], rtol=1e-5, atol=1e-5)
    # a cache is filled with what each row's adapter makes of it
    cache = span.new_cache()
    span.forward(embeds[:, :6], cache=cache, attention_mask=mask[:, :6], adapters=rows)
    last = span.forward(embeds[:, 6:], cache=cache, attention_mask=mask, adapters=rows).hidden
    torch.testing.assert_close(last, found[:, 6:], rtol=1e-5, atol=1e-5)


def test_prompts_are_added_at_their_positions_only(span: BlockSpan) -> None:
    hidden = torch.randn(2, 6, 64)
    prompts = torch.randn(4, 64)
    adapted = SpanAdapter({0: BlockAdapter({}, prompts)})
    expected = hidden.clone()
    expected[:, :4] += prompts
    assert torch.equal(span.forward(hidden, adapters=adapted).hidden, span.forward(expected).hidden)
    one, two = span.new_cache(), span.new_cache()
    for begin, end in ((0, 3), (3, 5), (5, 6)):
        found = span.forward(hidden[:, begin:end], cache=one, adapters=adapted).hidden
        assert torch.equal(found, span.forward(expected[:, begin:end], cache=two).hidden)


def test_gradients_of_prompts(span: BlockSpan) -> None:
    hidden, prompts = torch.randn(3, 6, 64), torch.randn(2, 64)
    grad = torch.randn(3, 6, 64)
    found = span.backward(hidden, grad, adapter=SpanAdapter({0: BlockAdapter({}, prompts)}), adapter_grads=True)
    expected = span.backward(hidden + torch.nn.functional.pad(prompts, (0, 0, 0, 4)), grad).hidden
    torch.testing.assert_close(found.hidden, expected)
    torch.testing.assert_close(found.adapters[0]["prompt"], expected[:, :2].sum(0))


def test_one_adapter_for_each_row_or_one_for_all(span: BlockSpan, folder: Path) -> None:
    with pytest.raises(UserInputError, match="2 adapters for 3 rows"):
        span.forward(torch.zeros(3, 2, 64), adapters=[None, None])


def test_nothing_stays_in_the_modules(folder: Path, span: BlockSpan) -> None:
    hidden = torch.randn(1, 4, 64)
    before = span.forward(hidden).hidden
    span.forward(hidden, adapters=of_peft(folder, 1)[0])
    assert torch.equal(span.forward(hidden).hidden, before)


def test_a_server_checks_against_its_own_modules(folder: Path, span: BlockSpan) -> None:
    parts, tensors = pack_adapters(of_peft(folder, 1)[0].blocks)
    named_tensors = {one.spec.name: one for one in tensors}
    found = take_checked(PutAdapter("m", parts), named_tensors, span, Limits())
    assert len(found) == 4
    with pytest.raises(PeerRefusedError, match="rank 4 in block 0; this server allows 2") as caught:
        take_checked(PutAdapter("m", parts), named_tensors, span, Limits(adapter_rank=2))
    assert caught.value.code == "limit"
    with pytest.raises(PeerRefusedError, match="block 9 is not here") as caught:
        take_checked(PutAdapter("m", [AdapterPart(9, [], True)]), {}, span, Limits())
    assert caught.value.code == "blocks"
    del named_tensors["lora.2.0.a"]
    with pytest.raises(PeerRefusedError, match="missing") as caught:
        take_checked(PutAdapter("m", parts), named_tensors, span, Limits())
    assert caught.value.code == "data"


def test_no_gradients_through_packed_weights(span: BlockSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes' 4-bit modules are called: on a CPU their gradient is silently cut."""
    hidden = torch.zeros(1, 2, 64)
    linear = type("Linear4bit", (torch.nn.Linear,), {})(2, 2)
    monkeypatch.setitem(span.model._modules, "packed", linear)
    with pytest.raises(UserInputError, match="4-bit weights on a CPU"):
        span.backward(hidden, hidden)
    span.forward(hidden)
