"""Paths through a model's blocks, against the same surgery on the plain model's list of layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from client_models import GREEDY, Pair, left_padded, make_pair, prompt
from torch import nn

from nbrunner.client.edits import Edit
from nbrunner.errors import SessionError, UserInputError

PATHS = {
    "skipped": [0, 1, 3],
    "repeated": [0, 1, 2, 2, 2, 3],
    "in another order": [2, 0, 3, 1],
    "one": [1],
}


class Scaled(nn.Module):
    """A module that can be put between blocks, in ours and in the plain model."""

    def __init__(self, width: int, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden + 0.3 * torch.tanh(self.linear(hidden))


class Broken(Scaled):
    """Fails in the step it is told to."""

    fails = False

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("out of order")
        return super().forward(hidden)


def surgery(plain: Any, path: list[Any]) -> Any:
    """The plain model with its list of layers made anew; copies have caches of their own."""
    model = copy.deepcopy(plain)
    layers = []
    for place, entry in enumerate(path):
        if isinstance(entry, nn.Module):
            layers.append(copy.deepcopy(entry))
            layers[-1].attention_type = "full_attention"
            continue
        layer = copy.deepcopy(plain.model.layers[entry])
        layer.self_attn.layer_idx = place
        layers.append(layer)
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(path)
    types = getattr(plain.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = ["full_attention" if isinstance(e, nn.Module) else types[e] for e in path]
    return model


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    assert pair.runner.num_blocks == 4
    yield pair
    pair.ours.close()


@pytest.fixture(scope="module")
def width(pair: Pair) -> int:
    return int(pair.plain.config.hidden_size)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_surgery(pair: Pair, name: str) -> None:
    ours, plain = pair.ours.path(PATHS[name]), surgery(pair.plain, PATHS[name])
    ids, mask = prompt(2), left_padded()
    with torch.no_grad():
        got = ours(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        wanted = plain(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], wanted.logits[real], atol=1e-5, rtol=1e-5)
    assert len(got.hidden_states) == len(PATHS[name]) + 1
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(
        ours.generate(ids, attention_mask=mask, **GREEDY), plain.generate(ids, attention_mask=mask, **GREEDY)
    )


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "temperature": 1.5}])
def test_beams_and_sampling_with_a_module_between(pair: Pair, width: int, how: dict[str, Any]) -> None:
    path = [0, Scaled(width), 2, 2, 3]
    ours, plain = pair.ours.path(path), surgery(pair.plain, path)
    arguments = {**GREEDY, **how}
    torch.manual_seed(3)
    got = ours.generate(prompt(), **arguments)
    torch.manual_seed(3)
    assert torch.equal(got, plain.generate(prompt(), **arguments))


def test_a_session_goes_on_and_rolls_back(pair: Pair, width: int) -> None:
    path = [0, 1, Scaled(width), 1, 3]
    ours, plain = pair.ours.path(path), surgery(pair.plain, path)
    with ours.inference_session() as session:
        ours.generate(prompt(), session=session, **GREEDY)
        ours.generate(prompt(1, 4, seed=3), session=session, **GREEDY)
        assert torch.equal(session.tokens[:, :22], plain.generate(prompt(), **GREEDY))
        session.position = 9
        got = ours.generate(prompt(1, 2, seed=4), session=session, **GREEDY)
    fresh = torch.cat([prompt()[:, :9], prompt(1, 2, seed=4)], dim=1)
    assert torch.equal(torch.cat([prompt()[:, :9], got], dim=1), plain.generate(fresh, **GREEDY))
    assert pair.open_sessions == 0


def test_gradients_reach_modules_and_what_entered(pair: Pair, width: int) -> None:
    module = Scaled(width)
    ours, plain = pair.ours.path([0, 2, module, 1]), surgery(pair.plain, [0, 2, module, 1])
    assert {id(one) for one in module.parameters()} <= {id(one) for one in ours.parameters()}
    grads = []
    for model in (ours, plain):
        embeds = plain.get_input_embeddings()(prompt()).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=prompt(), use_cache=False).loss.backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    wanted = plain.model.layers[2].linear.weight.grad
    torch.testing.assert_close(module.linear.weight.grad, wanted, atol=1e-5, rtol=1e-4)
    pair.ours.zero_grad()


def test_a_module_trains_over_a_frozen_model(pair: Pair, width: int) -> None:
    module = Scaled(width)
    path = pair.ours.path([0, module, 3])
    flags = [(one, one.requires_grad) for one in pair.ours.parameters()]
    pair.ours.requires_grad_(False)
    try:
        path(prompt(), labels=prompt()).loss.backward()  # the default cache stands back, as for the model itself
    finally:
        for one, flag in flags:
            one.requires_grad_(flag)
    assert float(module.linear.weight.grad.abs().sum()) > 0


def test_a_step_that_fails_leaves_all_as_it_was(pair: Pair, width: int) -> None:
    module = Broken(width)
    path = [0, 1, module, 2, 2]
    ours, plain = pair.ours.path(path), surgery(pair.plain, path)
    with ours.inference_session() as session:
        first = ours.generate(prompt(), session=session, **GREEDY)
        module.fails = True
        with pytest.raises(RuntimeError, match="out of order"):
            ours.generate(prompt(1, 3, seed=2), session=session, **GREEDY)
        module.fails = False
        assert [one.length for one in pair.runner.sessions[-3:]] == [21, 21, 21]
        got = ours.generate(prompt(1, 3, seed=2), session=session, **GREEDY)
    whole = torch.cat([first, prompt(1, 3, seed=2)], dim=1)
    assert torch.equal(torch.cat([first, got], dim=1), plain.generate(whole, **GREEDY))


def test_edits_are_made_at_places(pair: Pair, width: int) -> None:
    v = torch.randn(width, generator=torch.Generator().manual_seed(1))
    path = [0, 2, Scaled(width), 2, 3]
    ours, plain = pair.ours.path(path), surgery(pair.plain, path)
    edits = [Edit.add(place, v) for place in range(6)]
    for module in (*plain.model.layers, plain.model.norm):
        module.register_forward_pre_hook(lambda _, args: (args[0] + v, *args[1:]))
    assert torch.equal(ours.generate(prompt(), edits=edits, **GREEDY), plain.generate(prompt(), **GREEDY))
    with torch.no_grad():
        wanted = plain(prompt(), use_cache=False).logits
    for hidden_states in (False, True):
        got = ours(prompt(), edits=edits, output_hidden_states=hidden_states, use_cache=False)
        torch.testing.assert_close(got.logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_trace_of_a_path(pair: Pair, width: int) -> None:
    path = [0, 2, Scaled(width), 2, 3]
    ours, plain = pair.ours.path(path), surgery(pair.plain, path)
    trace = ours.trace(prompt(), keep=("hidden", "lens"))
    entered: list[torch.Tensor] = []  # transformers itself notes only the states that enter its own layers
    for layer in plain.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        wanted = plain(prompt(), use_cache=False)
    assert len(entered) == len(path)
    for place, state in enumerate(entered):
        torch.testing.assert_close(trace.hidden[place], state[0], atol=1e-5, rtol=1e-5)
    assert trace.top_ids[-1, :, 0].tolist() == wanted.logits[0].argmax(-1).tolist()


def test_a_path_of_a_path_and_of_blocks(pair: Pair, width: int) -> None:
    module = Scaled(width)
    path = pair.ours.path([pair.ours.blocks[1:3], module, range(3, 0, -1)])
    again = path.path([0, 2, 2, -1])
    assert torch.equal(
        again.generate(prompt(), **GREEDY), pair.ours.path([1, module, module, 1]).generate(prompt(), **GREEDY)
    )
    with pytest.raises(UserInputError, match="another model"):
        path.path([pair.ours.blocks[0]])
    again.close()
    with pytest.raises(SessionError):
        again(prompt())
    assert pair.ours(prompt()).logits.shape[1] == 12


def test_weights_are_shared(pair: Pair) -> None:
    path = pair.ours.path([0, 1])
    assert {id(one) for one in path.parameters()} == {id(one) for one in pair.ours.parameters()}
    assert isinstance(path, type(pair.ours))


@pytest.mark.parametrize(
    "bad", [[], [4], [-5], ["0"], "012", 3, [True], [nn.Identity()], [0.5], {0: 1}, [range(9)], None]
)
def test_bad_paths(pair: Pair, bad: Any) -> None:
    with pytest.raises(UserInputError):
        pair.ours.path(bad)


@pytest.mark.parametrize(
    "module", [nn.Flatten(0, 1), nn.Threshold(1e9, float("nan")), nn.LSTM(64, 64)], ids=["shape", "NaN", "tuple"]
)
def test_bad_modules(pair: Pair, width: int, module: nn.Module) -> None:
    module = nn.LSTM(width, width, batch_first=True) if isinstance(module, nn.LSTM) else module
    with pytest.raises(UserInputError, match="at place 1"):
        pair.ours.path([0, module, 1]).generate(prompt(), **GREEDY)


def test_blocks_that_hand_more_on_cannot_be_parted(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = make_pair("zaya", tmp_path_factory.mktemp("carries"))
    carry = pair.ours.nbrunner_checkpoint.architecture.carry
    taking = next(block for block, parts in enumerate(carry) if parts)
    whole = list(range(len(carry)))
    assert torch.equal(pair.ours.path(whole).generate(prompt(), **GREEDY), pair.plain.generate(prompt(), **GREEDY))
    with pytest.raises(UserInputError, match=f"block {taking} "):
        pair.ours.path([taking])
    pair.ours.close()


def test_a_session_over_some_blocks(pair: Pair) -> None:
    hidden = torch.randn(2, 7, pair.plain.config.hidden_size, generator=torch.Generator().manual_seed(1))
    mask = left_padded(2, 7, 2)
    blocks = pair.ours.blocks[1:4]
    whole = blocks(hidden, mask)
    real = mask.bool()
    with blocks.inference_session() as session:
        parts = [session.step(hidden[:, a:b], mask[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 7))]
        torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=1e-5, rtol=1e-5)
        session.position = 4
        torch.testing.assert_close(session.step(hidden[:, 4:]), whole[:, 4:], atol=1e-5, rtol=1e-5)
        assert session.position == 7
        for bad in (hidden[:1], hidden.double(), hidden[..., :-1]):
            with pytest.raises(UserInputError):
                session.step(bad)
        with pytest.raises(SessionError):
            session.position = 8
        assert session.position == 7
    with pytest.raises(SessionError, match="closed"):
        session.step(hidden)


def test_a_module_may_have_a_dtype_of_its_own(pair: Pair, width: int) -> None:
    module = Scaled(width).double()
    ours, plain = pair.ours.path([0, module, 3]), surgery(pair.plain, [0, Scaled(width), 3])
    assert torch.equal(ours.generate(prompt(), **GREEDY), plain.generate(prompt(), **GREEDY))
    ours(prompt(), labels=prompt(), use_cache=False).loss.backward()
    assert module.linear.weight.grad.dtype == torch.float64
    pair.ours.zero_grad()
