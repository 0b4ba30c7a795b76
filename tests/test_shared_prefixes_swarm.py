"""Sessions of one client that begin alike: computed once, held once, and each with the tokens it has alone."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import at_once, wait_until
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.sessions import OpenSession
from nbrunner.protocol.steps import Hop, Step, StepResult
from nbrunner.protocol.tensors import pack
from nbrunner.swarm.loop import EngineLoop
from nbrunner.swarm.node import Node
from nbrunner.swarm.streams import Stream

pytestmark = pytest.mark.network

SYSTEM = 200
"""Tokens that the sessions have in common."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_plain("llama", folder)


@pytest.fixture(scope="module")
def swarm(folder: Any) -> Iterator[Any]:
    swarm = InProcessSwarm(folder[0])
    swarm.add(0, 2)
    swarm.add(2, 4)
    model = client(swarm)
    yield swarm, folder[1], model
    model.close()
    swarm.close()


def client(swarm: InProcessSwarm) -> Any:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(swarm.model), invite=str(swarm.invite))
    without_end(model)
    swarm.seen_by(model)
    return model


def text(number: int, tokens: int = 7, *, system: int = SYSTEM) -> torch.Tensor:
    """A system prompt, and something of its own."""
    return torch.cat([prompt(1, system, seed=99), prompt(1, tokens, seed=number)], 1)


def used(swarm: InProcessSwarm) -> list[int]:
    return [server.host.quotas.bytes_used for server in swarm.servers]


def frozen(swarm: InProcessSwarm) -> list[int]:
    return [server.host.frozen.nbytes() for server in swarm.servers]


@contextmanager
def computed(swarm: InProcessSwarm) -> Iterator[list[int]]:
    """Tokens × rows that each server has run meanwhile."""
    found, batchers = [], [server.host.batcher for server in swarm.servers]
    with ExitStack() as stack:
        for index, batcher in enumerate(batchers):
            found.append(0)

            def forward(steps: Any, index: int = index, run: Any = batcher.forward) -> Any:
                found[index] += sum(step.rows * step.tokens for step in steps)
                return run(steps)

            batcher.forward = forward
            stack.callback(batcher.__delattr__, "forward")
        yield found


@pytest.fixture(autouse=True)
def _all_memory_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "swarm" in request.fixturenames:
        servers, _, _ = request.getfixturevalue("swarm")
        wait_until(lambda: used(servers) == [0, 0], 10, what="no session holds anything")


def test_a_common_system_prompt_is_held_and_computed_once(swarm: Any) -> None:
    servers, plain, model = swarm
    sessions = [model.inference_session() for _ in range(8)]
    found = [sessions[0].generate(text(0), **GREEDY)]
    alone = used(servers)
    assert frozen(servers) == [0, 0]  # a session by itself shares nothing, and is as fast as it was
    with computed(servers) as tokens:
        found += [session.generate(text(n), **GREEDY) for n, session in enumerate(sessions) if n]
    for number, ours in enumerate(found):
        assert torch.equal(ours, plain.generate(text(number), **GREEDY))
    for one, all_, shared, count in zip(alone, used(servers), frozen(servers), tokens, strict=True):
        assert 0.5 * one < shared < one
        assert all_ < 3 * one  # a prompt and eight answers; by themselves they would hold eight times as much
        assert count < 7 * 32  # what is behind the last common page, and what was generated
    sessions[0].close()
    for session in sessions[1:]:
        session.generate(prompt(1, 3), **GREEDY)
        session.close()


