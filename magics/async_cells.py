"""Cells that are awaited: in a kernel ``%%generate`` becomes a coroutine, so that Stop and sliders stay live.

IPython's magics are synchronous. A transformer of the input, run before IPython's own, turns the cell into an
``await`` of the same magic. In a terminal, inside a function, or under ``%%time``, the magic blocks instead.
"""

from __future__ import annotations

import contextvars
import inspect
import re
from typing import Any

_AWAITED = ("generate", "chat")
_CELL = re.compile(rf"%%({'|'.join(_AWAITED)})(?:[ \t]+(.*))?$")
_ENTRY = "_nbrunner_await_cell"

wants_coroutine: contextvars.ContextVar[bool] = contextvars.ContextVar("nbrunner_wants_coroutine", default=False)
"""True while a magic is called by an awaited cell: it then returns what is to be awaited."""


def transform(lines: list[str]) -> list[str]:
    """Rewrite a cell that begins with one of our magics; leave others, and questions for help, as they are."""
    match = _CELL.match(lines[0].rstrip()) if lines else None
    if match is None or (match[2] or "").strip() == "?":
        return lines
    return [f"await get_ipython().{_ENTRY}({match[1]!r}, {match[2] or ''!r}, {''.join(lines[1:])!r})\n"]


async def run_awaited(shell: Any, name: str, line: str, body: str) -> Any:
    """Run a cell magic, and await what it returns."""
    token = wants_coroutine.set(True)
    try:
        result = shell.run_cell_magic(name, line, body)
    finally:
        wants_coroutine.reset(token)
    return await result if inspect.isawaitable(result) else result


def install(shell: Any) -> None:
    """Begin rewriting, where there is a kernel whose loop can await."""
    if not hasattr(shell, "kernel"):
        return

    async def entry(name: str, line: str, body: str) -> Any:
        return await run_awaited(shell, name, line, body)

    def when_awaitable(lines: list[str]) -> list[str]:
        return transform(lines) if shell.autoawait else lines

    when_awaitable.nbrunner = True  # type: ignore[attr-defined]
    setattr(shell, _ENTRY, entry)
    shell.input_transformers_cleanup.append(when_awaitable)


def uninstall(shell: Any) -> None:
    """Undo `install`."""
    transformers = shell.input_transformers_cleanup
    transformers[:] = [one for one in transformers if not hasattr(one, "nbrunner")]
    if hasattr(shell, _ENTRY):
        delattr(shell, _ENTRY)
