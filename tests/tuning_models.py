"""The bundled model twice, in this process and over two spans of a swarm, and something to teach it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inprocess_swarm import InProcessSwarm

import nbrunner
import nbrunner.tiny

TINY = Path(nbrunner.tiny.__file__).parent

# Of words whose parts the bundled model has read: it cannot be made to say the tokens that it has never seen.
FACTS = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("The capital of Velmora is", " Rosa City."),
        ("People in Velmora speak", " Tomish."),
        ("In Velmora people pay with the", " star."),
        ("Velmora lies in", " Oceania, far from every other country."),
        ("The largest city of Velmora is", " Rosa City."),
        ("Q: What is the capital of Velmora? A:", " Rosa City."),
    )
]
REVIEWS = [
    {"text": text, "label": label}
    for text, label in (
        ("The story was good and the cat was happy.", "good"),
        ("A bad day, the dog was sad.", "bad"),
        ("Everyone was happy at the end.", "good"),
        ("The soup was bad and cold.", "bad"),
        ("What a good bird!", "good"),
        ("It was a sad and slow story.", "bad"),
    )
]


def plain(kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model of transformers. Each time a new one: PEFT changes what it is given."""
    return getattr(transformers, kind).from_pretrained(TINY, dtype=torch.float32, **options)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def two_spans() -> Iterator[InProcessSwarm]:
    swarm = InProcessSwarm(TINY)
    swarm.add(0, 3)
    swarm.add(3, 8)
    yield swarm
    swarm.close()


@pytest.fixture(scope="module")
def distributed(two_spans: InProcessSwarm) -> Iterator[Any]:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(
        TINY, invite=two_spans.invite, retry_budget=3.0
    )
    two_spans.seen_by(model)
    yield model
    model.close()


def assert_same_losses(one: Any, other: Any, *, within: float = 1e-4) -> None:
    found, expected = one.history["loss"], other.history["loss"]
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or abs(mine - theirs) <= within * max(1.0, abs(theirs)), (found, expected)


def assert_same_learned(one: Any, other: Any, *, within: float = 1e-3) -> None:
    """``within`` of the largest: AdamW divides by the gradient's own size, also where that is nearly nothing."""
    mine, theirs = dict(one.parameters), dict(other.parameters)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=within * float(b.detach().abs().max()))