def test_sessions_that_start_together_compute_it_once_and_run_together(swarm: Any) -> None:
    servers, plain, model = swarm
    mask = left_padded(2, SYSTEM + 7)
    ways: list[Callable[[Any], torch.Tensor]] = [
        *(lambda m, number=number: m.generate(text(number, 3 + number), **GREEDY) for number in range(4)),
        lambda m: m.generate(text(5), num_beams=3, **GREEDY),
        lambda m: m.generate(text(6), num_beams=2, num_return_sequences=2, **GREEDY),
        lambda m: m.generate(text(7), prompt_lookup_num_tokens=3, **GREEDY),
        lambda m: m.generate(torch.cat([text(8), text(9)]), attention_mask=mask, **GREEDY),
    ]
    expected = [way(plain) for way in ways]
    with computed(servers) as tokens:
        found = at_once([partial(way, model) for way in ways])
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), number
    # the prompt once for seven of them, and the two padded rows, whose mask nobody else has
    for count, server in zip(tokens, servers.servers, strict=True):
        assert count < 4 * SYSTEM + 8 * 50
        assert server.host.batcher.joined > 0


def test_beams_hold_their_prompt_once(swarm: Any) -> None:
    servers, plain, model = swarm
    session = model.inference_session()
    found = session.generate(text(1), num_beams=6, num_return_sequences=6, **GREEDY)
    assert torch.equal(found, plain.generate(text(1), num_beams=6, num_return_sequences=6, **GREEDY))
    for server, shared, held in zip(servers.servers, frozen(servers), used(servers), strict=True):
        token = server.host.bytes_per_token
        assert shared == (SYSTEM + 7) * token
        assert held - shared <= 6 * 32 * token
    session.close()


def test_a_rollback_into_the_common_part_and_on_from_there(swarm: Any) -> None:
    _, plain, model = swarm
    with model.inference_session() as first, model.inference_session() as second:
        first.generate(text(1), **GREEDY)
        second.generate(text(2), **GREEDY)
        for session, place, seed in ((first, 150, 3), (second, 160, 4), (first, 190, 5), (second, 0, 6)):
            session.position = min(place, session.position)
            new = text(seed) if not place else prompt(1, 60, seed=seed)
            expected = torch.cat([session.tokens.view(1, -1), new], 1)
            session.generate(new, **GREEDY)
            assert torch.equal(session.tokens, plain.generate(expected, **GREEDY))


def test_captures_are_computed_and_edits_are_not_mixed_up(swarm: Any) -> None:
    _, plain, model = swarm
    kept = model.inference_session()
    kept.generate(text(1), **GREEDY)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    ours, theirs = model.generate(text(1), **options), plain.generate(text(1), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    edited = nbrunner.Edit.zero(2)
    with model.inference_session(edits=[edited]) as session:
        changed = session.generate(text(1), **GREEDY)
    assert not torch.equal(changed, kept.tokens)
    kept.close()


def test_other_peers_share_nothing(swarm: Any) -> None:
    servers, _, _ = swarm
    server = servers.servers[0]
    hidden = pack("hidden", torch.randn(1, 64, *server.host.span.hidden_shape))

    async def send(node: Node) -> Stream:
        stream, session = await node.open_stream(server.node.peer_id), secrets.token_hex(16)
        await stream.send(OpenSession(session, server.host.model, 0, 2))
        await stream.send(Step(1, 1, 0, 64, 0, [Hop(server.node.peer_id, session, 0, 2)]), [hidden])
        answers = [(await stream.receive())[0] for _ in range(2)]
        assert isinstance(answers[1], StepResult)
        return stream

    async def talk() -> list[int]:
        nodes = [await Node.create(invite=servers.invite, client_mode=True) for _ in range(2)]
        assert nodes[0].peer_id != nodes[1].peer_id
        counts, streams = [], []
        for node in (nodes[0], nodes[1], nodes[0]):
            with computed(servers) as tokens:
                streams.append(await send(node))
            counts.append(tokens[0])
        for stream in streams:
            stream.close()
        for node in nodes:
            await node.close()
        return counts

    assert EngineLoop.get().run(talk(), timeout=60) == [64, 64, 0]


def test_whoever_waits_goes_on_when_the_other_is_gone(swarm: Any) -> None:
    servers, plain, model = swarm
    host = servers.servers[0].host
    first, second = model.inference_session(), model.inference_session()
    first.generate(prompt(1, 3), **GREEDY)
    (one,) = host.sessions.values()
    second.generate(prompt(1, 3), **GREEDY)
    following = next(other for other in host.sessions.values() if other is not one)
    # the first is about to compute what the second is given next, and never does
    first.position = second.position = 0
    found: list[torch.Tensor] = []
    release = threading.Event()
    held: list[Any] = []
    run = host.batcher.forward

    def forward(steps: Any) -> Any:
        if any(step.tokens > 100 for step in steps) and not held:
            held.append(steps)
            release.wait(20)
            return [RuntimeError("as if it had failed") for _ in steps]
        return run(steps)

    host.batcher.forward = forward
    try:
        threads = [threading.Thread(target=lambda: found.append(first.generate(text(1), **GREEDY)))]
        threads[0].start()
        wait_until(lambda: bool(held), 10, what="the first one computes")
        threads.append(threading.Thread(target=lambda: found.append(second.generate(text(1), **GREEDY))))
        threads[1].start()
        wait_until(lambda: following._busy, 10, what="the second one has arrived")
        release.set()
        for thread in threads:
            thread.join(30)
    finally:
        del host.batcher.forward
    expected = plain.generate(text(1), **GREEDY)
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)
    first.close()
    second.close()


