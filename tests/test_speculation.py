"""Guessing tokens: the window as a pure decision, and generation that stays what it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import nbrunner
from nbrunner.client.generation import start_generation
from nbrunner.client.speculation import Draft, PromptLookup, Speculation
from nbrunner.client.window import MOST, Window
from nbrunner.errors import UserInputError

COUNTING = "one two three four five six seven eight one two three four five"


# -- the window ----------------------------------------------------------------------------------------------------


def taught(base: float, slope: float, right: float, rounds: int = 60) -> Window:
    window = Window()
    debt = 0.0
    for number in range(rounds):
        guessed = (3, 6, 0)[number % 3]
        accepted = 0
        while accepted < guessed:
            debt += 1 - right
            if debt >= 1:
                debt -= 1
                break
            accepted += 1
        window.learn(guessed=guessed, accepted=accepted, seconds=base + slope * guessed, first=number == 0)
    return window


def test_it_guesses_more_the_slower_the_way_and_the_better_the_guesses() -> None:
    assert Window().size() == 0  # nothing is known
    slow, fast = taught(0.2, 0.002, 0.8), taught(0.01, 0.008, 0.8)
    assert slow.size() > fast.size()
    assert slow.size() > taught(0.2, 0.002, 0.3).size()
    assert slow.size(rolls_back=False) == 0
    assert taught(0.01, 0.01, 0.02).size() == 0
    assert Window(fixed=5).size() == 5


def test_a_guess_that_costs_a_lot_is_not_made() -> None:
    window = taught(0.02, 0.001, 0.7)
    assert window.size() > 0
    window.guessing(seconds=0.5)
    assert window.size() == 0


def test_it_tries_again_after_a_while() -> None:
    window = taught(0.05, 0.005, 0.02)
    assert window.size() == 0
    for _ in range(200):
        window.learn(guessed=0, accepted=0, seconds=0.05)
    assert window.size() > 0


rounds = st.tuples(st.integers(0, MOST), st.floats(0, 1), st.floats(1e-6, 100))


@given(st.lists(rounds, max_size=40), st.floats(0, 10))
def test_it_is_always_a_sensible_number(history: list[tuple[int, float, float]], guess: float) -> None:
    window = Window()
    for guessed, share, seconds in history:
        window.learn(guessed=guessed, accepted=int(share * guessed), seconds=seconds)
        window.guessing(seconds=guess)
    assert 0 <= window.size() <= MOST
    assert 0 < window.acceptance < 1
    assert window.tokens >= window.rounds


# -- guessing ------------------------------------------------------------------------------------------------------


def test_a_text_is_looked_up_in_itself() -> None:
    def look(*rows: list[int], count: int = 4) -> list[list[int]]:
        return PromptLookup().propose(torch.tensor(rows), count, None).tolist()

    assert look([1, 2, 3, 4, 5, 1, 2]) == [[3, 4, 5, 1]]
    assert look([1, 2, 3, 9, 2, 3, 7, 1, 2, 3]) == [[9, 2, 3, 7]]  # the longest match, not the latest
    assert look([7, 7]) == [[7, 7, 7, 7]]
    assert look([1, 2, 3]) == [[]]
    assert look([1, 2, 1, 2], [1, 2, 3, 4]) == [[], []]  # as far as all of them know


def small(seed: int, vocabulary: int = 40) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=vocabulary, eos_token_id=None, bos_token_id=None)
    ).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("draft", [None, 0, 1])
@pytest.mark.parametrize("how", ["auto", 1, 5])
@pytest.mark.parametrize("sampled", [False, True])
def test_text_stays_the_same_alone_and_in_batches(draft: int | None, how: str | int, sampled: bool) -> None:
    model = small(0)
    ids = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [8, 9, 8, 9, 8, 9, 8]])
    for rows in (slice(1, 2), slice(0, 2)):
        inputs = {"inputs": ids[rows], "attention_mask": (ids[rows] > 0).long(), "max_new_tokens": 20}
        config = {"do_sample": sampled, "repetition_penalty": 1.2, "temperature": 0.7 if sampled else None}
        torch.manual_seed(1)
        plain = model.generate(**inputs, **config)
        found = Speculation.of(model, how, None if draft is None else small(draft))
        assert found is not None
        torch.manual_seed(1)
        assert torch.equal(model.generate(**inputs, **config, custom_generate=found), plain)
        if draft == 0 and how == 5 and not sampled and rows == slice(1, 2):
            assert found.window.tokens_per_round > 2  # the model itself guesses for itself


def test_scores_ends_and_streams_are_those_of_plain_generation() -> None:
    class Heard:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, ids = small(0), torch.tensor([[8, 9, 8, 9, 8, 9, 8]])
    arguments = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    free = model.generate(ids, **arguments)
    arguments["eos_token_id"] = int(free.sequences[0, 20])
    plain, one, other = model.generate(ids, **arguments), Heard(), Heard()
    found = Speculation.of(model, 6, streamer=one)
    assert found is not None
    guessed = model.generate(ids, **arguments, custom_generate=found, streamer=one)
    model.generate(ids, **arguments, streamer=other)
    assert torch.equal(plain.sequences, guessed.sequences)
    assert one.tokens == other.tokens
    assert len(plain.scores) == len(guessed.scores)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.scores, guessed.scores, strict=True))


class Constant:
    """Guesses the same whatever the text says, which is right now and then; counts what it guessed."""

    guessed = 0

    def propose(self, ids: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
        self.guessed += count
        return torch.tensor([[1, 0, 1][:count]])


def test_the_distribution_is_the_models() -> None:
    """How often each text of four tokens comes with guesses, over how likely the model itself makes it."""
    runs, model, ids = 800, small(0, vocabulary=2), torch.tensor([[1, 1, 0, 1]])
    texts = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        logits = model(torch.cat([ids.repeat(len(texts), 1), texts], dim=1)).logits[:, ids.shape[1] - 1 : -1]
    likely = (5 * logits).log_softmax(-1).gather(2, texts[..., None])[..., 0].sum(1).exp()
    assert float(likely.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(likely.max()) > 2 * float(likely.min())
    torch.manual_seed(4)
    counts, proposer, kept = torch.zeros(len(texts)), Constant(), 0
    for _ in range(runs):  # one text at a time: rows of a batch must all agree with a guess before it is kept
        window = Window(fixed=3)
        how = {"do_sample": True, "temperature": 0.2, "top_k": 0, "max_new_tokens": 4}
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, **how, custom_generate=Speculation(proposer, window))
        counts[int(text[0, -4:] @ torch.tensor([8, 4, 2, 1]))] += 1
        kept += window.tokens - window.rounds
    assert proposer.guessed > 2 * runs
    assert runs / 2 < kept < proposer.guessed  # both happen: guesses that are kept, and guesses that are not
    expected = runs * likely
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 39.7  # chi-square with 15 degrees of freedom: above in five of ten thousand


def test_what_cannot_be_is_refused() -> None:
    model = small(0)
    for how in ("sometimes", 65, -1, True):
        with pytest.raises(UserInputError, match="speculate is"):
            Speculation.of(model, how)
    with pytest.raises(UserInputError, match="same vocabulary"):
        Draft(small(0, vocabulary=50), 40)
    found = Speculation.of(model, 2)
    assert found is not None
    with pytest.raises(UserInputError, match="beams"):
        model.generate(torch.tensor([[1, 2]]), num_beams=2, max_new_tokens=2, custom_generate=found)
    with pytest.raises(UserInputError, match="without them"):
        model.generate(torch.tensor([[1, 2]]), use_cache=False, max_new_tokens=2, custom_generate=found)


# -- over a swarm --------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_batches_over_a_swarm_whose_server_is_lost_in_the_middle(tiny_path: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16)
    rows = tokenizer(
        [COUNTING, "one two three four five six seven eight one two"], padding=True, return_tensors="pt"
    )
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": tokenizer.pad_token_id}

    class Killer:
        """A streamer that takes a server away behind so many tokens; batches have no streamer of transformers."""

        def __init__(self, server: Any, after: int) -> None:
            self.server, self.left = server, after

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.left -= 1
            if not self.left:
                self.server.kill()
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    with nbrunner.LocalSwarm("tiny", ["0:4", "4:8", "4:8"]) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        try:
            for sampled in (False, True):
                arguments |= {"do_sample": sampled, "temperature": 0.8 if sampled else None}
                torch.manual_seed(3)
                wanted = model.generate(**rows, **arguments)
                torch.manual_seed(3)
                assert torch.equal(model.generate(**rows, **arguments, speculate=3, draft_model=plain), wanted)
            arguments |= {"do_sample": False, "temperature": None}
            wanted = model.generate(**rows, **arguments)
            with model.inference_session() as session:
                session.generate(rows.input_ids[:1, :2], max_new_tokens=1)
                used = {peer for peer, _, _ in session.chain}
            victim = next(one for one in swarm.servers if one.peer_id in used and one.blocks[0] == 4)
            killer = Killer(victim, after=9)
            found = model.generate(**rows, **arguments, speculate=3, draft_model=plain, stopping_criteria=[killer])
            assert killer.left < 0
            assert not victim.alive
            assert torch.equal(found, wanted)
        finally:
            model.close()


@pytest.mark.network
def test_over_a_swarm_with_sessions_and_a_lost_server(tiny_path: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16)
    prompt = tokenizer([COUNTING], return_tensors="pt")
    with nbrunner.LocalSwarm("tiny", ["0:4", "4:8", "4:8"]) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        try:
            arguments = {"max_new_tokens": 24, "do_sample": False}
            wanted = model.generate(**prompt, **arguments)
            assert torch.equal(model.generate(**prompt, **arguments, speculate=4), wanted)
            drafted = model.generate(**prompt, **arguments, speculate="auto", draft_model=plain)
            assert torch.equal(drafted, wanted)
            with model.inference_session() as session:
                first = model.generate(
                    prompt.input_ids, max_new_tokens=12, do_sample=False, session=session, speculate=3
                )
                used = {peer for peer, _, _ in session.chain}
                next(one for one in swarm.servers if one.peer_id in used and one.blocks[0] == 4).kill()
                second = model.generate(max_new_tokens=12, do_sample=False, session=session, speculate=3)
                assert torch.equal(torch.cat([first, second], dim=1), wanted)
            options = {"max_new_tokens": 24, "speculate": 4, "draft": plain}
            result = start_generation(model, tokenizer, COUNTING, **options).result(60)
            assert result.ids == wanted[0, prompt.input_ids.shape[1] :].tolist()[: len(result.ids)]
            assert 0 < result.rounds < len(result.tokens)
            assert "tokens a round trip" in result.summary()
            with pytest.raises(UserInputError, match="draft model"):
                model.generate(**prompt, max_new_tokens=2, draft_model=plain)
        finally:
            model.close()
