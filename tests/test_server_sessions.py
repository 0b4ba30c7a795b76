"""Two real server processes, spoken to in the protocol itself: what they compute, repeat, pass on and free."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from server_client import WIDTH, Client, eventually, hidden, info, node, receive, run, spans, swarm, uid

import nbrunner
from nbrunner.blocks.span import BlockSpan
from nbrunner.protocol.messages import AnyMessage
from nbrunner.protocol.requests import Backward, BackwardResult, Forward, ForwardResult
from nbrunner.protocol.status import Ping, Pong
from nbrunner.protocol.steps import CacheOp, Captured
from nbrunner.protocol.tensors import pack, take
from nbrunner.swarm.node import Node

__all__ = ["node", "spans", "swarm", "uid"]

pytestmark = pytest.mark.network


def through(spans: Sequence[BlockSpan], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What plain spans make of consecutive parts: the last part's output."""
    caches = [span.new_cache() for span in spans]
    for part in parts:
        state = part
        for span, cache in zip(spans, caches, strict=True):
            state = span.forward(state, cache=cache).hidden
    return state


# -- what they compute -------------------------------------------------------------------------------------------


def test_a_chained_session_computes_what_the_blocks_compute(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    parts = [hidden(7, seed=1), hidden(1, seed=2), hidden(1, seed=3)]

    async def talk() -> list[torch.Tensor]:
        client = await Client.open(node, swarm, uid)
        outputs, at = [], 0
        for number, tensor in enumerate(parts, 1):
            await client.send(number, at, tensor, route=client.route(at, at))
            outputs.append(await client.result(tensor.shape[1]))
            at += tensor.shape[1]
        client.close()
        return outputs

    outputs = run(talk())
    for count, output in enumerate(outputs, 1):
        assert torch.equal(output, through(spans, parts[:count]))


def test_parts_masks_and_beams(swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]) -> None:
    prompt, token = hidden(6, batch=2, seed=4), hidden(1, batch=3, seed=5)
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[0, :2] = False
    later = torch.cat([mask[[1, 0, 0]], torch.ones((3, 1), dtype=torch.bool)], 1)

    async def talk() -> list[torch.Tensor]:
        client = await Client.open(node, swarm, uid)
        attempt = None
        for begin in (0, 4):
            tensor = prompt[:, begin : begin + 4]
            attempt = await client.send(
                1,
                begin,
                tensor,
                route=client.route(0, 0),
                end=6,
                reply_from=0,
                attempt=attempt,
                more=[pack("mask", mask)],
            )
        first = await client.result(6, batch=2)
        select = [CacheOp("select", rows=[1, 0, 0])]
        await client.send(2, 6, token, route=client.route(6, 6), ops=select, more=[pack("mask", later)])
        second = await client.result(1, batch=3)
        client.close()
        return [first, second]

    first, second = run(talk())
    caches = [span.new_cache() for span in spans]
    expected = []
    for begin, end in ((0, 4), (4, 6)):
        state = prompt[:, begin:end]
        for span, cache in zip(spans, caches, strict=True):
            state = span.forward(state, cache=cache, attention_mask=mask[:, :end]).hidden
        expected.append(state)
    assert torch.equal(first, torch.cat(expected, 1))
    state = token
    for span, cache in zip(spans, caches, strict=True):
        assert cache is not None
        cache.select([1, 0, 0])
        state = span.forward(state, cache=cache, attention_mask=later).hidden
    assert torch.equal(second, state)


