"""``%config NBRunner``: what the magics do when a cell does not say."""

from __future__ import annotations

import importlib
from typing import Any

from traitlets import Bool, Enum, Float, Int, Unicode, observe
from traitlets.config import Configurable


class NBRunner(Configurable):
    """Defaults of ``%%generate``, ``%%chat`` and ``%swarm``."""

    model = Unicode(
        "",
        help="Model of %%generate and %%chat without -m. Empty: the one the swarm serves; with no swarm, the "
        "bundled 'tiny'.",
    ).tag(config=True)
    max_new_tokens = Int(64, min=1, help="At most so many new tokens, without -n.").tag(config=True)
    temperature = Float(
        0.0,
        min=0.0,
        help="Without -t. 0 takes the most likely token each time, but is 1 with --top-p or --top-k.",
    ).tag(config=True)
    refresh = Float(
        0.1, min=0.02, help="Seconds between two updates of a growing text. Floods of updates lose messages."
    ).tag(config=True)
    wire = Enum(
        ["exact", "int8"],
        "exact",
        help="How hidden states travel: as they are, or with 8 bits a number, which changes the text now and then.",
    ).tag(config=True)
    invite = Unicode("", help="Invite of the swarm to join when one is first needed.").tag(config=True)
    servers = Int(
        2, min=1, help="Server processes of a swarm started on this machine, where %swarm start does not say."
    ).tag(config=True)
    nested_asyncio = Bool(
        False,
        help="Let your code call asyncio.run() inside cells (nest_asyncio). It costs: on ipykernel 7, a cell that "
        "waits in such a call loses messages, so that queued cells can hang; and it cannot be undone before the "
        "kernel restarts. nbrunner itself never needs it.",
    ).tag(config=True)

    @observe("nested_asyncio")
    def _apply_nested_asyncio(self, change: Any) -> None:
        if change["new"]:
            importlib.import_module("nest_asyncio").apply()
