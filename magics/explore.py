"""``%explore`` and ``%%explore``: look at what a model computes for a text, layer by layer."""

from __future__ import annotations

import argparse
import re
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.magics.errors import Interrupted, in_one_line
from nbrunner.magics.generate import prompt_of
from nbrunner.magics.options import options, variable_name
from nbrunner.magics.state import Notebook


def layer_list(value: str) -> list[int]:
    """``0,4,8`` or ``0:9:2``; negative numbers count from the end where they are listed."""
    try:
        if ":" in value:
            begin, end, *step = value.split(":")
            found = list(range(int(begin or 0), int(end), int(step[0]) if step else 1))
        else:
            found = [int(one) for one in value.split(",")]
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{value!r} is neither like 0,4,8 nor like 0:9:2") from None
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r} names no layer")
    return found


EXPLORE = (
    argument("-m", "--model", metavar="MODEL", help="name of a model that the swarm serves, or of a variable"),
    argument("--layers", type=layer_list, metavar="LIST", help="which states: 0,4,8 or 0:9:2; all by default"),
    argument("--top-k", type=int, default=5, metavar="K", help="how many tokens of the lens are kept"),
    argument("--token", action="append", default=[], metavar="TOKEN", help="also this one's probability and rank"),
    argument(
        "-o",
        "--out",
        type=variable_name,
        default="explorer",
        metavar="NAME",
        help="variable for the explorer (.traces, .selection); explorer by default",
    ),
    argument("--html", metavar="FILE", help="also write it as a stand-alone page"),
    argument("--raw", action="store_true", help="take the text as it is: do not fill in {{ names }}"),
)
"""Options of ``%explore``."""


@magics_class
class ExploreMagics(Magics):
    """Holds ``%explore`` and ``%%explore``."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook

    @no_var_expand
    @magic_arguments("%explore")
    @options(EXPLORE)
    @argument("prompt", nargs="*", help="the text; %%explore takes it from the cell")
    @line_cell_magic
    def explore(self, line: str, cell: str | None = None) -> None:
        """Show the hidden states of a text, layer by layer, as a map to look into.

        Move with the arrow keys or the mouse; Enter or a click pins a cell. In ``%%explore`` the text is the cell's
        body; two texts with a line ``---`` between them are compared.

            %explore -o seen The capital of France is
        """
        arguments = parse_argstring(self.explore, line)
        where = "%explore" if cell is None else "%%explore"
        given = " ".join(_unquoted(one) for one in arguments.prompt)
        if cell is None and not given.strip():
            raise UsageError("%explore: give a text, as in %explore The capital of France is")
        if cell is not None and given:
            raise UsageError("%%explore: the text goes below the first line")
        parts = [given] if cell is None else re.split(r"(?m)^---[ \t]*\n", cell)
        if len(parts) > 2:
            raise UsageError(f"%%explore: two texts can be compared, not {len(parts)}")
        self._show(
            [prompt_of(self._notebook, one, raw=arguments.raw, where=where) for one in parts], arguments, where
        )

    def _show(self, prompts: list[str], arguments: Any, where: str) -> None:
        notebook = self._notebook
        try:
            loaded = notebook.worker.submit(lambda: notebook.load(arguments.model)).result()
            explorer = self._explored(prompts, loaded, arguments)
            if arguments.html:
                explorer.to_html(arguments.html)
        except NBRunnerError as error:
            raise in_one_line(error, where) from None
        except KeyboardInterrupt:
            raise Interrupted("nothing was traced") from None
        from IPython.display import display

        notebook.store(arguments.out, explorer)
        display(explorer)

    @staticmethod
    def _explored(prompts: list[str], loaded: Any, arguments: Any) -> Any:
        """Trace and lay out. In the cell's own thread: an interrupt takes back what was asked of the swarm."""
        if not hasattr(loaded.model, "trace"):
            raise UserInputError(f"{loaded.name} is not a model of nbrunner; it cannot be traced.")
        from nbrunner.widgets.explorer import explore

        tokens = [int(one) if one.isdecimal() else _unquoted(one) for one in arguments.token]
        return explore(
            prompts,
            loaded.model,
            top_k=arguments.top_k,
            layers=arguments.layers,
            tokens=tokens or None,
            tokenizer=loaded.tokenizer,
        )


def _unquoted(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else word
