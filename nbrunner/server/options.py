"""How a server is to run, as plain data: what the command line, a config file or a notebook cell fill in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbrunner.errors import UserInputError
from nbrunner.protocol.credentials import Invite, SwarmKey
from nbrunner.protocol.identity import Identity
from nbrunner.protocol.limits import Limits
from nbrunner.protocol.records import QUANTIZATIONS

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0",)

PARENTS_FOLDER = "NBRUNNER_PARENTS_FOLDER"
"""Environment variable: a folder that the process that started this server made for its servers alone."""

PARENTS_PREFIX = "nbrunner-local-"
"""Of the names of such folders."""


@dataclass(frozen=True)
class ServerOptions:
    """Everything about one server.

    Attributes
    ----------
    model
        Directory, hub id, or ``tiny``.
    blocks
        ``(start, end)``; None chooses those that the swarm lacks most and that fit into memory.
    num_blocks
        How many to choose where ``blocks`` is None; None takes what fits.
    max_memory
        Bytes for blocks and caches together; None takes what is free.
    invite, swarm_key
        The swarm to join, or the key of the one to begin (or to come back to as its creator).
    identity
        None for a new one.
    device, dtype
        ``auto``: the first GPU, else the CPU; the dtype the model was saved in (bfloat16 for float16 on a CPU).
    quantize
        How the weights of linear layers are kept: ``none``, ``int8``, ``int4``, ``nf4`` (GPUs).
    threads
        Of torch; 0: a fair share of the cores, as other servers of this user come and go on this machine.
    cache_bytes
        For caches of sessions; None takes half of the memory that is free once the blocks are loaded.
    lens
        Also hold the final norm and the head, to look at hidden states through them for clients that trace.
    adapters
        Name and directory or hub repository of adapters to serve by name.
    accept_adapters
        Whether to serve adapters that members of the swarm offer.
    limits
        What one peer may use; ``cache_bytes`` and ``session_tokens`` in it are filled in when 0.
    bootstrap_wait
        Seconds for which peers of the swarm may still be coming up.
    run_seconds
        After which the server process leaves by itself; None: when it is told to.
    """

    model: str
    blocks: tuple[int, int] | None = None
    num_blocks: int | None = None
    max_memory: int | None = None
    invite: Invite | None = None
    swarm_key: SwarmKey | None = None
    identity: Identity | None = None
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    threads: int = 0
    listen: Sequence[str] = DEFAULT_LISTEN
    announce: Sequence[str] | None = None
    name: str = ""
    cache_bytes: int | None = None
    lens: bool = False
    adapters: Sequence[tuple[str, str]] = ()
    accept_adapters: bool = False
    limits: Limits = field(default_factory=lambda: Limits(cache_bytes=0, session_tokens=0))
    drain_seconds: float = 30.0
    bootstrap_wait: float = 0.0
    run_seconds: float | None = None


def parse_adapter(text: str) -> tuple[str, str]:
    """``NAME=PATH_OR_REPO`` → both; `UserInputError` if it is not that."""
    name, sign, source = text.partition("=")
    if not sign or not source or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}", name) is None:
        raise UserInputError(
            f"{text!r} does not say which adapter: write a name of letters, digits, '_', '.' and '-', an equals "
            "sign, and a directory or hub repository, as in poems=./poems-lora"
        )
    return name, source


def parse_blocks(text: str) -> tuple[int, int]:
    """``a:b`` → ``(a, b)``; `UserInputError` if it is not a range of blocks."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserInputError(
            f"{text!r} is not a range of blocks: write the first, a colon, and the one after the last, as in 0:8"
        )
    return int(match[1]), int(match[2])


def parse_choice(text: str) -> tuple[tuple[int, int] | None, int | None]:
    """``auto``, ``a:b`` or a number → the blocks, or how many to choose; (None, None) leaves both to the server."""
    if text.strip().lower() == "auto":
        return None, None
    if re.fullmatch(r"\s*\d{1,6}\s*", text):
        if int(text) < 1:
            raise UserInputError("a server needs at least one block")
        return None, int(text)
    return parse_blocks(text), None


def parse_bytes(text: str) -> int:
    """``4GB``, ``512 MiB``, ``1e9`` → bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UserInputError(f"{text!r} is not an amount of memory: write for example 4GB or 512MiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def parse_seconds(text: str) -> float:
    """``90s``, ``30m``, ``2h``, ``1.5 h`` → seconds; a bare number is seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise UserInputError(f"{text!r} is not a length of time: write for example 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def check_model_path(model: str) -> None:
    """Refuse what is plainly not a model before anything is imported or started; the loader checks the rest."""
    if model == "tiny":
        return
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not path.exists():
        if looks_like_path:
            raise UserInputError(f"there is no directory {model}: check the path, or give a hub id as owner/name")
        return
    if not (path / "config.json").is_file():
        raise UserInputError(f"{model} has no config.json: give the directory that save_pretrained wrote")
    if not any(path.glob("*.safetensors")):
        raise UserInputError(
            f"{model} has no safetensors weights, and nothing that needs pickle is loaded. Save it again with "
            "model.save_pretrained(directory)."
        )


def check_quantize(word: str) -> None:
    """`UserInputError` for a way to quantise that there is not."""
    if word not in QUANTIZATIONS:
        raise UserInputError(f"{word!r} is no way to quantise: use {', '.join(QUANTIZATIONS)}")