def test_more_sessions_fit_and_a_lost_server_is_replaced(folder: Any) -> None:
    swarm = InProcessSwarm(folder[0])
    swarm.add(0, 2)
    room = 400_000  # one prompt takes some 170,000
    lost = swarm.add(2, 4, limits=Limits(cache_bytes=room, session_tokens=4096, wait_seconds=1.0))
    model, plain = client(swarm), folder[1]
    try:
        sessions = [model.inference_session() for _ in range(6)]
        for number, session in enumerate(sessions):
            found = session.generate(text(number), **GREEDY)
            assert torch.equal(found, plain.generate(text(number), **GREEDY))
        assert lost.host.quotas.bytes_left >= 0
        assert not any(session.lost for session in sessions)
        swarm.add(2, 4, limits=Limits(cache_bytes=room, session_tokens=4096, wait_seconds=1.0))
        swarm.seen_by(model)
        swarm.remove(lost)
        for session in sessions:
            expected = torch.cat([session.tokens, prompt(1, 3)], 1)
            session.generate(prompt(1, 3), **GREEDY)
            assert torch.equal(session.tokens, plain.generate(expected, **GREEDY))
        assert frozen(swarm)[1] > 0
        for session in sessions:
            session.close()
        wait_until(lambda: used(swarm) == [0, 0], 10, what="no session holds anything")
    finally:
        model.close()
        swarm.close()


@pytest.mark.parametrize("family", ["mistral", "qwen3_next"])
def test_families_that_forget_go_on_as_before(family: str, tmp_path: Any) -> None:
    plain = save_plain(family, tmp_path)
    swarm = InProcessSwarm(tmp_path)
    server = swarm.add(0, 4)
    model = client(swarm)
    try:
        assert not server.host.shares_prefixes
        sessions = [model.inference_session() for _ in range(2)]
        for number, session in enumerate(sessions):
            found = session.generate(text(number, system=60), **GREEDY)
            assert torch.equal(found, plain.generate(text(number, system=60), **GREEDY))
            session.close()
        assert server.host.frozen.nbytes() == 0
    finally:
        model.close()
        swarm.close()


def test_two_sessions_over_a_local_swarm() -> None:
    with nbrunner.LocalSwarm("tiny", ["0:3", "3:8"]) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained("tiny", invite=swarm.invite)
        try:
            options = {"max_new_tokens": 12, "do_sample": False}
            texts = [torch.cat([prompt(1, 150, seed=1), prompt(1, 5, seed=2 + n)], 1) for n in range(2)]
            expected = [model.generate(one, **options) for one in texts]
            with model.inference_session() as one, model.inference_session() as other:
                found = [
                    session.generate(text, **options) for session, text in zip((one, other), texts, strict=True)
                ]
                compute = [sum(timing.compute for timing in session.timings[0]) for session in (one, other)]
                assert compute[1] < compute[0]
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
        finally:
            model.close()
