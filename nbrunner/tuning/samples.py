"""What the model answers before, during and after: the same prompts each time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nbrunner.tuning.data import Label

# PEFT says so at every generation with a trained prompt, where generate itself adds the position ids
warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")

When = Literal["before", "during", "after"]


@dataclass(frozen=True)
class Answers:
    """Answers to all prompts at one step. ``error``: why there are none."""

    step: int
    when: When
    texts: tuple[str, ...]
    error: str = ""


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int) -> str:
    """The most likely continuation of a prompt, until it ends, without what the prompt says."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    # one prompt at a time: behind padding, trained prompt tokens would stand at other places than in training
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True))


@torch.no_grad()
def classify(model: Any, tokenizer: Any, text: str, classes: Sequence[Label]) -> str:
    """The most likely label of a text and its probability, as ``positive 0.98``."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    best = int(logits.argmax())
    return f"{classes[best]} {float(logits.softmax(-1)[best]):.2f}"


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
