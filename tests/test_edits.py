"""Edits of hidden states, against hooks on the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from client_models import GREEDY, Pair, left_padded, make_pair, prompt
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.blocks.edits import MAX_BYTES, Edits, check_edits, take_edits
from nbrunner.client.edits import Edit, compile_edits, resolve_positions
from nbrunner.errors import BadPeerDataError, UserInputError
from nbrunner.protocol.edits import EditOp
from nbrunner.protocol.tensors import pack

Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    yield pair
    pair.ours.close()


def layers_of(plain: Any) -> Any:
    return plain.model.layers if hasattr(plain, "model") else plain.transformer.h


@contextmanager
def surgery(
    plain: Any, changes: dict[int, Callable[[torch.Tensor, int], torch.Tensor]]
) -> Iterator[list[torch.Tensor]]:
    """Hooks that change what enters layers; each is told the position of the first token it sees.

    Gives the changed states of the last pass.
    """
    seen = dict.fromkeys(changes, 0)
    states: list[torch.Tensor] = []

    def hook(index: int) -> Any:
        def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            changed = changes[index](hidden, seen[index])
            seen[index] += hidden.shape[1]
            states.append(changed)
            return ((changed, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": changed})

        return change

    layers = layers_of(plain)
    handles = [layers[index].register_forward_pre_hook(hook(index), with_kwargs=True) for index in changes]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def width(pair: Pair) -> int:
    return pair.ours.config.hidden_size


def vector(pair: Pair, seed: int = 3) -> torch.Tensor:
    return torch.randn(width(pair), generator=torch.Generator().manual_seed(seed))


def at(positions: Sequence[int], change: Change) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def apply(hidden: torch.Tensor, first: int) -> torch.Tensor:
        changed = hidden.clone()
        for one in positions:
            if first <= one < first + hidden.shape[1]:
                changed[:, one - first] = change(hidden[:, one - first])
        return changed

    return apply


def everywhere(change: Change) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda hidden, _: change(hidden)


def without(hidden: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    unit = direction / direction.norm()
    return hidden - (hidden @ unit)[..., None] * unit


@pytest.mark.parametrize("kind", ["set", "add", "scale", "zero", "project"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_forward_as_with_hooks(pair: Pair, kind: str, layer: int) -> None:
    v, ids = vector(pair), prompt(2)
    edit, change = {
        "set": (Edit.set(layer, v, [2, 3, 7]), at([2, 3, 7], lambda h: v.expand_as(h))),
        "add": (Edit.add(layer, v, -1, strength=2.5), at([11], lambda h: h + 2.5 * v)),
        "scale": (Edit.scale(layer, 0.5, slice(4, None)), at(range(4, 12), lambda h: 0.5 * h)),
        "zero": (Edit.zero(layer, 5), at([5], torch.zeros_like)),
        "project": (Edit.project_out(layer, v), everywhere(lambda h: without(h, v))),
    }[kind]
    with torch.no_grad(), surgery(pair.plain, {layer: change}):
        wanted = pair.plain(ids, output_hidden_states=True)
    for cached in (False, True):
        with torch.no_grad():
            got = pair.ours(ids, use_cache=cached, output_hidden_states=True, edits=[edit])
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        untouched = pair.ours(ids, use_cache=False).logits
    assert not torch.allclose(untouched, got.logits, atol=1e-4)


def test_the_state_after_the_last_block(pair: Pair) -> None:
    ids, last = prompt(), pair.ours.runner.num_blocks
    with torch.no_grad():
        zeroed = pair.ours(ids, edits=[Edit.zero(last)]).logits
        states = torch.zeros(1, ids.shape[1], width(pair))
    norm = pair.plain.model.norm if hasattr(pair.plain, "model") else pair.plain.transformer.ln_f
    torch.testing.assert_close(zeroed, pair.plain.lm_head(norm(states)).detach())


def test_generation_keeps_its_edits(pair: Pair) -> None:
    ids, v = prompt(), 4 * vector(pair)
    steer = [Edit.add(1, v), Edit.zero(2, positions=-2), Edit.scale(0, 1.5, positions=[0, 4])]
    changes = {
        1: everywhere(lambda h: h + v),
        2: at([ids.shape[1] - 2], torch.zeros_like),
        0: at([0, 4], lambda h: 1.5 * h),
    }
    with surgery(pair.plain, changes):
        wanted = pair.plain.generate(ids, **GREEDY)
    got = pair.ours.generate(ids, edits=steer, **GREEDY)
    assert got.tolist() == wanted.tolist()
    assert got.tolist() != pair.ours.generate(ids, **GREEDY).tolist()  # and they are gone with the call


def test_beams_padding_and_sessions(pair: Pair) -> None:
    ids, mask, v = prompt(2), left_padded(), 4 * vector(pair)
    edits, changes = [Edit.add(1, v)], {1: everywhere(lambda h: h + v)}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    with surgery(pair.plain, changes):
        wanted = pair.plain.generate(ids, attention_mask=mask, **options)
    assert pair.ours.generate(ids, attention_mask=mask, edits=edits, **options).tolist() == wanted.tolist()
    with surgery(pair.plain, changes):
        longer = pair.plain.generate(ids[1:], **GREEDY)
    with pair.ours.inference_session(edits=edits) as session:
        pair.ours.generate(ids[1:], max_new_tokens=4, do_sample=False, session=session)
        session.position = ids.shape[1]
        pair.ours.generate(max_new_tokens=10, do_sample=False, session=session)
        assert session.tokens.tolist() == longer.tolist()
        with pytest.raises(UserInputError, match="when it begins"):
            pair.ours.generate(ids[1:], session=session, edits=edits)


def test_gradients_flow_through_edits(pair: Pair) -> None:
    ids, v = prompt(2), vector(pair)
    embeds = pair.plain.get_input_embeddings()(ids).detach()
    edits = [Edit.scale(0, 2.0), Edit.zero(1, [3, 4]), Edit.project_out(2, v), Edit.set(2, v, 6), Edit.add(1, v)]
    changes = {
        0: everywhere(lambda h: 2 * h),
        1: everywhere(lambda h: at([3, 4], torch.zeros_like)(h, 0) + v),
        2: everywhere(lambda h: at([6], lambda one: v.expand_as(one))(without(h, v), 0)),
    }
    gradients = []
    for model, arguments in ((pair.plain, {}), (pair.ours, {"edits": edits})):
        entering = embeds.clone().requires_grad_(True)
        with surgery(pair.plain, changes if model is pair.plain else {}) as edited:
            out = model(inputs_embeds=entering, use_cache=False, output_hidden_states=True, **arguments)
        states = edited if model is pair.plain else out.hidden_states[: len(changes)]
        loss = out.logits.square().mean() + sum(state.sin().mean() for state in states)
        loss.backward()
        gradients.append(entering.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch(pair: Pair) -> None:
    ids = prompt(3)
    with torch.no_grad():
        alone = pair.ours(ids, use_cache=False).logits
        edited = pair.ours(ids, use_cache=False, edits=[Edit.zero(1, 2).for_row(1)]).logits
    torch.testing.assert_close(edited[[0, 2]], alone[[0, 2]])
    assert not torch.allclose(edited[1], alone[1])
    with pytest.raises(UserInputError, match="all rows"):
        pair.ours.generate(ids, edits=[Edit.zero(1, 2).for_row(1)], **GREEDY)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit.zero(99), "states 0 to"),
        (Edit.zero(-1), "from 0 on"),
        (Edit.zero(1, 12), "positions 0 to 11"),
        (Edit.zero(1, [3, 3]), "rise"),
        (Edit.zero(1, slice(5, 5)), "no position"),
        (Edit.set(1, torch.zeros(3)), "shape"),
        (Edit.set(1, torch.zeros(2, 3), [1, 2]), "shape"),
        (Edit.set(1, torch.full((8,), float("nan"))), "NaN|shape"),
        (Edit.scale(1, float("nan")), "factor"),
        (Edit("set", 1), "needed"),
        ("zero", "nbrunner.Edit"),
    ],
)
def test_edits_that_cannot_be_made(pair: Pair, edit: Any, words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        pair.ours(prompt(), edits=[edit])
    assert pair.open_sessions == 0


def test_a_zero_direction_and_too_many_bytes(pair: Pair) -> None:
    with pytest.raises(UserInputError, match="direction is zero"):
        pair.ours(prompt(), edits=[Edit.project_out(1, torch.zeros(width(pair)))])
    huge = Edits((EditOp("set", 1, 0, 1, vector=0),), {0: torch.zeros(1, (MAX_BYTES >> 2) + 1)})
    with pytest.raises(UserInputError, match="allowed"):
        check_edits(huge, layers=(0, 2), hidden_shape=[(MAX_BYTES >> 2) + 1], rows=None)


# -- pure ----------------------------------------------------------------------------------------------------------

_ops = st.builds(
    EditOp,
    kind=st.sampled_from(["set", "add", "scale", "zero", "project"]),
    layer=st.just(1),
    begin=st.integers(0, 12),
    end=st.one_of(st.none(), st.integers(13, 20)),
    factor=st.floats(-2, 2, width=32),
)


def _filled(ops: list[EditOp]) -> Edits:
    made, vectors = [], {}
    for index, op in enumerate(ops):
        vector = index if op.kind in ("set", "add", "project") else None
        made.append(EditOp(op.kind, op.layer, op.begin, op.end, None, op.factor, vector))
        if vector is not None:
            vectors[index] = torch.randn(4, generator=torch.Generator().manual_seed(index)).double()
    return Edits(tuple(made), vectors)


@given(st.lists(_ops, max_size=5), st.integers(1, 15))
def test_parts_are_edited_as_the_whole(ops: list[EditOp], cut: int) -> None:
    edits, hidden = _filled(ops), torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(9)).double()
    before = hidden.clone()
    whole = edits.apply(hidden, 1)
    parts = [edits.apply(hidden[:, :cut], 1), edits.apply(hidden[:, cut:], 1, position=cut)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert torch.equal(hidden, before)
    assert torch.equal(edits.apply(hidden, 2), hidden)


@given(st.lists(_ops, max_size=5))
def test_pull_back_is_the_gradient(ops: list[EditOp]) -> None:
    edits = _filled(ops)
    hidden = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(8)).double().requires_grad_(True)
    grad = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(7)).double()
    (wanted,) = torch.autograd.grad(edits.apply(hidden, 1), hidden, grad, allow_unused=True)
    got = edits.pull_back(grad, 1)
    # a projection is computed in float32
    torch.testing.assert_close(got, wanted if wanted is not None else torch.zeros_like(grad), atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(-9, 8), unique_by=lambda one: one % 9, min_size=1, max_size=9))
def test_positions_are_resolved_and_joined(positions: list[int]) -> None:
    wanted = sorted(one % 9 for one in positions)
    ordered = sorted(positions, key=lambda one: one % 9)
    assert resolve_positions(ordered, 9) == wanted
    edits = compile_edits([Edit.zero(1, ordered)], tokens=9, num_blocks=2, hidden_shape=[4], rows=None)
    assert [one for op in edits.ops for one in range(op.begin, op.end or 99)] == wanted


@pytest.mark.parametrize(
    ("op", "tensors"),
    [
        (EditOp("zero", 4), {}),
        (EditOp("zero", 0), {}),
        (EditOp("set", 2), {}),
        (EditOp("set", 2, vector=1), {}),
        (EditOp("zero", 2, vector=1), {"edit.1": torch.zeros(4)}),
        (EditOp("set", 2, vector=1), {"edit.1": torch.full((4,), float("inf"))}),
        (EditOp("set", 2, vector=1), {"edit.1": torch.zeros(4, dtype=torch.int64)}),
        (EditOp("set", 2, vector=1), {"edit.1": torch.zeros(5)}),
        (EditOp("set", 2, 3, 5, vector=1), {"edit.1": torch.zeros(3, 4)}),
        (EditOp("zero", 2, 5, 5), {}),
        (EditOp("zero", 2, row=0), {}),
        (EditOp("zero", 2), {"edit.7": torch.zeros(4)}),
    ],
)
def test_what_a_server_does_not_take(op: EditOp, tensors: dict[str, torch.Tensor]) -> None:
    raw = {name: pack(name, tensor) for name, tensor in tensors.items()}
    with pytest.raises(BadPeerDataError):
        take_edits([op], raw, blocks=(1, 4), hidden_shape=[4], rows=None)
