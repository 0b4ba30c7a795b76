"""Stock PEFT around a client's model whose blocks are elsewhere, against PEFT around the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from client_models import GREEDY, Pair, left_padded, make_pair, prompt
from parity.chain import local_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.shadows import is_hollow
from nbrunner.errors import SessionError, UserInputError

IDS, MASK = prompt(3, 12), left_padded(3, 12)
LABELS = IDS.masked_fill(MASK == 0, -100)
PADDED: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}

FAMILIES = ["llama", "gpt2", "bloom"]  # gpt2: Conv1D; bloom: one fused projection, alibi


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return make_pair(request.param, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return make_pair("llama", tmp_path / "model")


def config(**options: Any) -> Any:
    return peft.LoraConfig(
        **{"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    )


def fill(model: Any, seed: int = 0) -> None:
    """PEFT begins with B = 0, where half of all mistakes cannot be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def both(pair: Pair, **options: Any) -> tuple[Any, Any]:
    """(ours, plain), each wrapped by PEFT, with the same adapter."""
    models = (peft.get_peft_model(pair.ours, config(**options)), peft.get_peft_model(pair.plain, config(**options)))
    for model in models:
        fill(model)
        model.eval()
    return models


def loss_of(model: Any) -> torch.Tensor:
    return model(**PADDED, labels=LABELS, use_cache=False).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**PADDED, use_cache=False).logits


def test_the_same_names_and_shapes(pair: Pair) -> None:
    ours, plain = both(pair)

    def learned(model: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}

    assert learned(ours) == learned(plain)
    assert all("lora_" in name for name in learned(ours))
    assert ours.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_loss_and_gradients(pair: Pair) -> None:
    ours, plain = both(pair)
    torch.testing.assert_close(loss_of(ours), loss_of(plain), rtol=1e-6, atol=1e-6)
    found = gradients(ours)
    assert all(bool(one.abs().max() > 0) for one in found.values())
    assert_same(found, gradients(plain))


def test_a_cache_that_was_asked_for_gives_no_gradient_and_says_so(llama: Pair) -> None:
    """Only what is inside the blocks learns: nothing before them would notice that the gradient stops there."""
    ours, _ = both(llama)
    loss = ours(**PADDED, labels=LABELS, use_cache=True).loss
    with pytest.raises(UserInputError, match="gradients cannot flow through caches"):
        loss.backward()


def test_steps_of_adam(pair: Pair) -> None:
    """From PEFT's own beginning, B = 0."""
    torch.manual_seed(3)
    ours = peft.get_peft_model(pair.ours, config())
    torch.manual_seed(3)
    plain = peft.get_peft_model(pair.plain, config())
    losses: list[list[float]] = []
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


def test_with_embeddings_that_learn_too(llama: Pair) -> None:
    ours, plain = both(llama)
    for model in (ours, plain):
        model.get_input_embeddings().weight.requires_grad_(True)
    assert_same(gradients(ours), gradients(plain))


def test_only_late_blocks_learn(llama: Pair) -> None:
    ours, plain = both(llama, layers_to_transform=[2], target_modules=["q_proj", "down_proj"])
    assert_same(gradients(ours), gradients(plain))


def test_generates_with_it_at_once(pair: Pair) -> None:
    ours, plain = both(pair)
    assert torch.equal(ours.generate(**PADDED, **GREEDY), plain.generate(**PADDED, **GREEDY))
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**PADDED, **beams), plain.generate(**PADDED, **beams))


def test_disable_adapter(llama: Pair) -> None:
    bare = logits(llama.plain)
    ours, plain = both(llama)
    adapted = logits(ours)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), bare)
        without = ours.generate(**PADDED, **GREEDY)
    with plain.disable_adapter():
        assert torch.equal(without, plain.generate(**PADDED, **GREEDY))
    torch.testing.assert_close(logits(ours), adapted)
    assert float((adapted - bare).abs().max()) > 0.1


