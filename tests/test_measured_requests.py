"""Measures over real servers: the same numbers whoever looks through the lens, and clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from client_models import GREEDY, prompt, save_plain, without_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess_swarm import ROOMY, InProcessSwarm, spoiled

import nbrunner
from nbrunner.blocks.edits import Edits
from nbrunner.blocks.lens import Lens
from nbrunner.blocks.measuring import measure_states
from nbrunner.client import measuring as client_measuring
from nbrunner.errors import BadPeerDataError, PeerRefusedError, UserInputError
from nbrunner.protocol.edits import EditOp
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.requests import Forward, ForwardResult
from nbrunner.protocol.tensors import pack
from nbrunner.swarm.loop import EngineLoop

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]

ROWS, TOKENS, BLOCKS = 3, 9, 4
EVERYTHING = Measure(
    [0, 1, 2, 3, 4], [0, 3, 8], norm=True, similarity=True, top=4, tokens=[7, 8], final=True, hidden=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    model = save_plain("llama", folder)
    without_end(model)
    return model


@pytest.fixture(scope="module")
def swarm(folder: Path, plain: Any) -> Iterator[InProcessSwarm]:
    swarm = InProcessSwarm(folder)
    swarm.add(0, 1, lens=True)
    yield swarm
    swarm.close()


@pytest.fixture(scope="module")
def model(folder: Path, swarm: InProcessSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite, retry_budget=4.0)
    without_end(model)
    yield model
    model.close()


@pytest.fixture(autouse=True)
def _only_the_first_stays(swarm: InProcessSwarm, model: Any) -> Iterator[None]:
    yield
    for server in swarm.servers[1:]:
        swarm.remove(server)
    swarm.seen_by(model)


@pytest.fixture
def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(prompt(ROWS, TOKENS)).detach()


def wanted_of(model: Any, hidden: torch.Tensor, edits: Edits | None, wanted: Measure) -> dict[str, torch.Tensor]:
    """All states at the client, measured there."""
    output = model.runner.forward(hidden, 0, BLOCKS, capture=True, edits=edits)
    states = dict(enumerate(output.captured))
    states[BLOCKS] = (edits or Edits()).apply(output.hidden, BLOCKS)
    final = states[BLOCKS][:, wanted.positions] if wanted.positions else states[BLOCKS]
    return measure_states(states, wanted, lens=Lens.of(model), final=final)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def run(model: Any, hidden: torch.Tensor, wanted: Measure, edits: Edits | None = None) -> Any:
    return model.runner.forward(hidden, 0, BLOCKS, measure=wanted, edits=edits, lens=lambda: Lens.of(model))


@pytest.mark.parametrize("lens", [True, False])
def test_the_same_numbers_wherever_they_are_made(
    swarm: InProcessSwarm, model: Any, hidden: torch.Tensor, lens: bool
) -> None:
    second = swarm.add(1, 4, lens=lens)
    swarm.seen_by(model)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    edits = Edits(
        (
            EditOp("zero", 0, 3, 4),
            EditOp("add", 1, vector=0),
            EditOp("scale", 3, 2, 5, 1, 3.0),
            EditOp("zero", 4, 8),
        ),
        {0: vector},
    )
    for some in (None, edits):
        output = run(model, hidden, EVERYTHING, some)
        assert_same(output.measured, wanted_of(model, hidden, some, EVERYTHING))
        torch.testing.assert_close(output.hidden, model.runner.forward(hidden, 0, 4, edits=some).hidden)
    first_round, second_round = output.passes[:2], output.passes[2:]
    assert [(one.start, one.end) for one in first_round] == [(one.start, one.end) for one in second_round]
    assert [one.peer for one in first_round] == [server.node.peer_id for server in swarm.servers]
    assert [one.measured_here for one in second_round] == [False, not lens]
    record = model.swarm.directory.view.servers[second.node.peer_id].record
    assert ("lens" in record.features) == lens


def test_states_stay_where_they_are(swarm: InProcessSwarm, model: Any, hidden: torch.Tensor) -> None:
    swarm.add(1, 4, lens=True)
    swarm.seen_by(model)
    small = Measure([1, 2, 3, 4], norm=True, similarity=True, top=2)
    output = run(model, hidden, small)
    assert set(output.measured) == {"norm", "cos_previous", "top_ids", "top_log_probs", "entropy"}
    sent = hidden.numel() * 4
    each = ROWS * TOKENS * (4 + 4 + 4 + 2 * 8)
    assert [one.bytes_received - sent for one in output.passes] == [each, 3 * each]
    assert output.tape is not None
    grad = model.runner.backward(output.tape, torch.ones_like(hidden), {}).hidden
    assert grad.shape == hidden.shape


def test_what_is_too_much_for_a_frame_goes_in_parts(
    swarm: InProcessSwarm, model: Any, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = TOKENS * 64 * 4
    server = swarm.add(1, 4, lens=True, limits=msgspec.structs.replace(ROOMY, frame_bytes=3 * row + 2000, batch=2))
    swarm.seen_by(model)
    expected = wanted_of(model, hidden, None, EVERYTHING)
    with spoiled(server, lambda hidden: hidden) as calls:
        assert_same(run(model, hidden, EVERYTHING).measured, expected)
        assert len(calls) > 3 * 2
    monkeypatch.setattr(client_measuring, "MAX_LENS_STATES", 3 * 2)
    assert_same(run(model, hidden, EVERYTHING).measured, expected)


def test_a_server_that_goes_is_replaced(swarm: InProcessSwarm, model: Any, hidden: torch.Tensor) -> None:
    gone = swarm.add(1, 4, lens=True)
    swarm.seen_by(model)
    expected = wanted_of(model, hidden, None, EVERYTHING)
    swarm.add(1, 3)
    swarm.add(3, 4, lens=True)
    swarm.seen_by(model)
    forward = gone.host.span.forward

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    gone.host.span.forward = breaks
    try:
        assert_same(run(model, hidden, EVERYTHING).measured, expected)
    finally:
        gone.host.span.forward = forward


@pytest.mark.parametrize("name", ["norm", "top_ids", "kl"])
def test_bad_measurements_are_refused(
    swarm: InProcessSwarm, model: Any, hidden: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = swarm.add(1, 4, lens=True)
    swarm.seen_by(model)
    from nbrunner.server import measuring

    def spoil(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = measure_states(*args, **kwargs)
        if args[1].layers[0] < 2:
            return found  # the first server is honest
        found[name] = found[name] * float("nan") if found[name].is_floating_point() else found[name] - 1000
        return found

    monkeypatch.setattr(measuring, "measure_states", spoil)
    with pytest.raises((BadPeerDataError, nbrunner.MissingBlocksError), match=r"NaN|below 0|blocks"):
        run(model, hidden, EVERYTHING)
    assert server.node.peer_id


def test_nothing_is_sent_that_cannot_be(swarm: InProcessSwarm, model: Any, hidden: torch.Tensor) -> None:
    with spoiled(swarm.servers[0], lambda hidden: hidden) as calls:
        for wanted, words in (
            (Measure([5], norm=True), "there are 0 to 4"),
            (Measure([2, 1], norm=True), "rise"),
            (Measure([]), "no layers"),
            (Measure([1], [TOKENS], norm=True), "position 9"),
        ):
            with pytest.raises(UserInputError, match=words):
                run(model, hidden, wanted)
        with pytest.raises(UserInputError, match=r"0 MB over the network .*no server"):
            model.runner.forward(hidden, 0, 4, measure=Measure([1, 2, 3], top=1), limit=10_000)
        with pytest.raises(UserInputError, match="Nothing was sent"):
            model.runner.forward(hidden, 0, 4, measure=Measure([1, 2, 3], hidden=True), limit=10_000)
        assert not calls


# -- strangers -----------------------------------------------------------------------------------------------------


def ask(model: Any, server: Any, request: Forward, **tensors: torch.Tensor) -> Any:
    raw = [pack(name.replace("__", "."), tensor) for name, tensor in tensors.items()]
    streams = model.runner._requests._streams
    return EngineLoop.get().run(streams.ask(server.node.peer_id, request, raw, ForwardResult), timeout=20)


@pytest.mark.parametrize(
    ("measure", "code", "words"),
    [
        (Measure([1], norm=True), "data", "there are 2 to 4"),
        (Measure([5], norm=True), "data", "there are 2 to 4"),
        (Measure([3, 2], norm=True), "data", "rise"),
        (Measure([2], [3, 3], norm=True), "data", "rise"),
        (Measure([2], [TOKENS], norm=True), "data", "position"),
        (Measure([2], top=1), "data", "without --lens"),
        (Measure([2], norm=True, final=True), "data", "final"),
        (Measure([]), "data", "no layers"),
    ],
)
def test_a_server_refuses(
    swarm: InProcessSwarm, model: Any, hidden: torch.Tensor, measure: Measure, code: str, words: str
) -> None:
    server = swarm.add(1, 4)
    with pytest.raises(PeerRefusedError, match=words) as refusal:
        ask(model, server, Forward(model.runner.model, 1, 4, measure=measure), hidden=hidden)
    assert refusal.value.code == code


def test_a_server_refuses_what_is_too_much(swarm: InProcessSwarm, model: Any, hidden: torch.Tensor) -> None:
    narrow = msgspec.structs.replace(ROOMY, frame_bytes=hidden.numel() * 4 + 1000)
    server = swarm.add(1, 4, lens=True, limits=narrow)
    name = model.runner.model
    with spoiled(server, lambda hidden: hidden) as calls:
        with pytest.raises(PeerRefusedError, match="bytes"):
            ask(model, server, Forward(name, 1, 4, measure=Measure([2, 3], hidden=True)), hidden=hidden)
        long = torch.zeros(1, 6000, 64)
        with pytest.raises(PeerRefusedError, match=r"through the lens|bytes"):
            ask(model, server, Forward(name, 1, 4, measure=Measure([2, 3, 4], top=1)), hidden=long[:, :50])
        both = Forward(name, 1, 4, True, measure=Measure([2], norm=True))
        with pytest.raises(PeerRefusedError, match="not for both"):
            ask(model, server, both, hidden=hidden)
        with pytest.raises(PeerRefusedError, match="neither"):
            ask(model, server, Forward(name, 1, 4, reply=False), hidden=hidden)
        with pytest.raises(PeerRefusedError, match="vocabulary"):
            ask(model, server, Forward(name, 1, 4, measure=Measure([2], [0], tokens=[96])), hidden=hidden)
        assert not calls
    _, answer = ask(model, server, Forward(name, 1, 4, measure=Measure([2], norm=True), reply=False), hidden=hidden)
    assert set(answer) == {"measured.norm"}


def test_garbage_does_no_harm(swarm: InProcessSwarm, model: Any, hidden: torch.Tensor) -> None:
    server = swarm.servers[0]
    ops = st.builds(
        EditOp,
        kind=st.sampled_from(["set", "add", "scale", "zero", "project"]),
        layer=st.integers(0, 3),
        begin=st.integers(0, 12),
        end=st.one_of(st.none(), st.integers(0, 12)),
        row=st.one_of(st.none(), st.integers(0, 4)),
        factor=st.floats(-1e6, 1e6),
        vector=st.one_of(st.none(), st.integers(0, 1)),
    )
    measures = st.builds(
        Measure,
        layers=st.lists(st.integers(0, 2), max_size=2),
        positions=st.lists(st.integers(0, 10), max_size=3),
        norm=st.booleans(),
        similarity=st.booleans(),
        top=st.integers(0, 64),
        tokens=st.lists(st.integers(0, 100), max_size=2),
        final=st.booleans(),
        hidden=st.booleans(),
    )
    codes: set[str] = set()
    shapes = st.sampled_from([(64,), (63,), (2, 64), (ROWS, TOKENS, 64), ()])

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(ops, max_size=3), st.one_of(st.none(), measures), st.booleans(), shapes, st.booleans())
    def attack(edits: list[EditOp], measure: Any, reply: bool, shape: tuple[int, ...], bad: bool) -> None:
        tensor = torch.full(shape, float("nan") if bad else 0.5)
        request = Forward(model.runner.model, 0, 1, False, edits, measure, reply)
        try:
            ask(model, server, request, hidden=hidden, edit__0=tensor, final=tensor)
        except PeerRefusedError as refusal:
            codes.add(refusal.code)

    attack()
    assert codes <= {"data", "schema", "limit"}  # never "internal": nothing broke
    assert ask(model, server, Forward(model.runner.model, 0, 1), hidden=hidden)


# -- sessions ------------------------------------------------------------------------------------------------------


def test_a_steered_generation_outlives_its_server(swarm: InProcessSwarm, model: Any) -> None:
    first = swarm.add(1, 4)
    swarm.seen_by(model)
    ids = prompt(1, 8)
    vector = 4 * torch.randn(64, generator=torch.Generator().manual_seed(5))
    steer = [nbrunner.Edit.add(2, vector), nbrunner.Edit.zero(1, positions=2), nbrunner.Edit.scale(3, 0.5)]
    expected = model.generate(ids, edits=steer, **GREEDY)
    assert expected.tolist() != model.generate(ids, **GREEDY).tolist()
    with model.inference_session(edits=steer) as session:
        model.generate(ids, max_new_tokens=4, do_sample=False, session=session)
        swarm.add(1, 2)
        swarm.add(2, 4)
        swarm.seen_by(model)
        swarm.remove(first)
        model.generate(max_new_tokens=6, do_sample=False, session=session)
        assert session.tokens.tolist() == expected.tolist()
        assert len(session.chain) == 3


def test_a_session_refuses_bad_edits_and_others_go_on(swarm: InProcessSwarm, model: Any) -> None:
    swarm.add(1, 4)
    swarm.seen_by(model)
    ids = prompt(1, 8)
    expected = model.generate(ids, **GREEDY)
    with model.inference_session() as session:
        model.generate(ids, max_new_tokens=4, do_sample=False, session=session)
        other = model.runner.open_session(
            Edits((EditOp("set", 0, vector=0),), {0: torch.full((64,), float("nan"))})
        )
        with pytest.raises((PeerRefusedError, BadPeerDataError, nbrunner.MissingBlocksError)):
            other.step(torch.zeros(1, 2, 64))
        other.close()
        model.generate(max_new_tokens=6, do_sample=False, session=session)
        assert session.tokens.tolist() == expected.tolist()


# -- traces --------------------------------------------------------------------------------------------------------


def test_traces_are_the_same_with_and_without_lenses(swarm: InProcessSwarm, model: Any) -> None:
    keep = ("norm", "similarity", "lens", "kl")
    edits = [nbrunner.Edit.zero(1, positions=3), nbrunner.Edit.scale(4, 2.0)]
    traces = []
    for lens in (True, False):
        second = swarm.add(1, 4, lens=lens)
        swarm.seen_by(model)
        assert model.runner.has_lenses == lens
        traces.append(model.trace(prompt(1, 9)[0].tolist(), keep=keep, tokens=[5, 6], edits=edits, top_k=3))
        assert [(hop.peer, hop.start, hop.end) for hop in traces[-1].hops] == [
            (swarm.servers[0].node.peer_id, 0, 1),
            (second.node.peer_id, 1, 4),
        ]
        swarm.remove(second)
        swarm.seen_by(model)
    for name in ("norm", "cos_previous", "cos_last", "entropy", "kl", "top_probs", "chosen_probs"):
        one, other = (torch.from_numpy(getattr(trace, name)) for trace in traces)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert traces[0].top_ids.tolist() == traces[1].top_ids.tolist()
    assert traces[0].chosen_ranks.tolist() == traces[1].chosen_ranks.tolist()


def test_one_state_is_fetched_alone(swarm: InProcessSwarm, model: Any) -> None:
    swarm.add(1, 4)
    swarm.seen_by(model)
    trace = model.trace(prompt(1, 9)[0].tolist(), keep=("norm",))
    through = 2 * 9 * 64 * 4
    assert trace.bytes_received == through + 4 * 9 * 4  # four states' norms; the embeddings' are ours
    whole = model.trace(prompt(1, 9)[0].tolist(), keep=("hidden",))
    torch.testing.assert_close(trace.state(3, -2), whole.hidden[3, -2])


def test_processes_with_a_lens() -> None:
    with nbrunner.LocalSwarm("tiny", servers=["0:3", "3:8"], dtype="float32", lens=True) as local:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(local.model, invite=local.invite)
        try:
            assert model.runner.has_lenses
            trace = model.trace("The capital of France is", keep=("lens",), tokens=[" Paris"])
            assert trace.prob(" Paris")[-1, -1] > 0.9
            through = len(trace.ids) * model.config.hidden_size * 4 * 2
            assert trace.bytes_received == through + 8 * len(trace.ids) * (4 + 5 * 8 + 8)
        finally:
            model.close()
