"""Hidden states with 8 bits a number: the rounding, what is refused, and a swarm that uses it when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_models import GREEDY, prompt, save_plain, without_end
from hypothesis import given
from hypothesis import strategies as st
from inprocess_swarm import InProcessSwarm

import nbrunner
from nbrunner.client.receipt import model_facts
from nbrunner.errors import BadPeerDataError, UserInputError
from nbrunner.protocol.frames import RawTensor, TensorSpec
from nbrunner.protocol.tensors import pack, pack_8bit, take


def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
    packed = {raw.spec.name: raw for raw in pack_8bit("hidden", tensor)}
    assert sum(raw.spec.nbytes for raw in packed.values()) <= tensor.numel() * 3
    return take(packed, "hidden", dtype=tensor.dtype, shape=list(tensor.shape))


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 7, 64, 96, 130, 256])),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(1e-20, 1e6),
    st.integers(0, 1000),
)
def test_every_number_is_off_by_half_a_step_of_its_group_at_most(
    shape: tuple[int, int, int], dtype: torch.dtype, size: float, seed: int
) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    error = (there_and_back(tensor).float() - tensor.float()).abs()
    most = tensor.float().abs().amax(-1, keepdim=True)
    assert bool((error <= most * (0.5 / 127 + 0.01)).all())
    # a token is what it is, whoever it travels with: a server that is rebuilt gets the same once more
    assert torch.equal(there_and_back(tensor[:, :1]), there_and_back(tensor)[:, :1])
    assert torch.equal(there_and_back(torch.zeros_like(tensor)), torch.zeros_like(tensor))


@pytest.mark.parametrize(
    "scales",
    [
        torch.full((1, 2, 1), -1.0),
        torch.full((1, 2, 1), float("nan")),
        torch.full((1, 2, 1), float("inf")),
        torch.ones(1, 2, 3),
        torch.ones(1, 1, 1),
        torch.ones(2),
        torch.ones(1, 2, 0),
    ],
)
def test_scales_that_make_no_sense_are_refused(scales: torch.Tensor) -> None:
    codes = pack("hidden", torch.ones(1, 2, 8, dtype=torch.uint8))
    tensors = {"hidden": codes, "hidden.scales": pack("hidden.scales", scales.to(torch.bfloat16))}
    with pytest.raises(BadPeerDataError):
        take(tensors, "hidden", dtype=torch.float32, shape=[1, 2, 8])
    wrong = RawTensor(TensorSpec("hidden.scales", "float32", [1, 2, 1]), bytes(8))
    with pytest.raises(BadPeerDataError, match="do not fit"):
        take({"hidden": codes, "hidden.scales": wrong}, "hidden", dtype=torch.float32, shape=[1, 2, 8])
    with pytest.raises(BadPeerDataError, match="shape"):
        take(tensors, "hidden", dtype=torch.float32, shape=[1, 3, 8])


@pytest.mark.network
def test_a_swarm_uses_it_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = save_plain("llama", tmp_path)
    without_end(plain)
    swarm = InProcessSwarm(tmp_path)
    models: list[Any] = []
    try:
        for start, end in ((0, 2), (2, 4), (2, 4)):
            swarm.add(start, end)

        def load(wire: str) -> Any:
            load_it = nbrunner.AutoDistributedModelForCausalLM.from_pretrained
            models.append(load_it(tmp_path, invite=str(swarm.invite), wire=wire))
            without_end(models[-1])
            swarm.seen_by(models[-1])
            return models[-1]

        exact, rounded = load("exact"), load("int8")
        assert [model_facts(model)["wire"] for model in models] == ["exact", "int8"]
        ids = prompt(1)
        with torch.no_grad():
            wanted = plain(ids).logits
            near, same = (model(ids, use_cache=True).logits for model in (rounded, exact))
            assert torch.allclose(same, wanted, atol=1e-5)
            error = float((near - wanted).norm() / wanted.norm())
            assert 1e-4 < error < 0.05
            # without caches, as gradients and traces are computed, everything travels as it is
            assert torch.allclose(rounded(ids, use_cache=False).logits, wanted, atol=1e-5)
        with rounded.inference_session() as session:
            first = rounded.generate(ids, **GREEDY, session=session)
            used = next(peer for peer, start, _ in session.chain if start == 2)
            swarm.remove(next(server for server in swarm.servers if server.node.peer_id == used))
            second = rounded.generate(session=session, **GREEDY)
        whole = rounded.generate(ids, **{**GREEDY, "max_new_tokens": 2 * GREEDY["max_new_tokens"]})
        assert torch.equal(torch.cat([first, second], dim=1), whole)
        with pytest.raises(UserInputError, match="exact"):
            load("fp4")
    finally:
        for model in models:
            model.close()
        swarm.close()
