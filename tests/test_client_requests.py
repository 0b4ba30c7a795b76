"""Passes without caches over real servers: split, retried elsewhere, checked; the gradients stay the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from client_models import left_padded, prompt, save_plain, without_end
from inprocess_swarm import ROOMY, InProcessSwarm, spoiled

import nbrunner
from nbrunner.client.path_model import twin_of
from nbrunner.client.request_tensors import row_groups
from nbrunner.client.runner import Segment
from nbrunner.client.watch import PassWatch, watching
from nbrunner.errors import BadPeerDataError, MissingBlocksError, UserInputError
from nbrunner.protocol.limits import Limits
from nbrunner.swarm.loop import EngineLoop

pytestmark = [pytest.mark.network, pytest.mark.timeout(120)]

ROWS, TOKENS = 5, 12
IDS, MASK = prompt(ROWS, TOKENS, seed=6), left_padded(ROWS, TOKENS)


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
    swarm.add(0, 2)
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


def gradient(model: Any, *, between: Any = lambda: None) -> torch.Tensor:
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    output = model(inputs_embeds=embeds, attention_mask=MASK, use_cache=False)
    between()
    output.logits[:, 5:].pow(2).mean().backward()
    return embeds.grad


def assert_same_gradient(found: torch.Tensor, plain: Any) -> None:
    expected = gradient(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(model)
    assert_same_gradient(gradient(model), plain)


def test_who_did_what_is_noted_for_who_asks(swarm: InProcessSwarm, model: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(model)
    watch = PassWatch()
    with watching(watch):
        gradient(model)
    gradient(model)  # of nobody's interest
    one_way, peers = [(0, 2), (2, 4)], [server.node.peer_id for server in swarm.servers]
    assert [(one.start, one.end, one.backward) for one in watch.passes] == [
        *((*span, False) for span in one_way),
        *((*span, True) for span in reversed(one_way)),
    ]
    assert [one.peer for one in watch.passes] == [*peers, *reversed(peers)]
    states = ROWS * TOKENS * 64 * 4
    for one in watch.passes:
        assert 0 < one.compute_seconds < one.total_seconds
        assert one.bytes_received == states
        assert one.bytes_sent >= states  # of a pass that was kept only the gradient
    assert sum(one.total_seconds for one in watch.passes) < watch.waited
    taken = watch.take()
    assert len(taken.passes) == 4
    assert watch.passes == []
    assert watch.waited == 0


def test_a_twin_shares_weights_and_servers_and_nothing_else(swarm: InProcessSwarm, model: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(model)
    twin = twin_of(model)
    assert twin.runner is model.runner
    assert twin.get_input_embeddings() is not model.get_input_embeddings()
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(twin(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    twin.config.use_cache = False
    twin.lm_head = torch.nn.Linear(64, 3)
    assert model.config.use_cache
    with torch.no_grad():
        assert model(IDS).logits.shape[-1] > 3
        assert twin(IDS).logits.shape[-1] == 3


def test_gradients_of_inner_hidden_states(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(model)

    def inner(model: Any) -> torch.Tensor:
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        output = model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
        (output.hidden_states[1].sin().mean() + output.hidden_states[3].pow(2).mean()).backward()
        return embeds.grad

    torch.testing.assert_close(inner(model), inner(plain), rtol=1e-4, atol=1e-7)


def test_what_is_too_much_for_a_frame_goes_in_parts(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    row = TOKENS * 64 * 4
    narrow = msgspec.structs.replace(ROOMY, batch=2, part_tokens=3 * TOKENS, frame_bytes=2 * row + 1000)
    server = swarm.add(2, 4, limits=narrow)
    swarm.seen_by(model)
    with spoiled(server, lambda hidden: hidden) as calls:
        assert_same_gradient(gradient(model), plain)
        # rows by 2, 2, 1, forwards and backwards: of passes that were kept only gradients travel
        assert len(calls) == 3 + 3
        server.host.kept._limit = 0
        del calls[:]
        assert_same_gradient(gradient(model), plain)
        # one by one backwards, where the gradient travels beside the states; forwards first without room to keep it
        assert len(calls) >= 3 + 5
        del calls[:]
        with torch.no_grad():
            found = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
            expected = plain(IDS, output_hidden_states=True).hidden_states
        # blocks one by one, because the captured states come back in the same frame
        assert len(calls) == 2 * 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_longer_than_any_part(swarm: InProcessSwarm, model: Any) -> None:
    swarm.add(2, 4, limits=msgspec.structs.replace(ROOMY, part_tokens=8))
    swarm.seen_by(model)
    with pytest.raises(UserInputError, match="12 tokens are more than a server takes"):
        gradient(model)


def test_lost_between_forward_and_backward(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    first = swarm.add(2, 4)
    swarm.seen_by(model)

    def replace() -> None:
        swarm.add(2, 4)
        swarm.seen_by(model)
        swarm.remove(first)

    with spoiled(swarm.servers[0], lambda hidden: hidden) as calls:
        assert_same_gradient(gradient(model, between=replace), plain)
        assert len(calls) == 2  # one forward, one backward: what survived is not computed twice


def test_replaced_by_two_with_other_borders(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    first = swarm.add(2, 4)
    swarm.seen_by(model)

    def replace() -> None:
        swarm.add(1, 3)
        swarm.add(3, 4)
        swarm.seen_by(model)
        swarm.remove(first)

    assert_same_gradient(gradient(model, between=replace), plain)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hidden: hidden * float("nan"),
        lambda hidden: hidden[:, :-1],
        lambda hidden: hidden[:-1],
    ],
    ids=["NaN", "tokens", "rows"],
)
def test_bad_data_is_refused_and_asked_of_another(
    swarm: InProcessSwarm, model: Any, plain: Any, spoil: Any
) -> None:
    bad = swarm.add(2, 4)
    swarm.seen_by(model)
    with spoiled(bad, spoil) as used:
        with pytest.raises((MissingBlocksError, BadPeerDataError), match=bad.node.peer_id[-6:]):
            model.blocks[2:4](torch.zeros(ROWS, TOKENS, 64))
        assert used
        swarm.add(2, 4)
        assert_same_gradient(gradient(model), plain)
        failed = model.swarm.directory.view.failed
        assert set(failed) <= {bad.node.peer_id}  # nobody else is blamed


def test_bad_data_from_everybody_is_not_the_servers(swarm: InProcessSwarm, model: Any) -> None:
    one, other = swarm.add(2, 4), swarm.add(2, 4)
    swarm.seen_by(model)
    with spoiled(one, lambda hidden: hidden * float("nan")), spoiled(other, lambda hidden: hidden / 0):
        with pytest.raises(BadPeerDataError, match="NaN") as caught:
            model.blocks[2:4](torch.ones(1, 3, 64))
        assert caught.value.peer in (one.node.peer_id, other.node.peer_id)


def test_nobody_has_the_blocks(model: Any) -> None:
    began = time.monotonic()
    with pytest.raises(MissingBlocksError) as caught:
        model.blocks[1:4](torch.zeros(1, 3, 64))
    assert caught.value.blocks == [(2, 4)]
    assert "nbrunner serve" in str(caught.value)
    assert 3.5 < time.monotonic() - began < 15


def test_waits_for_a_server_that_comes(swarm: InProcessSwarm, model: Any, plain: Any) -> None:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(gradient(model)))
    thread.start()
    swarm.add(2, 4)
    thread.join(30)
    assert_same_gradient(found[0], plain)


def test_interrupt_while_waiting(swarm: InProcessSwarm, model: Any) -> None:
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            model.blocks[1:4](torch.zeros(1, 3, 64))
    finally:
        timer.join()
    assert time.monotonic() - began < 2.5


def test_streams_are_used_again(swarm: InProcessSwarm, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.blocks[0:2](torch.zeros(1, 3, 64))
    opened: list[str] = []
    node = model.swarm.node
    open_stream = node.open_stream

    async def note(peer: str, **kwargs: Any) -> Any:
        opened.append(peer)
        return await open_stream(peer, **kwargs)

    monkeypatch.setattr(node, "open_stream", note)
    for _ in range(3):
        model.blocks[0:2](torch.zeros(1, 3, 64))
    assert opened == []
    streams = model.runner._requests._streams._idle[swarm.servers[0].node.peer_id]

    async def close_idle() -> None:
        for _, stream in streams:
            stream._protocol.abort()

    EngineLoop.get().run(close_idle())  # as a server does that was restarted
    model.blocks[0:2](torch.zeros(1, 3, 64))
    assert opened == [swarm.servers[0].node.peer_id]
    assert not model.swarm.directory.view.failed


def test_nan_is_not_sent(swarm: InProcessSwarm, model: Any) -> None:
    with spoiled(swarm.servers[0], lambda hidden: hidden) as calls:
        embeds = torch.full((1, 3, 64), float("nan"), requires_grad=True)
        with pytest.raises(UserInputError, match="NaN"):
            model(inputs_embeds=embeds, use_cache=False)
        hidden = torch.zeros(1, 3, 64, requires_grad=True)
        output = model.blocks[0:2](hidden)
        with pytest.raises(UserInputError, match="gradient"):
            output.backward(torch.full_like(output, float("inf")))
        assert len(calls) == 1


def test_row_groups() -> None:
    part = Segment(0, 1, torch.zeros(7, 10, 4))
    limits = Limits(batch=3, part_tokens=1000, frame_bytes=1 << 20)
    assert [(one.start, one.stop) for one in row_groups(part, limits)] == [(0, 3), (3, 6), (6, 7)]
    by_tokens = Limits(batch=100, part_tokens=25, frame_bytes=1 << 20)
    assert len(row_groups(part, by_tokens)) == 4
    by_bytes = Limits(batch=100, part_tokens=1000, frame_bytes=2 * (160 + 90))
    assert len(row_groups(part, by_bytes)) == 4
    assert len(row_groups(part, by_bytes, copies_out=2)) == 7
    with pytest.raises(UserInputError, match="cut the text"):
        row_groups(part, Limits(part_tokens=9))
