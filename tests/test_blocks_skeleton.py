"""The client's half: the architecture's own class for each task, with its layers somewhere else."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity.chain import local_model
from parity.families import tiny_config
from torch import nn

from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.skeleton import load_client_model
from nbrunner.errors import CheckpointError, UnsupportedModelError, UserInputError

TASKS = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification")


def save(folder, name, task="AutoModelForCausalLM"):
    torch.manual_seed(0)
    model = getattr(transformers, task).from_config(tiny_config(name)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_every_task_equals_the_plain_model(name, task, tmp_path) -> None:
    plain = save(tmp_path, name, task)
    ours = local_model(resolve_checkpoint(tmp_path), 1, task)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected, found = plain(input_ids=ids)[0], ours(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert type(ours).__name__ == type(plain).__name__
    assert isinstance(ours, type(plain))


def test_a_new_head_is_made_and_everything_else_is_read(tmp_path) -> None:
    plain = save(tmp_path, "llama")
    torch.manual_seed(1)
    ours = local_model(resolve_checkpoint(tmp_path), 1, "AutoModelForSequenceClassification")
    assert torch.equal(ours.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert ours.score.weight.abs().sum() > 0


def test_only_ends_are_read_and_kept(tmp_path) -> None:
    save(tmp_path, "llama")
    asked = []

    def factory(blocks: int, like: nn.Module) -> nn.Module:
        asked.append((blocks, type(like).__name__, next(like.parameters()).device.type))
        return nn.Identity()

    model = load_client_model(resolve_checkpoint(tmp_path), "AutoModelForCausalLM", factory)
    assert asked[-1] == (4, "LlamaDecoderLayer", "meta")
    assert set(model.state_dict()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    skeleton = model.nbrunner_skeleton
    assert (skeleton.num_blocks, skeleton.base, skeleton.cached) == (4, model.model, True)
    assert {"past_key_values", "attention_mask"} <= skeleton.accepts


def test_tied_ends_stay_tied(tmp_path) -> None:
    save(tmp_path, "gpt2")
    model = load_client_model(resolve_checkpoint(tmp_path), "AutoModelForCausalLM", lambda *_: nn.Identity())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_generation_config_comes_along(tmp_path) -> None:
    plain = save(tmp_path, "llama")
    plain.generation_config.update(max_new_tokens=7, eos_token_id=[5, 9])
    plain.generation_config.save_pretrained(tmp_path)
    model = load_client_model(resolve_checkpoint(tmp_path), "AutoModelForCausalLM", lambda *_: nn.Identity())
    assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (7, [5, 9])


def test_a_family_that_cannot_be_split_is_refused_here_too(tmp_path) -> None:
    save(tmp_path, "mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        load_client_model(resolve_checkpoint(tmp_path), "AutoModelForCausalLM", lambda *_: nn.Identity())


def test_a_head_that_is_missing_is_an_error_for_a_language_model(tmp_path) -> None:
    save(tmp_path, "llama", "AutoModel")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load_client_model(resolve_checkpoint(tmp_path), "AutoModelForCausalLM", lambda *_: nn.Identity())


def test_a_model_of_several_modalities_runs_its_text_part_and_refuses_images(tmp_path) -> None:
    plain = save(tmp_path, "gemma3")
    ours = local_model(resolve_checkpoint(tmp_path), 1)
    ids, mask = torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        found = ours(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
        with pytest.raises(UserInputError, match="pixel_values"):
            ours(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))