def test_capture_sends_what_enters_each_block_and_again_on_a_retry(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    tensor = hidden(3, seed=6)

    async def talk() -> list[tuple[AnyMessage, torch.Tensor]]:
        client = await Client.open(node, swarm, uid)
        found = []
        for _ in range(2):
            await client.send(1, 0, tensor, route=client.route(0, 0), capture=True)
            for stream, blocks in zip(client.streams, client.ranges, strict=True):
                message, tensors = await receive(stream)
                shape = [blocks[1] - blocks[0], 1, 3, WIDTH]
                found.append((message, take(tensors, "states", dtype=torch.bfloat16, shape=shape)))
            await client.result(3)
        client.close()
        return found

    found = run(talk())
    first = spans[0].forward(tensor, cache=spans[0].new_cache(), collect=True)
    second = spans[1].forward(first.hidden, cache=spans[1].new_cache(), collect=True)
    for attempt in (0, 2):
        assert torch.equal(found[attempt][1], torch.stack(first.collected))
        assert torch.equal(found[attempt + 1][1], torch.stack(second.collected))
    assert [(m.start, m.end, m.position) for m, _ in found[:2] if isinstance(m, Captured)] == [(0, 3, 0), (3, 8, 0)]


def test_forward_and_backward_without_a_session(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    tensor, grad = hidden(5, batch=2, seed=7), hidden(5, batch=2, seed=8)

    async def talk() -> list[torch.Tensor]:
        stream = await node.open_stream(swarm.servers[1].peer_id)
        await stream.send(Forward(uid, 4, 7, capture=True), [pack("hidden", tensor)])
        message, tensors = await receive(stream)
        assert isinstance(message, ForwardResult)
        output = take(tensors, "hidden", dtype=torch.bfloat16, shape=[2, 5, WIDTH])
        states = take(tensors, "states", dtype=torch.bfloat16, shape=[3, 2, 5, WIDTH])
        await stream.send(Backward(uid, 4, 7), [pack("hidden", tensor), pack("grad", grad)])
        message, tensors = await receive(stream)
        assert isinstance(message, BackwardResult)
        stream.close()
        return [output, states, take(tensors, "grad", dtype=torch.bfloat16, shape=[2, 5, WIDTH])]

    output, states, gradient = run(talk())
    expected = spans[1].forward(tensor, start=4, end=7, collect=True)
    assert torch.equal(output, expected.hidden)
    assert torch.equal(states, torch.stack(expected.collected))
    assert torch.equal(gradient, spans[1].backward(tensor, grad, start=4, end=7).hidden)


# -- repetition and recovery -------------------------------------------------------------------------------------


def test_a_repeated_step_is_answered_again_and_computed_once(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(4, seed=9), hidden(1, seed=10)

    async def talk() -> tuple[list[torch.Tensor], int]:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(4)
        answers = []
        for _ in range(3):
            await client.send(2, 4, token, route=client.route(4, 4), ops=[CacheOp("crop", 4)])
            answers.append(await client.result(1))
        await client.streams[1].send(Ping(5))
        pong, _ = await receive(client.streams[1])
        client.close()
        assert isinstance(pong, Pong)
        return answers, pong.length

    answers, length = run(talk())
    assert length == 5
    for answer in answers:
        assert torch.equal(answer, through(spans, [prompt, token]))


def test_a_new_second_server_is_filled_by_the_first(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(9, seed=11), hidden(1, seed=12)

    async def talk() -> torch.Tensor:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(9)
        client.streams[1].close()  # the second server forgets the session; another takes its place
        await client.add(1, client.peers[0])
        await client.send(2, 9, token, route=client.route(9, 0, rebuild=(False, True)))
        output = await client.result(1)
        client.close()
        return output

    assert torch.equal(run(talk()), through(spans, [prompt, token]))


def test_a_new_first_server_is_filled_by_the_client_and_the_second_sees_only_new_tokens(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]
) -> None:
    prompt, token = hidden(9, seed=13), hidden(1, seed=14)

    async def talk() -> tuple[torch.Tensor, int]:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(9)
        client.streams[0].close()
        await client.add(0, None)
        everything = torch.cat([prompt, token], 1)
        await client.send(2, 0, everything, route=client.route(0, 9, rebuild=(True, False)), reply_from=9)
        output = await client.result(1)
        await client.streams[1].send(Ping(1))
        pong, _ = await receive(client.streams[1])
        client.close()
        assert isinstance(pong, Pong)
        return output, pong.length

    output, length = run(talk())
    assert length == 10
    # ten tokens at once and nine and one differ in the last bit of bfloat16
    torch.testing.assert_close(output, through(spans, [prompt, token]), atol=0.15, rtol=0.05)


def test_rolling_back(swarm: nbrunner.LocalSwarm, node: Node, uid: str, spans: list[BlockSpan]) -> None:
    prompt, wrong, right = hidden(6, seed=15), hidden(1, seed=16), hidden(1, seed=17)

    async def talk() -> torch.Tensor:
        client = await Client.open(node, swarm, uid)
        await client.send(1, 0, prompt, route=client.route(0, 0))
        await client.result(6)
        await client.send(2, 6, wrong, route=client.route(6, 6))
        await client.result(1)
        await client.send(3, 6, right, route=client.route(6, 6), ops=[CacheOp("crop", 6)])
        output = await client.result(1)
        client.close()
        return output

    assert torch.equal(run(talk()), through(spans, [prompt, right]))


def test_caches_are_freed_when_the_stream_ends_in_the_middle_of_a_step(
    swarm: nbrunner.LocalSwarm, node: Node, uid: str
) -> None:
    peer = swarm.servers[0].peer_id

    async def talk() -> None:
        async def unused() -> bool:
            record = (await info(node, peer)).record
            return record.sessions == 0 and record.cache_bytes_left == (await info(node, peer)).limits.cache_bytes

        await eventually(unused)
        client = await Client.open(node, swarm, uid)
        for part in range(4):
            await client.send(
                1, part * 512, hidden(512), route=client.route(0, 0), end=2048, attempt=1, reply_from=0
            )
        client.close()
        await eventually(unused)

    run(talk())
