"""``{{ name }}`` in a cell: values of the notebook in a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbrunner.errors import UserInputError


def render(body: str, namespace: Mapping[str, Any]) -> str:
    """Fill in ``{{ expressions }}`` and ``{% blocks %}`` of Jinja from the notebook's variables.

    Braces that are not doubled mean nothing, so prompts full of JSON or code need no escaping. The sandbox keeps a
    template that somebody else wrote from reaching into the objects it is given.

    Raises
    ------
    UserInputError
        A name that does not exist, or a template that cannot be read.
    """
    if "{{" not in body and "{%" not in body:
        return body
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(body).render(dict(namespace))
    except jinja2.UndefinedError as error:
        raise UserInputError(f"{error} in this notebook; --raw sends the text as it is.") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserInputError(
            f"line {error.lineno} of the prompt cannot be read as a template ({error.message}); "
            "--raw sends the text as it is."
        ) from None
    except jinja2.exceptions.SecurityError as error:
        raise UserInputError(f"{error}; compute it in a cell and put the result in the prompt.") from None
