"""LoRA over real servers: adapters travel once, gradients come back, whoever fails on the way."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import peft
import pytest
import torch
from client_models import GREEDY, left_padded, prompt, save_plain, without_end
from helpers import wait_until
from inprocess_swarm import ROOMY, InProcessSwarm, changed_results, spoiled
from test_peft_local import assert_same, config, fill
from transformers import AutoModelForCausalLM

import nbrunner
from nbrunner.blocks.passes import SpanGradient, SpanOutput
from nbrunner.client.watch import PassWatch, watching
from nbrunner.errors import MissingBlocksError, PeerRefusedError, SessionError, UserInputError
from nbrunner.server.runner import BlockServer
from nbrunner.swarm.loop import EngineLoop

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

IDS, MASK = prompt(4, 12, seed=6), left_padded(4, 12)
LABELS = IDS.masked_fill(MASK == 0, -100)
PADDED: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_plain("llama", folder)
    return folder


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[InProcessSwarm]:
    swarm = InProcessSwarm(folder)
    swarm.add(0, 2)
    yield swarm
    swarm.close()


@pytest.fixture(autouse=True)
def _only_the_first_stays(swarm: InProcessSwarm) -> Iterator[None]:
    yield
    for server in swarm.servers[1:]:
        swarm.remove(server)


@pytest.fixture
def ours(folder: Path, swarm: InProcessSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(folder, invite=swarm.invite, retry_budget=4.0)
    without_end(model)
    adapted = peft.get_peft_model(model, config()).eval()
    fill(adapted)
    yield adapted
    model.close()


@pytest.fixture
def plain(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    without_end(model)
    adapted = peft.get_peft_model(model, config()).eval()
    fill(adapted)
    return adapted


def gradients(model: Any, *, between: Any = lambda: None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**PADDED, labels=LABELS, use_cache=False).loss
    between()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def base(model: Any) -> Any:
    return model.base_model.model


def bytes_sent(model: Any) -> int:
    return base(model).runner._requests.adapters.bytes_sent


def size(model: Any) -> int:
    return sum(one.numel() * one.element_size() for name, one in model.named_parameters() if "lora_" in name)


def spoiled_gradients(server: BlockServer, factor: float) -> Any:
    """A server whose gradients of adapters are multiplied on their way out."""

    def change(result: Any) -> Any:
        if not isinstance(result, SpanGradient):
            return result
        adapters = {
            block: {name: one * factor for name, one in named.items()} for block, named in result.adapters.items()
        }
        return SpanGradient(result.hidden, result.carry, adapters)

    return changed_results(server, change)


def test_gradients_over_two_servers(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    assert_same(gradients(ours), gradients(plain))


def test_an_adapter_is_sent_once_for_each_change(swarm: InProcessSwarm, ours: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    gradients(ours)
    assert bytes_sent(ours) == size(ours)
    gradients(ours)
    ours.generate(**PADDED, **GREEDY)
    assert bytes_sent(ours) == size(ours)
    optimizer = torch.optim.SGD([one for one in ours.parameters() if one.requires_grad], lr=0.1)
    optimizer.step()
    gradients(ours)
    assert bytes_sent(ours) == 2 * size(ours)
    with ours.disable_adapter():
        gradients_of_nothing = ours(**PADDED, use_cache=False).logits
    assert not gradients_of_nothing.requires_grad
    assert bytes_sent(ours) == 2 * size(ours)
    with torch.no_grad():  # one block changes: only that is sent
        base(ours).get_submodule("model.layers.3.mlp.up_proj.lora_B.default").weight.data.mul_(2.0)
    block = sum(
        one.numel() * 4 for name, one in ours.named_parameters() if "lora_" in name and ".layers.3." in name
    )
    gradients(ours)
    assert bytes_sent(ours) == 2 * size(ours) + block


def test_training_in_steps_equals_local(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    losses: list[list[float]] = []
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**PADDED, labels=LABELS).loss  # use_cache left to its default
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    # the trained adapter generates at once
    assert torch.equal(ours.generate(**PADDED, **GREEDY), plain.generate(**PADDED, **GREEDY))


def test_generates_with_it_after_a_server_was_replaced(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    first = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    ids = IDS[1:2]
    with ours.inference_session() as session:
        begun = ours.generate(ids, max_new_tokens=4, do_sample=False, session=session)
        swarm.add(2, 4)
        swarm.seen_by(base(ours))
        swarm.remove(first)
        rest = ours.generate(None, max_new_tokens=6, do_sample=False, session=session)
        assert session.lost
    expected = plain.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(torch.cat([begun, rest], dim=1), expected)


def test_lost_between_forward_and_backward(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    first = swarm.add(2, 4)
    swarm.seen_by(base(ours))

    def replace() -> None:
        swarm.add(2, 4)
        swarm.seen_by(base(ours))
        swarm.remove(first)

    assert_same(gradients(ours, between=replace), gradients(plain))


def test_replaced_by_two_with_other_borders(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    first = swarm.add(2, 4)
    swarm.seen_by(base(ours))

    def replace() -> None:
        swarm.add(1, 3)
        swarm.add(3, 4)
        swarm.seen_by(base(ours))
        swarm.remove(first)

    assert_same(gradients(ours, between=replace), gradients(plain))


def test_dropout_is_the_same_after_a_loss(swarm: InProcessSwarm, ours: Any, folder: Path) -> None:
    """The backward pass runs elsewhere, in other pieces and by single rows, and drops what the forward did."""
    for module in ours.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"] = torch.nn.Dropout(0.4)
    ours.train()
    first = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    torch.manual_seed(11)
    expected = gradients(ours)

    def replace() -> None:
        narrow = msgspec.structs.replace(ROOMY, batch=1)
        swarm.add(2, 3, limits=narrow)
        swarm.add(3, 4)
        swarm.seen_by(base(ours))
        swarm.remove(first)

    torch.manual_seed(11)
    assert_same(gradients(ours, between=replace), expected)


@pytest.mark.parametrize("kind", [SpanOutput, SpanGradient], ids=["forward", "backward"])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["run again", "kept"])
def test_a_server_that_dies_in_the_middle(
    swarm: InProcessSwarm, ours: Any, plain: Any, kind: type, kept_bytes: int
) -> None:
    limits = msgspec.structs.replace(ROOMY, kept_bytes=kept_bytes)
    dying, staying = swarm.add(2, 4, limits=limits), swarm.add(2, 4, limits=limits)
    swarm.seen_by(base(ours))
    asked: list[int] = []
    closing: list[Any] = []

    def die(result: Any) -> Any:
        if not isinstance(result, kind):
            return result
        asked.append(1)
        closing.append(EngineLoop.get().submit(dying.close()))  # its streams end without an answer
        wait_until(lambda: dying.node.closed, what="the server is gone")
        raise RuntimeError("gone")

    with changed_results(dying, die):
        for _ in range(30):  # until the one that dies is asked: which of the two is for the client to choose
            assert_same(gradients(ours), gradients(plain))
            if asked:
                break
    assert asked
    closing[0].result(30)
    swarm.servers.remove(dying)
    assert staying.host.adapters._held


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_gradients_that_are_not_numbers_are_refused(
    swarm: InProcessSwarm, ours: Any, plain: Any, factor: float
) -> None:
    bad = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    with spoiled_gradients(bad, factor) as used:
        with pytest.raises(MissingBlocksError, match=r"lora.*NaN or infinity") as caught:
            gradients(ours)
        assert bad.node.peer_id[-6:] in str(caught.value)
        assert used
        swarm.add(2, 4)
        assert_same(gradients(ours), gradients(plain))
        assert set(base(ours).swarm.directory.view.failed) <= {bad.node.peer_id}


def test_hidden_states_that_are_not_numbers_are_refused(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    bad = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    with spoiled(bad, lambda hidden: hidden * float("nan")):
        with pytest.raises(MissingBlocksError, match=bad.node.peer_id[-6:]):
            gradients(ours)
        swarm.add(2, 4)
        assert_same(gradients(ours), gradients(plain))


def test_the_forward_pass_is_not_run_again(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    ran: list[int] = []
    hook = server.host.span._pruned.originals[2].register_forward_hook(lambda *_: ran.append(1))
    assert_same(gradients(ours), gradients(plain))
    hook.remove()
    assert len(ran) == 1
    assert server.host.kept.nbytes == 0  # once


def test_a_pass_that_is_not_kept_any_more(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))

    def forget() -> None:
        assert server.host.kept.nbytes > 0
        server.host.kept.clear()

    assert_same(gradients(ours, between=forget), gradients(plain))
    assert server.node.peer_id not in base(ours).swarm.directory.view.failed


def test_no_room_to_keep_it(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    server = swarm.add(2, 4, limits=msgspec.structs.replace(ROOMY, kept_bytes=10_000))
    swarm.seen_by(base(ours))
    for _ in range(2):
        assert_same(gradients(ours, between=lambda: None), gradients(plain))
        assert server.host.kept.nbytes == 0
    assert server.host.kept.allowance(2 * IDS.numel()) == 0  # it has learned that, and does not try again


def test_parts_of_a_batch_are_under_way_together(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    """8 rows of 48 tokens over two servers go in 4 groups; the gradients do not notice."""
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    watch = PassWatch()
    with spoiled(server, lambda hidden: hidden) as calls, watching(watch):
        assert_same(wide_gradients(ours), wide_gradients(plain))
        assert len(calls) == 4 + 4
    assert bytes_sent(ours) == size(ours)
    # gradients of the adapter come once, not with each group
    states = WIDE.numel() * 64 * 4
    assert sum(one.bytes_received for one in watch.passes if one.backward) == 2 * states
    assert server.host.sums.nbytes == 0


def test_servers_of_the_same_blocks_share_a_batch(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    one, other = swarm.add(2, 4), swarm.add(2, 4)
    swarm.seen_by(base(ours))
    for server in swarm.servers:  # as fast as each other, whatever was measured on a busy machine
        entry = base(ours).swarm.directory.view.servers[server.node.peer_id]
        record = msgspec.structs.replace(entry.record, prefill_tokens_per_second=1000.0)
        base(ours).swarm.directory.view.servers[server.node.peer_id] = dataclasses.replace(entry, record=record)
    with spoiled(one, lambda hidden: hidden) as some, spoiled(other, lambda hidden: hidden) as others:
        assert_same(wide_gradients(ours), wide_gradients(plain))
    assert (len(some), len(others)) == (4, 4)  # two of four groups each, forwards and backwards


def test_later_servers_are_brought_adapters_meanwhile(
    swarm: InProcessSwarm, ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server answers nothing before the second has what it will need; what fails then is tried again."""
    later = swarm.add(2, 4)
    swarm.seen_by(base(ours))

    def once_it_is_there(hidden: torch.Tensor) -> torch.Tensor:
        wait_until(lambda: later.host.adapters.nbytes > 0, 20, what="the second server has the adapters")
        return hidden

    with spoiled(swarm.servers[0], once_it_is_there):
        assert_same(gradients(ours), gradients(plain))
    sender = base(ours).runner._requests.adapters
    put, failed = sender._put, []

    async def fails_at_first(peer: str, adapters: Any) -> None:
        if peer == later.node.peer_id and not failed:
            failed.append(peer)
            raise PeerRefusedError("no room", peer=peer)
        await put(peer, adapters)

    monkeypatch.setattr(sender, "_put", fails_at_first)
    for model in (ours, plain):
        fill(model, seed=8)
    assert_same(gradients(ours), gradients(plain))
    assert failed
    assert later.node.peer_id not in base(ours).swarm.directory.view.failed


