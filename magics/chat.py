"""``%%chat``: a conversation over several cells, in the model's own chat format."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from nbrunner.errors import UserInputError
from nbrunner.magics.cell import run_cell
from nbrunner.magics.generate import check_sampling, prompt_of, sampling_of
from nbrunner.magics.options import SAMPLING, TARGET, options
from nbrunner.magics.state import Conversation, LoadedModel, Notebook

if TYPE_CHECKING:
    from nbrunner.client.generation import GenerationRun
    from nbrunner.client.result import Generation

_DEFAULT = "default"

_CHAT = (
    argument("-s", "--session", metavar="NAME", default=_DEFAULT, help="name of the conversation"),
    argument("--system", metavar="TEXT", help="what the model is told before the conversation; begins it again"),
)

SUBCOMMANDS = ("history", "reset")


@dataclass(frozen=True)
class History:
    """The messages of a conversation, to look at."""

    name: str
    messages: tuple[dict[str, str], ...]

    def __repr__(self) -> str:
        if not self.messages:
            return f"(conversation {self.name!r} is empty)"
        return "\n".join(f"{one['role']}: {one['content']}" for one in self.messages)

    def _repr_html_(self) -> str:
        if not self.messages:
            return f"<small>{html.escape(repr(self))}</small>"
        rows = "".join(
            f"<dt><strong>{html.escape(one['role'])}</strong></dt>"
            f"<dd style='white-space: pre-wrap; margin: 0 0 .5em 1.5em'>{html.escape(one['content'])}</dd>"
            for one in self.messages
        )
        return f"<dl style='margin: 0'>{rows}</dl>"


@magics_class
class ChatMagics(Magics):
    """Holds ``%%chat`` and ``%chat``."""

    def __init__(self, shell: Any, notebook: Notebook) -> None:
        super().__init__(shell)
        self._notebook = notebook

    @no_var_expand
    @magic_arguments("%chat")  # IPython adds one more % in the help
    @options(SAMPLING, TARGET, _CHAT)
    @cell_magic("chat")
    def chat_cell(self, line: str, cell: str) -> Any:
        """Say the text of the cell to the model; it answers, and remembers the conversation.

        The conversation is kept for each model and each name (-s); only what is new is computed. ``%chat history``
        shows it, ``%chat reset`` begins it again. Everything else is as in ``%%generate``.

            %%chat
            What is the capital of {{ country }}?
        """
        arguments = parse_argstring(self.chat_cell, line)
        message = prompt_of(self._notebook, cell, raw=arguments.raw, where="%%chat")
        sampling = sampling_of(self._notebook, arguments)
        check_sampling(sampling, "%%chat")
        notebook = self._notebook
        conversations: list[Conversation] = []

        def prepare() -> GenerationRun:
            from nbrunner.client.generation import GenerationRun
            from nbrunner.client.sampling import Sampling

            loaded = notebook.load(arguments.model)
            conversation = notebook.conversation(loaded.name, arguments.session)
            if arguments.system:
                conversation.messages = [{"role": "system", "content": arguments.system}]
            conversations.append(conversation)
            ids = _template(loaded, [*conversation.messages, {"role": "user", "content": message}])
            session = _session(loaded, conversation)
            new = _only_new(session, ids)
            return GenerationRun(loaded.model, loaded.tokenizer, new, Sampling(**sampling), session=session)

        def on_end(generation: Generation) -> Generation:
            generation = dataclasses.replace(generation, prompt=message)
            if generation.tokens:
                conversations[0].messages += [
                    {"role": "user", "content": message},
                    {"role": "assistant", "content": generation.text.strip()},
                ]
            return generation

        return run_cell(
            notebook,
            "%%chat",
            prepare,
            model=arguments.model,
            out=arguments.out,
            background=arguments.background,
            on_end=on_end,
        )

    @line_magic("chat")
    def chat_line(self, line: str) -> History | None:
        """``%chat history [NAME]`` shows a conversation, ``%chat reset [NAME]`` begins it again.

        Without NAME: the conversation that ``%%chat`` uses without -s. To say something, use ``%%chat``.
        """
        word, _, name = line.strip().partition(" ")
        name = name.strip() or _DEFAULT
        chosen = [one for (_, known), one in self._notebook.conversations.items() if known == name]
        if word == "history":
            return History(name, tuple(message for one in chosen for message in one.messages))
        if word == "reset":
            for conversation in chosen:
                conversation.messages = []
            return None
        raise UsageError(
            "%chat history [NAME] or %chat reset [NAME]; %%chat, with a text below it, to say something"
        )


def _template(loaded: LoadedModel, messages: list[dict[str, str]]) -> list[int]:
    """The conversation as ids, ready for the model's answer."""
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UserInputError(f"the model {loaded.name!r} has no chat format; use %%generate with it.")
    import jinja2

    try:
        encoded = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except jinja2.TemplateError as error:
        raise UserInputError(f"the model's chat format does not take this conversation: {error}") from None
    return [int(token) for token in encoded["input_ids"]]


def _session(loaded: LoadedModel, conversation: Conversation) -> Any:
    if not hasattr(loaded.model, "inference_session"):
        return None
    if conversation.session is None or conversation.session.closed:
        conversation.session = loaded.model.inference_session()
    return conversation.session


def _only_new(session: Any, ids: list[int]) -> list[int]:
    """Roll the session back to where it agrees with the conversation; the ids it does not hold yet."""
    if session is None:
        return ids
    held = session.tokens[0].tolist() if session.tokens.shape[1] else []
    common = 0
    while common < min(len(held), len(ids) - 1) and held[common] == ids[common]:
        common += 1
    if common < len(held):
        session.position = common
    return ids[common:]
