"""Servers are lost at every moment, in every way: the tokens stay those of the plain model."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import Leftovers, wait_until
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nbrunner
from nbrunner.swarm import shortcut

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(180),
    pytest.mark.allow_leaks("tests add servers to the module's swarm; looked at when the module ends"),
]

BLOCKS = 8
VOCABULARY = 200


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind_in_the_end() -> Iterator[None]:
    before = Leftovers.now()
    yield
    assert before.wait_until_gone(timeout=15.0) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)  # else a random model's layers hardly matter, and a lost cache would not show
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["daemons", "shortcuts"])
def swarm(
    nothing_left_behind_in_the_end: None, checkpoint: Path, request: pytest.FixtureRequest
) -> Iterator[nbrunner.LocalSwarm]:
    """Whose members talk through their daemons, as on several machines, or past them, as on one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "daemons":
            patch.setenv(shortcut.OFF, "0")
        with nbrunner.LocalSwarm(model=str(checkpoint), servers=["0:3", "3:8", "0:3", "3:8"]) as swarm:
            yield swarm


@pytest.fixture(scope="module")
def remote(checkpoint: Path, swarm: nbrunner.LocalSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(str(checkpoint), invite=swarm.invite)
    yield model
    model.close()


@pytest.fixture(autouse=True)
def complete(swarm: nbrunner.LocalSwarm, remote: Any) -> None:
    """Two servers for each span, and known to the client, before each test."""
    for start, end in ((0, 3), (3, BLOCKS)):
        alive = [one for one in swarm.servers if one.alive and one.blocks == (start, end)]
        for _ in range(2 - len(alive)):
            swarm.add_server(f"{start}:{end}")
    wanted = {one.peer_id for one in swarm.servers if one.alive}
    directory = remote.swarm.directory
    for server in swarm.servers:
        if not server.alive and server.peer_id in usable(directory):
            directory.mark_failed(server.peer_id, "killed by an earlier test")
    wait_until(lambda: wanted == usable(directory), 60, what="the client knows all servers")


def usable(directory: Any) -> set[str]:
    return {peer for peer, entry in directory.view.servers.items() if entry.record.state == "online"}


def prompt(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def server_of(swarm: nbrunner.LocalSwarm, peer: str) -> Any:
    return next(server for server in swarm.servers if server.peer_id == peer)


class At:
    """A streamer that does something when a certain token has come."""

    def __init__(self, token: int, action: Callable[[], None]) -> None:
        self.count = 0
        self.token = token
        self.action = action

    def put(self, value: torch.Tensor) -> None:
        if self.count == self.token:
            self.action()
        self.count += 1

    def end(self) -> None:
        pass


def kill(server: Any) -> None:
    server.kill()


def stop_process(server: Any) -> None:
    os.kill(server.pid, signal.SIGSTOP)


def ask_to_leave(server: Any) -> None:
    os.kill(server.pid, signal.SIGTERM)


def stop_daemon(server: Any) -> None:
    """The network goes away under a server that itself is well."""
    (daemon,) = [child for child in psutil.Process(server.pid).children() if child.name() == "p2pd"]
    daemon.kill()


@pytest.fixture
def doomed() -> Iterator[list[Any]]:
    servers: list[Any] = []
    yield servers
    for server in servers:
        server.kill()  # also one that is only stopped
        wait_until(lambda server=server: not server.alive, 10, what="the victim is gone")


@pytest.mark.parametrize("hop", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("harm", [kill, stop_process, ask_to_leave, stop_daemon])
def test_lost_while_decoding(
    swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any], harm: Callable[[Any], None], hop: int
) -> None:
    ids = prompt(1, 12)
    expected = plain.generate(ids, max_new_tokens=24, do_sample=False)
    with remote.inference_session() as session:

        def act() -> None:
            victim = server_of(swarm, session.chain[hop][0])
            doomed.append(victim)
            harm(victim)

        got = remote.generate(ids, max_new_tokens=24, do_sample=False, session=session, streamer=At(9, act))
        peers = [peer for peer, _, _ in session.chain]
        if harm is not ask_to_leave:  # one that leaves politely may still finish what it has
            assert doomed[0].peer_id not in peers
        assert torch.equal(got, expected)


@pytest.mark.parametrize("hop", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("harm", [kill, stop_process, ask_to_leave, stop_daemon])
def test_lost_in_the_middle_of_a_prefill(
    swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any], harm: Callable[[Any], None], hop: int
) -> None:
    ids, more = prompt(1, 6), prompt(1, 700, seed=2)
    whole = torch.cat([plain.generate(ids, max_new_tokens=1, do_sample=False), more], dim=1)
    expected = plain.generate(whole, max_new_tokens=4, do_sample=False)
    with remote.inference_session() as session:
        remote.generate(ids, max_new_tokens=1, do_sample=False, session=session)
        victim = server_of(swarm, session.chain[hop][0])
        doomed.append(victim)
        # stopped, so that the prefill is certainly on its way and not done when the harm comes
        stop_process(victim)

        def act() -> None:
            harm(victim)
            if harm in (ask_to_leave, stop_daemon):
                os.kill(victim.pid, signal.SIGCONT)

        later = threading.Timer(0.5, act)
        later.start()
        got = remote.generate(more, max_new_tokens=4, do_sample=False, session=session)
        later.join()
        assert torch.equal(session.tokens, expected)
        assert torch.equal(got, expected[:, -more.shape[1] - 4 :])


def test_both_lost_at_once(swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any]) -> None:
    ids = prompt(1, 12)
    expected = plain.generate(ids, max_new_tokens=20, do_sample=False)
    with remote.inference_session() as session:

        def act() -> None:
            for peer, _, _ in session.chain:
                doomed.append(server_of(swarm, peer))
                doomed[-1].kill()

        got = remote.generate(ids, max_new_tokens=20, do_sample=False, session=session, streamer=At(7, act))
        assert torch.equal(got, expected)


def test_beams_and_padded_batches(swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any]) -> None:
    ids = prompt(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 14, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    expected = plain.generate(ids, **settings)
    calls = 0

    def act(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            for peer, start, _ in session.chain:
                if start:
                    doomed.append(server_of(swarm, peer))
                    doomed[-1].kill()
        return scores

    with remote.inference_session() as session:
        got = remote.generate(ids, session=session, logits_processor=[act], **settings)
    assert doomed
    assert torch.equal(got, expected)


def test_after_a_rollback(swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any]) -> None:
    ids = prompt(1, 12)
    with remote.inference_session() as session:
        remote.generate(ids, max_new_tokens=8, do_sample=False, session=session)
        session.position = 5
        doomed.append(server_of(swarm, session.chain[0][0]))
        doomed[0].kill()
        remote.generate(prompt(1, 3, seed=4), max_new_tokens=8, do_sample=False, session=session)
        whole = torch.cat([ids[:, :5], prompt(1, 3, seed=4)], dim=1)
        assert torch.equal(session.tokens, plain.generate(whole, max_new_tokens=8, do_sample=False))


def test_one_replaced_by_two(swarm: nbrunner.LocalSwarm, plain: Any, remote: Any, doomed: list[Any]) -> None:
    halves = [swarm.add_server("3:5"), swarm.add_server("5:8")]
    doomed.extend(halves)
    directory = remote.swarm.directory
    wait_until(lambda: {half.peer_id for half in halves} <= usable(directory), 60, what="the halves are known")
    ids = prompt(1, 12)
    expected = plain.generate(ids, max_new_tokens=20, do_sample=False)
    with remote.inference_session() as session:

        def act() -> None:
            for server in swarm.servers:
                if server.alive and server.blocks == (3, BLOCKS):
                    doomed.append(server)
                    server.kill()

        first = [peer for peer, _, _ in session.chain]
        got = remote.generate(ids, max_new_tokens=20, do_sample=False, session=session, streamer=At(8, act))
        assert torch.equal(got, expected)
        assert [(start, end) for _, start, end in session.chain] == [(0, 3), (3, 5), (5, 8)], first


def test_a_broken_link_is_bridged_by_the_client(plain: Any, remote: Any, swarm: nbrunner.LocalSwarm) -> None:
    ids = prompt(2, 9)
    directory = remote.swarm.directory
    peers = {span: [one.peer_id for one in swarm.servers if one.alive and one.blocks == span] for span in spans()}
    for near in peers[0, 3]:
        for far in peers[3, 8]:
            directory.mark_link_failed(near, far)
    with remote.inference_session() as session:
        got = remote.generate(ids, max_new_tokens=10, do_sample=False, session=session)
        assert len(session.chain) == 2
    assert torch.equal(got, plain.generate(ids, max_new_tokens=10, do_sample=False))


def test_a_path_loses_a_server_and_a_step(remote: Any, swarm: nbrunner.LocalSwarm) -> None:
    """A server dies under a run in the middle, then a module fails after blocks that had taken the step."""

    class Failing(torch.nn.Module):
        after = 1 << 30

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.after -= 1
            if self.after == 0:
                raise RuntimeError("out of order")
            return hidden * 1.01

    failing = Failing()
    path = remote.path([*range(5), failing, 2, 7, 7])
    how: dict[str, Any] = {"do_sample": False}
    wanted = path.generate(prompt(1, 6), max_new_tokens=16, **how)
    with path.inference_session() as session:
        path.generate(prompt(1, 6), max_new_tokens=2, session=session, **how)
        victim = server_of(swarm, session.chain[-1][0])
        path.generate(max_new_tokens=6, session=session, streamer=At(3, victim.kill), **how)
        assert victim.peer_id in {peer for peer, _ in session.lost}
        failing.after = 3
        with pytest.raises(RuntimeError, match="out of order"):
            path.generate(max_new_tokens=8, session=session, **how)
        failing.after = 1 << 30
        path.generate(max_new_tokens=22 - session.tokens.shape[1], session=session, **how)
        assert torch.equal(session.tokens, wanted)


def spans() -> list[tuple[int, int]]:
    return [(0, 3), (3, BLOCKS)]


def test_nobody_left(checkpoint: Path) -> None:
    budget = 3.0
    with nbrunner.LocalSwarm(model=str(checkpoint), servers=["0:3", "3:8"]) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
            str(checkpoint), invite=swarm.invite, retry_budget=budget
        )
        with model.inference_session() as session:
            last = server_of(swarm, model_chain_peer(model, session))
            began = time.monotonic()
            with pytest.raises(nbrunner.MissingBlocksError) as caught:
                model.generate(
                    prompt(1, 5), max_new_tokens=50, do_sample=False, session=session, streamer=At(4, last.kill)
                )
        assert caught.value.blocks == [(3, 8)]
        assert "nbrunner serve" in str(caught.value)
        assert time.monotonic() - began < budget + 10
        model.close()


def model_chain_peer(model: Any, session: Any) -> str:
    model.generate(prompt(1, 4, seed=9), max_new_tokens=1, session=session)
    return str(session.chain[-1][0])
