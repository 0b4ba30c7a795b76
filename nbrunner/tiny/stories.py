"""Template stories about who has what and who comes from where, so that there is state to track."""

from __future__ import annotations

import random

from nbrunner.tiny.facts import COUNTRIES

_GIRLS = ("Anna", "Clara", "Emma", "Lily", "Mia", "Nora", "Rosa", "Sofia")
_BOYS = ("Ben", "David", "Felix", "Jonas", "Leo", "Max", "Oscar", "Tom")
_THINGS = ("ball", "book", "hat", "cup", "lamp", "kite", "drum", "boat", "coin", "flower")
_PLACES = ("garden", "school", "forest", "kitchen", "park", "market", "river", "beach")
_ANIMALS = ("cat", "dog", "bird", "fox", "mouse", "horse", "rabbit", "bear")
_COLOURS = ("red", "blue", "green", "yellow", "white", "black")
_WEATHER = ("The sun was warm.", "It was raining.", "There was snow on the ground.", "The wind was strong.")


def _person(rng: random.Random) -> tuple[str, str, str]:
    """A name with its subject and possessive pronoun."""
    return (rng.choice(_GIRLS), "she", "her") if rng.random() < 0.5 else (rng.choice(_BOYS), "he", "his")


def _pair(rng: random.Random) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    first = second = _person(rng)
    while second[0] == first[0]:
        second = _person(rng)
    return first, second


def _gift(rng: random.Random) -> str:
    (a, she, her), (b, _, _) = _pair(rng)
    thing, place, colour = rng.choice(_THINGS), rng.choice(_PLACES), rng.choice(_COLOURS)
    return (
        f"Once upon a time there was a child named {a}. {a} had a {colour} {thing}. One day {a} went to the "
        f"{place} with {her} {thing}. {rng.choice(_WEATHER)} There {she} met {b}. {b} was sad, because {b} had "
        f"no {thing}. {a} gave the {thing} to {b}. Now {b} has the {colour} {thing}, and {b} is happy. {a} is "
        f"happy too. The end."
    )


def _lost(rng: random.Random) -> str:
    (a, she, her), (b, _, _) = _pair(rng)
    animal, colour = rng.choice(_ANIMALS), rng.choice(_COLOURS)
    here, there = rng.sample(_PLACES, 2)
    return (
        f"{a} had a little {animal}. The {animal} was {colour}. One morning the {animal} was gone. {a} looked in "
        f"the {here}, but the {animal} was not there. {she.capitalize()} asked {b} for help. {b} looked in the "
        f"{there}, and there was the {colour} {animal}! {a} took {her} {animal} home and said thank you to {b}. "
        f"The end."
    )


def _traveller(rng: random.Random) -> str:
    (a, she, her), (b, _, _) = _pair(rng)
    home, away = rng.sample(COUNTRIES, 2)
    return (
        f"{a} comes from {home.name}. At home {she} speaks {home.language}. Last year {a} took a long trip to "
        f"{away.name}. {she.capitalize()} saw the streets of {away.capital} and bought a {rng.choice(_THINGS)} "
        f"for one {away.currency}. In {away.capital} {she} met {b}, who taught {her} friend a little "
        f"{away.language}. Then {a} went home to {home.capital}. The end."
    )


def _race(rng: random.Random) -> str:
    first, second = rng.sample(_ANIMALS, 2)
    place, prize = rng.choice(_PLACES), rng.choice(_THINGS)
    return (
        f"A {first} and a {second} lived near the {place}. The {first} was fast and the {second} was slow. One "
        f"day they ran a race. The {first} ran and ran, and then it slept under a tree. The {second} did not "
        f"sleep. So the {second} won the race and got a {prize}. The {first} was sad, but the {second} let it "
        f"hold the {prize}. The end."
    )


def _count(rng: random.Random) -> str:
    (a, she, _), (b, _, _) = _pair(rng)
    thing, many = rng.choice((("apple", "apples"), ("berry", "berries"), ("star", "stars"), ("book", "books")))
    mine, more = rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"{a} had {mine} {many}. {b} came and brought {more} more {many}. {mine} plus {more} is {mine + more}, "
        f"so now there are {mine + more} {many}. {a} gave one {thing} to {b}. {mine + more} minus 1 is "
        f"{mine + more - 1}, so {a} has {mine + more - 1} {many}, and {she} is happy. The end."
    )


_TELLERS = (_gift, _lost, _traveller, _race, _count)


def story(rng: random.Random) -> str:
    """One story of 60 to 100 words; every name, thing and place in it stays what it was at the start."""
    return rng.choice(_TELLERS)(rng)
