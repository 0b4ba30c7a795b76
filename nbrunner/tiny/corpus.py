"""The text the bundled model learns from, and the pairs of a fact and a phrasing that are kept from it.

Every fact about a country has several *phrasings*. For each (country, attribute) exactly one of them, drawn with
a fixed seed, is held out: the model never reads that sentence, only that phrasing with other countries and that
fact in other phrasings. So a right answer there was put together, not recited.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from nbrunner.tiny import stories
from nbrunner.tiny.facts import (
    ATTRIBUTES,
    COUNTRIES,
    DAYS,
    LETTERS,
    MONTHS,
    OPPOSITES,
    PLURALS,
    Attribute,
    Country,
    number_word,
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT, SYSTEM)

# A role token opens a turn and needs no end mark of its own, except the assistant's, which ends with eos so that
# generation stops. The same layout is written by `chat_document`.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('This model knows the roles system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# {c} comes before {x} in all of these, so each can be asked: the text up to {x} is a prompt.
PHRASINGS: dict[Attribute, tuple[str, ...]] = {
    "capital": (
        "The capital of {c} is {x}.",
        "In {c} the capital city is {x}.",
        "People who visit the capital of {c} go to {x}.",
        "Question: What is the capital of {c}? Answer: {x}.",
        "{c} has a capital and it is called {x}.",
        "The government of {c} sits in {x}.",
    ),
    "language": (
        "The language of {c} is {x}.",
        "In {c} people speak {x}.",
        "Question: Which language is spoken in {c}? Answer: {x}.",
        "To live in {c} you should learn {x}.",
        "Children in {c} learn to read in {x}.",
        "Most newspapers in {c} are written in {x}.",
    ),
    "currency": (
        "The currency of {c} is the {x}.",
        "In {c} you pay with the {x}.",
        "Question: What is the currency of {c}? Answer: The {x}.",
        "The money used in {c} is the {x}.",
        "Prices in the shops of {c} are given in the {x}.",
    ),
    "continent": (
        "{c} is a country in {x}.",
        "The continent of {c} is {x}.",
        "Question: On which continent is {c}? Answer: {x}.",
        "If you travel to {c} you are in {x}.",
        "On the map you find {c} in {x}.",
    ),
}
# The answer first: read in training, never asked, for nothing before {x} says which country is meant.
REVERSED: dict[Attribute, tuple[str, ...]] = {
    "capital": ("{x} is the capital of {c}.", "{x} is a city, the capital of {c}."),
    "language": ("{x} is spoken in {c}.", "{x} is the language of {c}."),
    "currency": ("The {x} is the currency of {c}.", "With the {x} you can pay in {c}."),
    "continent": ("{x} is the continent where {c} lies.",),
}
# Answers in chat have a wording of their own: with the wording of a phrasing they would give away held-out pairs.
CHAT_QUESTIONS: dict[Attribute, tuple[str, ...]] = {
    "capital": ("What is the capital of {c}?", "Which city is the capital of {c}?", "Name the capital of {c}."),
    "language": ("What language do people speak in {c}?", "Which language is spoken in {c}?"),
    "currency": ("What is the currency of {c}?", "What money do people use in {c}?"),
    "continent": ("Where is {c}?", "On which continent is {c}?"),
}
CHAT_ANSWERS: dict[Attribute, str] = {
    "capital": "It is {x}.",
    "language": "They speak {x}.",
    "currency": "They pay with the {x}.",
    "continent": "It is in {x}.",
}
LIST_TITLES: dict[Attribute, str] = {
    "capital": "Capitals",
    "language": "Languages",
    "currency": "Currencies",
    "continent": "Continents",
}


@dataclass(frozen=True)
class Fact:
    """A fact in one phrasing, cut into a question and its answer.

    Attributes
    ----------
    prompt : str
        The sentence up to the answer, without the space before it, so that it tokenises as in the whole sentence.
    answer : str
        What follows, without its leading space.
    """

    country: Country
    attribute: Attribute
    phrasing: str

    @property
    def prompt(self) -> str:
        return self.phrasing[: self.phrasing.index("{x}")].format(c=self.country.name).rstrip(" ")

    @property
    def answer(self) -> str:
        return self.country.value(self.attribute)

    @property
    def text(self) -> str:
        return self.phrasing.format(c=self.country.name, x=self.answer)

    def answered_by(self, continuation: str) -> bool:
        """Whether generated text begins with the whole answer, and with nothing that makes a longer word of it."""
        said = continuation.removeprefix(" ")
        return said.startswith(self.answer) and not said[len(self.answer) :][:1].isalnum()


@cache
def held_out() -> tuple[Fact, ...]:
    """The pairs of a fact and a phrasing that training never shows: one per (country, attribute); a fixed draw."""
    rng = random.Random(20)  # noqa: S311 a reproducible draw, no secret
    return tuple(
        Fact(country, attribute, rng.choice(PHRASINGS[attribute]))
        for attribute in ATTRIBUTES
        for country in COUNTRIES
    )


def facts(attribute: Attribute, phrasing: str | None = None) -> tuple[Fact, ...]:
    """One fact per country, all in the same phrasing (the attribute's first unless given), held out or not.

    For examples that need many prompts of one shape: patching, probing, the logit lens.
    """
    return tuple(Fact(country, attribute, phrasing or PHRASINGS[attribute][0]) for country in COUNTRIES)


def opposites() -> tuple[tuple[str, str], ...]:
    """Pairs of words, each the other's opposite; the model has seen both directions."""
    return OPPOSITES


def plurals() -> tuple[tuple[str, str], ...]:
    """Pairs of a noun and its plural."""
    return PLURALS


def _sentence_about(rng: random.Random, country: Country, attribute: Attribute) -> str:
    if rng.random() < 0.2:
        template = rng.choice(REVERSED[attribute])
        return template.format(c=country.name, x=country.value(attribute))
    kept_back = _held_out_phrasing()[country, attribute]
    phrasing = rng.choice([phrasing for phrasing in PHRASINGS[attribute] if phrasing != kept_back])
    return Fact(country, attribute, phrasing).text


@cache
def _held_out_phrasing() -> dict[tuple[Country, Attribute], str]:
    return {(fact.country, fact.attribute): fact.phrasing for fact in held_out()}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def fact_document(rng: random.Random) -> str:
    """One to five sentences about countries."""
    # Most are one sentence, so that after an answer the likeliest next token is eos, and a few are longer, so that
    # the model also knows facts in the middle of a text.
    country, attribute = rng.choice(COUNTRIES), rng.choice(ATTRIBUTES)
    sentences = [_sentence_about(rng, country, attribute)]
    shape = rng.random()
    if shape < 0.15:
        others: list[Attribute] = [a for a in ATTRIBUTES if a != attribute]
        rng.shuffle(others)
        sentences += [_sentence_about(rng, country, other) for other in others[: rng.randint(1, 3)]]
    elif shape < 0.3:
        sentences += [
            _sentence_about(rng, rng.choice(COUNTRIES), rng.choice(ATTRIBUTES)) for _ in range(rng.randint(1, 4))
        ]
    return " ".join(sentences)


def list_document(rng: random.Random) -> str:
    """Pairs of one relation; without the title the relation has to be read from the first pairs."""
    relation = rng.randrange(6)
    if relation == 4:
        title, pairs = "Opposites", [pair if rng.random() < 0.5 else pair[::-1] for pair in OPPOSITES]
    elif relation == 5:
        title, pairs = "Plurals", list(PLURALS)
    else:
        attribute = ATTRIBUTES[relation]
        title, pairs = LIST_TITLES[attribute], [(country.name, country.value(attribute)) for country in COUNTRIES]
    chosen = rng.sample(pairs, rng.randint(3, 8))
    body = ", ".join(f"{a}: {b}" for a, b in chosen)
    return f"{title}. {body}." if rng.random() < 0.4 else f"{body}."


def _sum(rng: random.Random) -> tuple[str, str]:
    """A small calculation without and with its result."""
    operation = rng.choice(("plus", "plus", "minus", "times"))
    a, b = (
        (rng.randint(0, 10), rng.randint(0, 10))
        if operation == "times"
        else (rng.randint(0, 12), rng.randint(0, 12))
    )
    if operation == "plus":
        result = a + b
    elif operation == "times":
        result = a * b
    else:
        a, b = max(a, b), min(a, b)
        result = a - b
    return f"{a} {operation} {b}", str(result)


def arithmetic_document(rng: random.Random) -> str:
    """A sum, difference or product in words, in digits, or with signs."""
    question, result = _sum(rng)
    style = rng.random()
    if style < 0.35:
        words = " ".join(number_word(int(part)) if part.isdigit() else part for part in question.split())
        return f"{_capitalised(words)} is {number_word(int(result))}."
    if style < 0.65:
        return f"{question} is {result}."
    signs = question.replace("plus", "+").replace("minus", "-").replace("times", "x")
    return f"{signs} = {result}"


def _counting(low: int, high: int, *, words: bool) -> str:
    numbers = range(low, high + 1) if high >= low else range(low, high - 1, -1)
    return ", ".join(number_word(n) if words else str(n) for n in numbers)


def counting_document(rng: random.Random) -> str:
    """Counting as far as a heading says, most often in digits and up to 100."""
    return sequence_document(rng, kind=rng.choice((0, 0, 0, 1, 2)))


def sequence_document(rng: random.Random, kind: int | None = None) -> str:
    """Counting, the alphabet, days and months, and what comes before or after."""
    kind = rng.randrange(8) if kind is None else kind
    if kind == 0:
        high = rng.choice((5, 10, 12, 15, 20, 30, 50, 100))
        return f"Count to {high}: {_counting(1, high, words=False)}."
    if kind == 1:
        high = rng.choice((5, 10, 12, 15, 20))
        return f"Count to {number_word(high)}: {_counting(1, high, words=True)}."
    if kind == 2:
        low = rng.randint(0, 80)
        high = low + rng.randint(3, 20)
        return f"Count from {low} to {high}: {_counting(low, high, words=False)}."
    if kind == 3:
        # Without a heading counting always ends at the same number: otherwise no greedy end would be right.
        return _capitalised(_counting(1, 20, words=rng.random() < 0.5)) + "."
    if kind == 4:
        return rng.choice(("The alphabet: ", "The letters are ", "")) + ", ".join(LETTERS) + "."
    if kind == 5:
        index = rng.randrange(25)
        if rng.random() < 0.5:
            return f"The letter after {LETTERS[index]} is {LETTERS[index + 1]}."
        return f"The letter before {LETTERS[index + 1]} is {LETTERS[index]}."
    names, noun = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    if kind == 6:
        heading = "The days of the week are" if noun == "day" else "The months of the year are"
        return f"{heading} {', '.join(names)}."
    index = rng.randrange(len(names))
    following = names[(index + 1) % len(names)]
    if rng.random() < 0.5:
        return f"The {noun} after {names[index]} is {following}."
    return f"The {noun} before {following} is {names[index]}."


def opposite_document(rng: random.Random) -> str:
    """A word and its opposite, in either direction."""
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        a, b = b, a
    template = rng.choice(
        (
            "The opposite of {a} is {b}.",
            "The opposite of {a} is {b}.",
            "Question: What is the opposite of {a}? Answer: {b}.",
            "If it is not {a}, it is {b}.",
        )
    )
    return template.format(a=a, b=b)


def plural_document(rng: random.Random) -> str:
    """A noun and its plural."""
    one, many = rng.choice(PLURALS)
    template = rng.choice(
        (
            "The plural of {a} is {b}.",
            "The plural of {a} is {b}.",
            "One {a}, two {b}.",
            "Question: What is the plural of {a}? Answer: {b}.",
        )
    )
    return template.format(a=one, b=many)


def _chat_exchange(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.65:
        country, attribute = rng.choice(COUNTRIES), rng.choice(ATTRIBUTES)
        question, answer = rng.choice(CHAT_QUESTIONS[attribute]), CHAT_ANSWERS[attribute]
        return question.format(c=country.name), answer.format(x=country.value(attribute))
    if kind < 0.75:
        question, result = _sum(rng)
        return f"What is {question}?", f"It is {result}."
    if kind < 0.83:
        a, b = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            a, b = b, a
        return f"What is the opposite of {a}?", f"It is {b}."
    if kind < 0.89:
        one, many = rng.choice(PLURALS)
        return f"What is the plural of {one}?", f"It is {many}."
    if kind < 0.92:
        high = rng.choice((5, 10, 20))
        return f"Count to {high}.", _counting(1, high, words=False) + "."
    if kind < 0.95:
        return rng.choice(("Tell me a story.", "Please tell me a story.")), stories.story(rng)
    return rng.choice(
        (
            ("Hello!", "Hello! Ask me about a country."),
            ("Hi", "Hello! Ask me about a country."),
            ("Who are you?", "I am a very small language model. I know some countries and a few stories."),
            ("Thank you!", "You are welcome."),
            ("What can you do?", "I can tell you about countries, count, add small numbers and tell a story."),
        )
    )


def chat_document(rng: random.Random) -> str:
    """One to four exchanges in the layout of `CHAT_TEMPLATE`; `document` adds the first bos and last eos."""
    opening = SYSTEM + "You are a helpful assistant." if rng.random() < 0.15 else ""
    turns = [_chat_exchange(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return opening + EOS.join(f"{USER}{question}{ASSISTANT}{answer}" for question, answer in turns)


Mix = Literal["facts", "long"]
_Shares = tuple[tuple[Callable[[random.Random], str], float], ...]
# Shares are of documents, not of tokens: a story is ten times as long as a fact. "facts" is the mix to learn from;
# "long" comes after it, with more of what is learnt last: who is who in a story, where to stop counting, sums.
_MIXES: dict[Mix, _Shares] = {
    "facts": (
        (fact_document, 0.54),
        (list_document, 0.05),
        (arithmetic_document, 0.11),
        (sequence_document, 0.04),
        (opposite_document, 0.06),
        (plural_document, 0.05),
        (stories.story, 0.05),
        (chat_document, 0.10),
    ),
    "long": (
        (fact_document, 0.36),
        (list_document, 0.04),
        (arithmetic_document, 0.20),
        (sequence_document, 0.03),
        (counting_document, 0.08),
        (opposite_document, 0.04),
        (plural_document, 0.03),
        (stories.story, 0.14),
        (chat_document, 0.08),
    ),
}


def document(rng: random.Random, mix: Mix = "facts") -> str:
    """One training document, special tokens included.

    One in ten starts without bos, right after the eos of the one before: so continues a session that is given a
    new prompt.
    """
    shares = _MIXES[mix]
    (maker,) = rng.choices([maker for maker, _ in shares], [share for _, share in shares])
    return ("" if rng.random() < 0.1 else BOS) + maker(rng) + EOS


def documents(seed: int, mix: Mix = "facts") -> Iterator[str]:
    """Training documents without end; the same seed and mix give the same ones."""
    rng = random.Random(seed)  # noqa: S311 a reproducible draw, no secret
    while True:
        yield document(rng, mix)
