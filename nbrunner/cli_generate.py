"""``nbrunner generate``: a text from a terminal, through a swarm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from nbrunner import tiny
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.auto import AutoDistributedModelForCausalLM
from nbrunner.client.generation import start_generation
from nbrunner.client.tokenizers import load_tokenizer
from nbrunner.local import LocalSwarm
from nbrunner.protocol.credentials import Invite


def generate(
    prompt: str,
    *,
    model: str,
    invite: Invite | None,
    revision: str | None,
    max_new_tokens: int,
    write: Callable[[str], None] | None,
    **sampling: Any,
) -> dict[str, Any]:
    """Continue a prompt and return text and receipt, ready for JSON.

    Parameters
    ----------
    invite
        None starts a swarm on this machine for it.
    write
        Called with each piece of text as it comes.
    **sampling
        As for `nbrunner.client.generation.start_generation`.

    Raises
    ------
    UserInputError, MissingBlocksError, PeerError
    """
    resolve_checkpoint(model, revision=revision)  # whether it is one is told before anything is started
    tokenizer = load_tokenizer(tiny.path() if model == "tiny" else model, revision=revision)
    with _swarm(model, invite) as used:
        loaded = AutoDistributedModelForCausalLM.from_pretrained(model, invite=used, revision=revision)
        with contextlib.closing(loaded):
            handle = start_generation(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, **sampling)
            if write is not None:
                for token in handle:
                    write(str(token))
                write("\n")
            result = handle.result()
    return {"text": result.text, "tokens": result.ids, "finish": result.finish, "receipt": dict(result.receipt)}


@contextlib.contextmanager
def _swarm(model: str, invite: Invite | None) -> Iterator[Invite | str]:
    if invite is not None:
        yield invite
        return
    with LocalSwarm(model, servers=2) as swarm:
        yield swarm.invite
