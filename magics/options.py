"""The options of the magics, in groups that several of them share."""

from __future__ import annotations

import argparse
import keyword
from collections.abc import Callable
from typing import Any, TypeVar

from IPython.core.magic_arguments import argument

Function = TypeVar("Function", bound=Callable[..., Any])


def variable_name(value: str) -> str:
    """An option's value that must be usable as a variable."""
    if not value.isidentifier() or keyword.iskeyword(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a variable name")
    return value


def speculation(value: str) -> str | int:
    """``auto``, ``off``, or a number of tokens."""
    if value in ("auto", "off"):
        return value
    if value.isascii() and value.isdecimal() and int(value) <= 64:
        return int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is not auto, off, or a number of tokens up to 64")


SAMPLING = (
    argument("-n", "--max-new-tokens", type=int, metavar="N", help="at most N new tokens"),
    argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="the model may not end its text before N tokens"
    ),
    argument(
        "-t",
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the most likely token each time (the default, but 1 with --top-p or --top-k)",
    ),
    argument("--top-p", type=float, metavar="P", help="sample among the most likely tokens of total probability P"),
    argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens"),
    argument("--seed", type=int, metavar="S", help="of the sampling; the receipt tells which was used without it"),
    argument(
        "--beams", type=int, default=1, metavar="B", help="beam search with B beams; shows its text at the end"
    ),
)
"""How tokens are chosen."""

TARGET = (
    argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="name of a model that the swarm serves, or of a variable that holds a model",
    ),
    argument(
        "-o",
        "--out",
        type=variable_name,
        metavar="NAME",
        help="variable for the result: text, tokens, log-probabilities, timings, chain, receipt",
    ),
    argument(
        "-b",
        "--background",
        action="store_true",
        help="return at once; with -o, the variable holds a handle (.result(), await, for, .cancel())",
    ),
    argument("--raw", action="store_true", help="send the text as it is: do not fill in {{ names }}"),
)
"""What computes, and where the result goes."""

SESSION = (
    argument("-s", "--session", metavar="NAME", help="continue the session NAME: its text and caches are kept"),
    argument("--new", action="store_true", help="begin the session NAME again"),
)
"""Continuing over several cells."""

SPECULATION = (
    argument(
        "--speculate",
        default="auto",
        type=speculation,
        metavar="auto|off|N",
        help="guess tokens and have the chain check several in one trip: as many as pay off, none, or always N",
    ),
    argument(
        "--draft",
        metavar="MODEL",
        help="a small model of the same vocabulary that guesses, in this process: a variable, a directory, or "
        "tiny; without it the text is looked up in itself",
    ),
)
"""Several tokens for one trip through the chain."""

ADAPTER = (
    argument(
        "--adapter",
        metavar="NAME",
        help="what a run in a variable has taught, or an adapter that servers have",
    ),
)
"""Something learned on top of the model."""

WATERFALL = (argument("--waterfall", action="store_true", help="show where the time of a typical token went"),)
"""What is shown besides the text."""


def options(*groups: tuple[Any, ...]) -> Callable[[Function], Function]:
    """Decorator: give a magic the options of these groups, in this order."""

    def decorate(function: Function) -> Function:
        for one in reversed([one for group in groups for one in group]):
            function = one(function)
        return function

    return decorate


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """All options a parser knows, long ones first."""
    strings = [string for action in parser._actions for string in action.option_strings]
    return sorted(strings, key=lambda string: (not string.startswith("--"), string))


def takes_value(parser: argparse.ArgumentParser, option: str) -> str | None:
    """Where the value of this option goes (``"model"``); None if it takes none or is not known."""
    for action in parser._actions:
        if option in action.option_strings:
            return action.dest if action.nargs != 0 else None
    return None
