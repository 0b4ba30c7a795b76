"""The random checkpoints the benchmarks run, made once and kept under ``build/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build" / "benchmark-models"

SHAPES: dict[str, dict[str, Any]] = {
    # so small that a step is all overhead
    "tiny8": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
    },
    # 200 M parameters: a step reads 0.7 GB of weights, as a server of a big model does
    "mid": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}


def checkpoint(name: str) -> Path:
    """The directory of a benchmark model, fp32, seeded."""
    folder = FOLDER / name
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
    return folder


def local_model(name: str) -> Any:
    """The reference: plain transformers on the same checkpoint, one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def remote_model(name: str, invite: str, **options: Any) -> Any:
    """The same model over a swarm; options as of ``from_pretrained``."""
    import torch

    import nbrunner

    torch.set_num_threads(1)
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
        str(checkpoint(name)), invite=invite, **options
    )
    model.generation_config.eos_token_id = None
    return model


def prompt(name: str, tokens: int, seed: int = 1) -> Any:
    """[1, tokens] token ids. Sessions whose prompts begin alike share: give each a seed of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPES[name]["vocab_size"], (1, tokens), generator=generator)