def test_two_adapters_add_up_and_are_switched(llama: Pair) -> None:
    ours, plain = both(llama)
    for model in (ours, plain):
        model.add_adapter("other", config(r=2, target_modules=["q_proj", "o_proj"]))
        fill(model, seed=1)
        model.set_adapter("other")
    torch.testing.assert_close(logits(ours), logits(plain))
    one = logits(ours)
    for model in (ours, plain):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(ours), logits(plain))
    assert float((logits(ours) - one).abs().max()) > 0.01
    assert_same(gradients(ours), gradients(plain))


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}}]
)
def test_other_scalings_and_ranks(llama: Pair, options: dict[str, Any]) -> None:
    ours, plain = both(llama, **options)
    assert_same(gradients(ours), gradients(plain))


def test_saved_here_loads_onto_the_full_model(pair: Pair, tmp_path: Path) -> None:
    ours, plain = both(pair)
    ours.save_pretrained(tmp_path / "a")
    plain.save_pretrained(tmp_path / "b")
    mine, theirs = (load_file(tmp_path / one / "adapter_model.safetensors") for one in "ab")
    assert mine.keys() == theirs.keys()
    full = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32).eval()
    full = peft.PeftModel.from_pretrained(full, tmp_path / "a").eval()
    torch.testing.assert_close(logits(full), logits(ours))


