"""Which architectures can be split, found out without weights and before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.families import CORRECTIONS, in_this_release, tiny_config
from transformers import AutoModelForCausalLM, BartConfig, T5Config

from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.examine import DECLARED_UNSUPPORTED, examine
from nbrunner.blocks.span import BlockSpan
from nbrunner.errors import UnsupportedModelError

REFUSED = {
    "bert": "later tokens",
    "deepseek_v4": "token ids",
    "gemma3n_text": "token embeddings",
    "gemma4_text#per_layer_embeddings": "embeddings",
    "gemma4_text#shared_keys": "keys and values that other layers computed",
    "hrm_text": "cannot be given embeddings and a cache",
    "inkling2_text": "token embeddings",
    "mamba": "cache_params",
    "minimax": "cache of its own",
    "recurrent_gemma": "state of a session",
    "rwkv": "state",
    "xlstm": "cache_params",
    "zamba": "share weights",
    "zamba2": "share weights",
}


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_cannot_be_split_is_refused_by_name(name: str, why: str) -> None:
    if not in_this_release(name):
        pytest.skip(f"no {name} in this release of transformers")
    with pytest.raises(UnsupportedModelError) as refusal:
        examine(tiny_config(name))
    family = name.partition("#")[0]
    assert why in refusal.value.reason
    assert refusal.value.model_type == family
    assert family in str(refusal.value)


@pytest.mark.parametrize("config", [BartConfig(), T5Config()], ids=["bart", "t5"])
def test_models_with_an_encoder_are_refused(config) -> None:
    with pytest.raises(UnsupportedModelError, match=r"encoder|no AutoModelForCausalLM"):
        examine(config)


@pytest.mark.parametrize("name", DECLARED_UNSUPPORTED)
def test_a_declared_reason_is_true(name: str) -> None:
    """recurrent_gemma: a plain forward leaves tensors behind in modules, which are neither weights nor buffers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        model(torch.arange(5).unsqueeze(0), use_cache=True)
    kept = [
        attribute
        for module in model.modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor) and id(value) not in known
    ]
    assert "recurrent_states" in kept


def test_nothing_is_read_of_a_model_that_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("zamba")).save_pretrained(tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "gone")
    with pytest.raises(UnsupportedModelError, match="zamba"):
        BlockSpan.load(checkpoint, 0, 2)


def test_what_is_found_out() -> None:
    llama = examine(tiny_config("llama"))
    assert (llama.num_blocks, llama.layers_path, llama.hidden_shape) == (4, "model.layers", (64,))
    assert llama.outside == {"model", "model.rotary_emb"}
    assert llama.slots == tuple(frozenset({index}) for index in range(4))
    assert not any(llama.carry)
    assert examine(tiny_config("opt#350m")).embedding_width == 32
    assert examine(tiny_config("zaya")).carry == (frozenset(), *[frozenset({1})] * 3)
    assert examine(tiny_config("longcat_flash")).slots[1] == {2, 3}
    assert not examine(tiny_config("openai-gpt")).cached


@pytest.mark.skipif(not in_this_release("hy_v4"), reason="no hy_v4 in this release of transformers")
def test_several_streams_are_one_hidden_state() -> None:
    assert len(examine(tiny_config("hy_v4")).hidden_shape) == 2


def test_examining_leaves_the_random_generator_alone() -> None:
    CORRECTIONS["llama#another"] = {"intermediate_size": 80}
    try:
        config = tiny_config("llama#another")
    finally:
        del CORRECTIONS["llama#another"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    examine(config)
    assert torch.equal(torch.get_rng_state(), before)
