"""Models from `from_pretrained` over real servers: what they are, what they compute, what they leave behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import wait_until
from inprocess_swarm import InProcessSwarm
from transformers import AutoModel, AutoModelForSequenceClassification

import nbrunner
from nbrunner.blocks.shadows import is_hollow
from nbrunner.errors import CheckpointError, InviteError, MissingBlocksError, UserInputError

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

ONE, TWO, MORE = prompt(1), prompt(2, seed=2), prompt(1, 4, seed=3)


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
    for start, end in ((0, 2), (2, 4), (2, 4)):
        swarm.add(start, end)
    yield swarm
    swarm.close()


@pytest.fixture(scope="module")
def model(folder: Path, swarm: InProcessSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=str(swarm.invite))
    without_end(model)
    swarm.seen_by(model)
    yield model
    model.close()


def sessions(swarm: InProcessSwarm) -> int:
    return sum(server.sessions for server in swarm.servers)


def wait_until_free(swarm: InProcessSwarm) -> None:
    wait_until(lambda: sessions(swarm) == 0, 10, what="the servers have freed their caches")


def test_what_it_is(model: Any, plain: Any, swarm: InProcessSwarm) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, type(plain))
    assert not model.training
    assert model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    names = [name for name, parameter in model.named_parameters() if not is_hollow(parameter)]
    assert names == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert model.generation_config.pad_token_id == 0
    assert model.name_or_path == model.config._name_or_path == str(swarm.model)
    assert set(model.swarm.directory.view.servers) == {server.node.peer_id for server in swarm.servers}


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": ONE},
        {"inputs": TWO, "attention_mask": left_padded()},
        {"inputs": TWO, "num_beams": 3},
        {"inputs": TWO, "num_beams": 3, "attention_mask": left_padded(), "num_return_sequences": 2},
        {"inputs": TWO, "do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"inputs": ONE.repeat(1, 2), "prompt_lookup_num_tokens": 3},
        {"inputs": ONE, "guidance_scale": 1.5},
        {"inputs": TWO, "prefill_chunk_size": 5},
        {"inputs": TWO, "use_cache": False},
        {"inputs": prompt(1, 300)[:, :120], "repetition_penalty": 1.2},
    ],
    ids=lambda options: ", ".join(options),
)
def test_generates_what_the_plain_model_does(
    model: Any, plain: Any, swarm: InProcessSwarm, options: dict[str, Any]
) -> None:
    results = []
    for one in (plain, model):
        torch.manual_seed(3)
        results.append(one.generate(**{**GREEDY, **options}))
    assert torch.equal(*results)
    wait_until_free(swarm)


def test_hidden_states_and_logits(model: Any, plain: Any, swarm: InProcessSwarm) -> None:
    with torch.no_grad():
        for cached in (False, True):
            expected = plain(TWO, output_hidden_states=True, use_cache=cached)
            found = model(TWO, output_hidden_states=True, use_cache=cached)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
            assert len(found.hidden_states) == len(expected.hidden_states)
            for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    del found
    wait_until_free(swarm)


def test_session(model: Any, plain: Any, swarm: InProcessSwarm) -> None:
    with model.inference_session() as session:
        first = model.generate(ONE, session=session, **GREEDY)
        assert torch.equal(first, plain.generate(ONE, **GREEDY))
        assert [(start, end) for _, start, end in session.chain] == [(0, 2), (2, 4)]
        assert {peer for peer, _, _ in session.chain} <= {server.node.peer_id for server in swarm.servers}
        assert {timing.peer for timing in session.timings[-1]} == {peer for peer, _, _ in session.chain}
        assert sessions(swarm) == 2
        session.position = 5
        model.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, plain.generate(ONE[:, :5], **GREEDY))
        model.generate(MORE, session=session, num_beams=3, **GREEDY)
        expected = plain.generate(
            torch.cat([plain.generate(ONE[:, :5], **GREEDY), MORE], dim=1), num_beams=3, **GREEDY
        )
        assert torch.equal(session.tokens, expected)
        model.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, plain.generate(expected, **GREEDY))
    wait_until_free(swarm)


@pytest.mark.allow_leaks("another server takes the lost one's place in the swarm of all tests here")
@pytest.mark.parametrize("beams", [1, 3])
def test_a_server_is_lost_in_a_session(model: Any, plain: Any, swarm: InProcessSwarm, beams: int) -> None:
    expected = plain.generate(ONE, num_beams=beams, **GREEDY)

    class LoseOne:
        """Takes the second server of the chain down after some tokens."""

        def __init__(self, session: Any, after: int) -> None:
            self.session, self.left = session, after

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left == 0:
                peer = self.session.chain[1][0]
                swarm.remove(next(one for one in swarm.servers if one.node.peer_id == peer))
            return scores

    with model.inference_session() as session:
        model.generate(ONE, session=session, num_beams=beams, logits_processor=[LoseOne(session, 5)], **GREEDY)
        assert torch.equal(session.tokens, expected)
        model.generate(session=session, **GREEDY)
        assert torch.equal(session.tokens, plain.generate(expected, **GREEDY))
    swarm.add(2, 4)
    swarm.seen_by(model)


def test_an_interrupt_reaches_the_wait_and_the_session_goes_on(
    model: Any, plain: Any, swarm: InProcessSwarm
) -> None:
    server = next(one for one in swarm.servers if one.blocks == (0, 2))
    span = server.host.span
    forward, holding, calls = span.forward, threading.Event(), 0

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
            holding.wait(10)
        return forward(*args, **kwargs)

    with model.inference_session() as session:
        span.forward = slow
        try:
            with pytest.raises(KeyboardInterrupt):
                model.generate(ONE, session=session, **GREEDY)
        finally:
            holding.set()
            del span.forward
        assert session.tokens.shape == (1, 14)  # the prompt, and two tokens that had been through the model
        model.generate(session=session, **GREEDY)
        expected = plain.generate(ONE, max_new_tokens=12, do_sample=False)
        assert torch.equal(session.tokens, expected)
    wait_until_free(swarm)


def test_a_hidden_state_of_another_dtype_is_converted(folder: Path, swarm: InProcessSwarm, plain: Any) -> None:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite, dtype="bfloat16")
    try:
        without_end(model)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            logits = model(ONE).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), plain(ONE).logits.detach(), rtol=0.1, atol=0.3)
        assert model.generate(ONE, **GREEDY).shape == (1, 22)
        embeds = model.get_input_embeddings()(ONE).detach().requires_grad_(True)
        model(inputs_embeds=embeds, use_cache=False).logits.float().pow(2).mean().backward()
        assert embeds.grad.dtype == torch.bfloat16
    finally:
        model.close()


def test_models_of_one_process_share_a_daemon(folder: Path, swarm: InProcessSwarm, model: Any) -> None:
    other = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite)
    assert other.swarm is model.swarm
    other.close()
    assert torch.equal(model.generate(ONE, **GREEDY)[:, :12], ONE)


def test_base_model(folder: Path, swarm: InProcessSwarm) -> None:
    model = nbrunner.AutoDistributedModel.from_pretrained(folder, invite=swarm.invite)
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    try:
        assert type(model).__name__ == "LlamaModel"
        with torch.no_grad():
            found, expected = model(TWO).last_hidden_state, plain(TWO).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert len(model.blocks) == 4
        with pytest.raises(UserInputError, match="ForCausalLM"):
            model.generate(TWO)
    finally:
        model.close()


def test_classification_head_learns(folder: Path, swarm: InProcessSwarm) -> None:
    torch.manual_seed(1)
    model = nbrunner.AutoDistributedModelForSequenceClassification.from_pretrained(
        folder, invite=swarm.invite, num_labels=3, pad_token_id=0
    )
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=0, dtype=torch.float32
    ).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    try:
        assert type(model).__name__ == "LlamaForSequenceClassification"
        assert [name for name, one in model.named_parameters() if one.requires_grad] == ["score.weight"]
        labels = torch.tensor([2, 0])
        losses = []
        for one in (plain, model):
            optimizer = torch.optim.SGD(one.score.parameters(), lr=0.1)
            for _ in range(4):
                optimizer.zero_grad()
                loss = one(TWO, labels=labels).loss
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[:4] == pytest.approx(losses[4:], abs=1e-4)
        assert losses[3] < losses[0]
    finally:
        model.close()


def test_peers_can_be_chosen(folder: Path, swarm: InProcessSwarm) -> None:
    first, *others = [server.node.peer_id for server in swarm.servers]
    for options, wanted in (
        ({"allowed_peers": [first, others[0]]}, others[0]),
        ({"blocked_peers": [others[0]]}, others[1]),
    ):
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite, **options)
        without_end(model)
        try:
            with model.inference_session() as session:
                model.generate(ONE, session=session, max_new_tokens=2)
                assert session.chain[-1][0] == wanted
        finally:
            model.close()


def test_nobody_serves_some_blocks(folder: Path, swarm: InProcessSwarm) -> None:
    first = swarm.servers[0].node.peer_id
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
        folder, invite=swarm.invite, allowed_peers=[first], retry_budget=0.5
    )
    try:
        with pytest.raises(MissingBlocksError) as caught:
            model.generate(ONE, max_new_tokens=2)
        assert caught.value.blocks == [(2, 4)]
    finally:
        model.close()


def test_a_dropped_model_leaves_the_swarm(folder: Path, swarm: InProcessSwarm, model: Any) -> None:
    users = model.swarm._users
    other = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite)
    other.generate(ONE, max_new_tokens=2)
    del other
    gc.collect()
    wait_until(lambda: model.swarm._users == users, 10, what="the connection has been given back")
    wait_until_free(swarm)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"invite": None}, UserInputError, "LocalSwarm"),
        ({"invite": "nbr1-broken"}, InviteError, "copy"),
        ({"model": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all"),
        ({"allowed_peers": "12D3KooW"}, UserInputError, "list of PeerIDs"),
        ({"retry_budget": 0}, UserInputError, "positive"),
        ({"load_in_9bit": True}, UserInputError, "load_in_9bit"),
        ({"dtype": "int3"}, UserInputError, "int3"),
    ],
)
def test_bad_arguments(
    folder: Path, swarm: InProcessSwarm, model: Any, arguments: dict[str, Any], error: type, message: str
) -> None:
    users = model.swarm._users
    with pytest.raises(error, match=message):
        nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
            **{"model": folder, "invite": swarm.invite, **arguments}
        )
    assert model.swarm._users == users


def test_another_revision_is_named(swarm: InProcessSwarm, model: Any, tmp_path: Path) -> None:
    save_plain("llama", tmp_path, seed=9)
    users = model.swarm._users
    with pytest.raises(UserInputError, match="another revision") as caught:
        nbrunner.AutoDistributedModelForCausalLM.from_pretrained(tmp_path, invite=swarm.invite)
    assert model.runner.model in str(caught.value)
    assert model.swarm._users == users


def test_only_from_pretrained_makes_models() -> None:
    with pytest.raises(UserInputError, match="from_pretrained"):
        nbrunner.AutoDistributedModelForCausalLM()


def test_issue_example() -> None:
    """The public names, over real processes, as the README shows them."""
    import transformers

    with nbrunner.LocalSwarm(model="tiny", servers=2) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        tokenizer = transformers.AutoTokenizer.from_pretrained(swarm.model)
        inputs = tokenizer(["The capital of France is"], return_tensors="pt")
        plain = transformers.AutoModelForCausalLM.from_pretrained(swarm.model, dtype=model.dtype)
        expected = plain.generate(**inputs, max_new_tokens=8)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected)
        ids = inputs["input_ids"]
        with model.inference_session() as session:
            model.generate(ids, max_new_tokens=8, session=session)
            session.position = 5
            model.generate(session=session, max_new_tokens=8)
            assert torch.equal(session.tokens, plain.generate(ids[:, :5], max_new_tokens=8))
            assert [(start, end) for _, start, end in session.chain] == [one.blocks for one in swarm.servers]
        hidden = torch.randn(1, 3, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
        model.blocks[2:5](hidden).sum().backward()
        assert hidden.grad.shape == hidden.shape
        model.close()


@pytest.mark.parametrize("ending", ["", "del model", "model.close()"])
def test_a_script_leaves_nothing_whether_it_has_closed_its_model_or_not(
    swarm: InProcessSwarm, folder: Path, ending: str
) -> None:
    """The engine is older than torch in such a script, and is closed after it."""
    code = f"""
import sys
import nbrunner
model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], invite=sys.argv[2])
import torch
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
{ending}
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # short enough for sockets
        ran = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(swarm.invite)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "TMPDIR": place},
        )
        assert ran.returncode == 0, ran.stderr
        assert list(Path(place).glob("nbrunner-*")) == []
