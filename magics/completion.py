"""Tab completion of options and of their values: models, sessions, subcommands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from IPython.core.completer import SimpleCompletion, context_matcher

from nbrunner.magics.options import option_strings, takes_value

Values = Callable[[], Sequence[str]]

_MAGIC = re.compile(r"\s*(%{1,2}\w+)\s(.*)$", re.DOTALL)


def make_matcher(
    parsers: Mapping[str, argparse.ArgumentParser],
    subcommands: Mapping[str, Mapping[str, argparse.ArgumentParser | None]],
    values: Mapping[str, Values],
) -> Any:
    """A matcher for IPython's completer.

    Parameters
    ----------
    parsers
        Magic (``"%%generate"``) → its parser.
    subcommands
        Line magic (``"%swarm"``) → word → parser of that subcommand, None if it has no options.
    values
        Destination of an option or positional argument (``"model"``) → what it may be. Must not touch the network:
        it is called while somebody types.
    """

    @context_matcher(identifier="nbrunner.magics")
    def matcher(context: Any) -> Any:
        line = context.line_with_cursor[: context.cursor_position]
        match = _MAGIC.match(line)
        if match is None or context.cursor_line != 0:
            return {"completions": []}
        magic, rest = match[1], match[2]
        words = rest.split()
        current = "" if not rest or rest[-1].isspace() else words.pop()
        candidates = _candidates(magic, words, current)
        found = [word for word in candidates if word.startswith(current)]
        return {
            "completions": [SimpleCompletion(text=word, type="option") for word in found],
            "matched_fragment": current,
            "suppress": bool(found),
        }

    def _candidates(magic: str, words: Sequence[str], current: str) -> Sequence[str]:
        parser = parsers.get(magic)
        if magic in subcommands:
            if not words:
                return sorted(subcommands[magic])
            parser = subcommands[magic].get(words[0])
        if parser is None:
            return []
        destination = takes_value(parser, words[-1]) if words else None
        if destination is not None:
            return values[destination]() if destination in values else []
        positional = [action.dest for action in parser._actions if not action.option_strings]
        offered = [value for name in positional if name in values for value in values[name]()]
        return [*offered, *option_strings(parser)] if not current.startswith("-") else option_strings(parser)

    return matcher
