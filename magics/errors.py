"""Errors as a notebook shows them: one line that says what to do, a traceback only for what is a bug."""

from __future__ import annotations

from IPython.core.error import UsageError

from nbrunner.errors import NBRunnerError, UserInputError

_YELLOW, _RED, _PLAIN = "\x1b[33m", "\x1b[31m", "\x1b[0m"


class Interrupted(Exception):  # noqa: N818 - this name is what people read under their cell
    """The kernel was interrupted. One line; the cell still counts as failed, so that Run All stops."""

    def _render_traceback_(self) -> list[str]:
        return [f"{_YELLOW}Interrupted:{_PLAIN} {self}"]


def in_one_line(error: NBRunnerError, where: str) -> Exception:
    """The exception to raise in a cell for an error of nbrunner.

    A mistake in the cell becomes IPython's ``UsageError``. Any other keeps its type, so that code can catch it,
    and shows as one line.
    """
    if isinstance(error, UserInputError):
        mistake: Exception = UsageError(f"{where}: {error}")
        return mistake

    def render() -> list[str]:
        return [f"{_RED}{type(error).__name__}:{_PLAIN} {error}"]

    setattr(error, "_render_traceback_", render)  # noqa: B010 - IPython's hook; the class does not declare it
    return error