@pytest.mark.parametrize("how", ["cancelled", "an error of what follows"])
def test_a_batch_that_is_stopped(
    how: str, swarm: InProcessSwarm, ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it goes on: the servers are asked for no more, and the next batch is as always."""
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    runner, begun, goes_on, seen = base(ours).runner, [], threading.Event(), []
    begin = runner.begin
    monkeypatch.setattr(runner, "begin", lambda *args, **kwargs: begun.append(begin(*args, **kwargs)) or begun[-1])

    def waits(hidden: torch.Tensor) -> torch.Tensor:
        assert goes_on.wait(30)
        return hidden

    def learn() -> None:
        try:
            wide_gradients(ours)
        except (concurrent.futures.CancelledError, ZeroDivisionError) as error:
            seen.append(error)

    thread = threading.Thread(target=learn)
    if how == "cancelled":
        with spoiled(server, waits) as used:
            thread.start()
            wait_until(lambda: bool(used), 20, what="the second server computes")
            EngineLoop.get().cancel_thread(thread)
            thread.join(20)
            goes_on.set()
    else:
        head = base(ours).nbrunner_skeleton.remote.head
        with monkeypatch.context() as patch:
            patch.setattr(type(head), "begin", lambda *_: SimpleNamespace(follow=lambda *_: 1 / 0))
            thread.start()
            thread.join(20)
    assert [type(error) for error in seen] == [
        concurrent.futures.CancelledError if how == "cancelled" else ZeroDivisionError
    ]
    assert all(one.done() for one in begun[0]._forth.values())
    assert any(one.cancelled() for one in begun[0]._forth.values())
    assert_same(wide_gradients(ours), wide_gradients(plain))


def test_some_rows_of_a_batch_twice(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    found = []
    for model in (ours, plain):
        model.zero_grad()
        logits = model(input_ids=WIDE, attention_mask=WIDE_MASK, use_cache=False).logits
        logits[2:4].square().mean().backward(retain_graph=True)
        logits[5].square().mean().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert_same(*found)


WIDE, WIDE_MASK = prompt(8, 48, seed=3), left_padded(8, 48)


def wide_gradients(model: Any, *, between: Any = lambda: None) -> dict[str, torch.Tensor]:
    """Of a batch that goes in groups."""
    model.zero_grad()
    loss = model(input_ids=WIDE, attention_mask=WIDE_MASK, labels=WIDE, use_cache=False).loss
    between()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_sums_that_are_lost(swarm: InProcessSwarm, ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    expected = wide_gradients(plain)
    sums, taken = server.host.sums, []
    add = sums.add

    def forgotten(*args: Any) -> Any:
        taken.append(1)
        raise PeerRefusedError("gone", code="forgotten")

    with monkeypatch.context() as patch:
        patch.setattr(sums, "take", forgotten)
        assert_same(wide_gradients(ours), expected)
    assert taken == [1]
    with monkeypatch.context() as patch:  # no room: the gradients come at once
        patch.setattr(sums, "add", lambda *args: False)
        assert_same(wide_gradients(ours), expected)

    def twice(*args: Any) -> Any:  # an answer that was lost, and a request that came again
        return add(*args) and add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sums, "add", twice)
        assert_same(wide_gradients(ours), expected)
    assert server.node.peer_id not in base(ours).swarm.directory.view.failed


def test_sums_that_are_wrong(swarm: InProcessSwarm, ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = wide_gradients(plain)
    bad, _ = swarm.add(2, 4), swarm.add(2, 4)
    swarm.seen_by(base(ours))
    take, taken = bad.host.sums.take, []

    def incomplete(*args: Any) -> Any:
        taken.append(1)
        numbers, grads = take(*args)
        return numbers[1:], grads

    monkeypatch.setattr(bad.host.sums, "take", incomplete)
    for _ in range(30):  # until it is asked
        assert_same(wide_gradients(ours), expected)
        if taken:
            break
    assert taken
    assert set(base(ours).swarm.directory.view.failed) <= {bad.node.peer_id}


def test_a_server_that_dies_with_the_sums(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    expected = wide_gradients(plain)
    dying = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    closing: list[Any] = []

    def die(*_: Any) -> Any:
        closing.append(EngineLoop.get().submit(dying.close()))
        raise PeerRefusedError("gone", code="internal")

    dying.host.sums.take = die  # type: ignore[method-assign]

    def another() -> None:
        swarm.add(2, 4)
        swarm.seen_by(base(ours))

    assert_same(wide_gradients(ours, between=another), expected)
    closing[0].result(30)
    swarm.servers.remove(dying)


def test_what_a_server_has_forgotten_is_sent_again(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))
    gradients(ours)
    server.host.adapters._held.clear()
    assert_same(gradients(ours, between=server.host.adapters._held.clear), gradients(plain))
    server.host.adapters._held.clear()
    assert torch.equal(ours.generate(**PADDED, **GREEDY), plain.generate(**PADDED, **GREEDY))


def test_changed_between_forward_and_backward(swarm: InProcessSwarm, ours: Any) -> None:
    server = swarm.add(2, 4)
    swarm.seen_by(base(ours))

    def change() -> None:
        server.host.adapters._held.clear()
        server.host.kept.clear()
        for name, one in ours.named_parameters():
            if "lora_B" in name:
                one.data.add_(1.0)

    with pytest.raises(SessionError, match="before the optimiser's step"):
        gradients(ours, between=change)


def test_small_frames(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    """Adapters and their gradients come in several frames, and blocks in pieces."""
    block = size(ours) // 4
    narrow = msgspec.structs.replace(ROOMY, frame_bytes=block + block // 2)
    swarm.add(2, 4, limits=narrow)
    swarm.seen_by(base(ours))
    assert_same(gradients(ours), gradients(plain))


def test_limits_are_named(swarm: InProcessSwarm, ours: Any) -> None:
    rank = swarm.add(2, 4, limits=msgspec.structs.replace(ROOMY, adapter_rank=3))
    swarm.seen_by(base(ours))
    with pytest.raises(UserInputError, match="rank 4 in block 2, and the server allows 3"):
        gradients(ours)
    with pytest.raises(UserInputError, match="rank 4"):
        ours.generate(**PADDED, **GREEDY)
    swarm.remove(rank)
    small = swarm.add(2, 4, limits=msgspec.structs.replace(ROOMY, adapter_bytes=1000))
    swarm.seen_by(base(ours))
    with pytest.raises(PeerRefusedError, match="you may keep 1000 bytes here"):
        gradients(ours)
    swarm.remove(small)


def test_sessions_pin_what_they_use(swarm: InProcessSwarm, ours: Any, plain: Any) -> None:
    """The store has room for one version: that of an open session is not the one to go."""
    half = size(ours) // 2
    server = swarm.add(2, 4, limits=msgspec.structs.replace(ROOMY, adapter_bytes=half))
    swarm.seen_by(base(ours))
    ids = IDS[1:2]
    with ours.inference_session() as session:
        ours.generate(ids, max_new_tokens=2, do_sample=False, session=session)
        held = set(server.host.adapters._held)
        optimizer = torch.optim.SGD([one for one in ours.parameters() if one.requires_grad], lr=0.1)
        with torch.no_grad():
            for one in optimizer.param_groups[0]["params"]:
                one.mul_(0.5)
        with pytest.raises(PeerRefusedError, match="you may keep"):
            gradients(ours)
        assert set(server.host.adapters._held) == held
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    gradients(ours)


def test_a_server_without_adapters_is_passed_over(
    swarm: InProcessSwarm, ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = swarm.add(2, 4)
    swarm.add(2, 4)
    swarm.seen_by(base(ours))
    streams = base(ours).runner._requests._streams
    features = streams.features
    monkeypatch.setattr(
        streams, "features", lambda peer: frozenset() if peer == old.node.peer_id else features(peer)
    )
    for _ in range(3):
        assert_same(gradients(ours), gradients(plain))
    assert not old.host.adapters._held