def test_saved_by_others_goes_on_learning_here(pair: Pair, tmp_path: Path) -> None:
    _, plain = both(pair)
    plain.save_pretrained(tmp_path / "theirs")
    fresh = local_model(resolve_checkpoint(pair.folder), 2)
    ours = peft.PeftModel.from_pretrained(fresh, tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(logits(ours), logits(plain))
    assert_same(gradients(ours), gradients(plain))


def test_the_model_itself_is_saved_without_shadows(llama: Pair, tmp_path: Path) -> None:
    ours = llama.ours
    assert set(ours.state_dict()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert ours.load_state_dict(ours.state_dict()) is not None
    hollow = [one for one in ours.parameters() if is_hollow(one)]
    assert sum(one.untyped_storage().nbytes() for one in hollow) == 4 * len(hollow)
    assert sum(one.numel() for one in ours.parameters()) == sum(one.numel() for one in llama.plain.parameters())
    before = [one.dtype for one in hollow]
    ours.to(torch.float64).to(torch.float32)
    assert [one.dtype for one in hollow] == before
    assert all(is_hollow(one) for one in hollow)


# -- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_drops_while_training_and_only_then(llama: Pair) -> None:
    ours, plain = both(llama, lora_dropout=0.5)
    torch.testing.assert_close(logits(ours), logits(plain))
    ours.train()
    torch.manual_seed(5)
    once = logits(ours)
    again = logits(ours)
    torch.manual_seed(5)
    torch.testing.assert_close(logits(ours), once)
    assert float((once - again).abs().max()) > 1e-3
    assert float((once - logits(plain)).abs().max()) > 1e-3


def test_the_gradient_is_that_of_what_was_dropped(llama: Pair) -> None:
    """Along the gradient the loss must change as the gradient says: only true if the backward drops the same."""
    ours, _ = both(llama, lora_dropout=0.3)
    ours.train()

    def seeded() -> torch.Tensor:
        torch.manual_seed(7)
        return loss_of(ours)

    ours.zero_grad()
    seeded().backward()
    learned = [one for one in ours.parameters() if one.requires_grad]
    square = sum(float(one.grad.square().sum()) for one in learned)
    step = 2e-3 / square**0.5
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            for one in learned:
                one.add_(sign * step * one.grad)
            ends.append(float(seeded()))
            for one in learned:
                one.sub_(sign * step * one.grad)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(square, rel=0.02)


def test_dropout_is_the_same_however_the_chain_is_cut(llama: Pair, tmp_path: Path) -> None:
    ours, _ = both(llama, lora_dropout=0.5)
    ours.save_pretrained(tmp_path / "a")
    other = peft.PeftModel.from_pretrained(
        local_model(resolve_checkpoint(llama.folder), 3), tmp_path / "a", is_trainable=True
    )
    found = []
    for model in (ours, other):
        model.train()
        torch.manual_seed(5)
        found.append(logits(model))
    torch.testing.assert_close(*found)


# -- sessions, paths, blocks, traces -------------------------------------------------------------------------------


def test_a_session_keeps_to_its_adapter(llama: Pair) -> None:
    ours, plain = both(llama)
    with ours.inference_session() as session:
        first = ours.generate(IDS[1:2], max_new_tokens=4, do_sample=False, session=session)
        assert torch.equal(first, plain.generate(IDS[1:2], max_new_tokens=4, do_sample=False))
        with ours.disable_adapter(), pytest.raises(SessionError, match="adapter"):
            ours.generate(None, max_new_tokens=2, session=session)
        fill(ours, seed=9)
        with pytest.raises(SessionError, match="trained since"):
            ours.generate(None, max_new_tokens=2, session=session)


def test_a_path_has_the_adapters_of_its_blocks(llama: Pair) -> None:
    ours, plain = both(llama)
    path = ours.path([0, 1, 2, 2, 3])
    inner = plain.base_model.model.model
    inner.layers = torch.nn.ModuleList([inner.layers[one] for one in (0, 1, 2, 2, 3)])
    inner.config.num_hidden_layers = 5
    torch.testing.assert_close(logits(path), logits(plain))
    ours.zero_grad()
    loss_of(path).backward()
    plain.zero_grad()
    loss_of(plain).backward()
    there = {
        name.replace("layers.4.", "layers.3."): one.grad
        for name, one in plain.named_parameters()
        if one.grad is not None
    }
    here = {name: one.grad for name, one in ours.named_parameters() if one.grad is not None}
    assert_same(here, there)


def test_blocks_by_themselves_are_adapted_too(llama: Pair) -> None:
    ours, plain = both(llama)
    with torch.no_grad():
        states = plain(IDS, output_hidden_states=True).hidden_states
        blocks = ours.blocks[1:3]
        torch.testing.assert_close(blocks(states[1]), states[3])
        with blocks.inference_session() as session:
            torch.testing.assert_close(session.step(states[1][:, :5]), states[3][:, :5])
    ours.zero_grad()
    ours.blocks[1:3](states[1]).pow(2).mean().backward()
    touched = {name.split(".")[4] for name, one in ours.named_parameters() if one.grad is not None}
    assert touched == {"1", "2"}


def test_a_trace_sees_it(llama: Pair) -> None:
    ours, plain = both(llama)
    trace = ours.trace(IDS[1], keep=("hidden",))
    states = plain(IDS[1:2], output_hidden_states=True).hidden_states
    torch.testing.assert_close(trace.hidden[2], states[2][0])


def test_hidden_states_in_the_loss(llama: Pair) -> None:
    ours, plain = both(llama)
    found = []
    for model in (ours, plain):
        model.zero_grad()
        output = model(**PADDED, use_cache=False, output_hidden_states=True)
        (output.hidden_states[2].sin().mean() + output.logits.pow(2).mean()).backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert_same(*found)


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["mlp"]}, "ModulesToSave"),
        ({"init_lora_weights": "pissa"}, "initialisation"),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    pair = make_pair("gpt2", tmp_path)
    target = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    ours = peft.get_peft_model(pair.ours, config(**{**target, **options}))
    with pytest.raises(UserInputError, match=named) as caught:
        loss_of(ours)
    assert "use_dora" in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["q_proj"], r=2),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    ],
    ids=lambda one: type(one).__name__,
)
def test_other_methods_are_refused_by_name(llama: Pair, other: Any) -> None:
    ours = peft.get_peft_model(llama.ours, other)
    with pytest.raises(UserInputError, match=f"(?i){other.peft_type.value}"):
        loss_of(ours)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(llama.plain))


def test_weights_of_blocks_cannot_be_thawed(llama: Pair) -> None:
    llama.ours.requires_grad_(True)
    with pytest.raises(UserInputError, match="Freeze them"):
        llama.ours(IDS, use_cache=False)
    with torch.no_grad():
        llama.ours(IDS, use_cache=False)


def test_a_dtype_that_does_not_travel(llama: Pair) -> None:
    ours, _ = both(llama)
    for name, one in ours.named_parameters():
        if "lora_" in name:
            one.data = one.data.double()
    with pytest.raises(UserInputError, match="float64"):
        logits(ours)
