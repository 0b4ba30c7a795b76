"""nbrunner: run and fine-tune language models that are too big for one machine, together, from a notebook.

>>> import nbrunner
>>> with nbrunner.LocalSwarm(model="tiny", servers=2) as swarm:                                  # doctest: +SKIP
...     model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)

Importing it starts nothing and loads neither torch nor hivemind: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbrunner.imports import importing

if TYPE_CHECKING:
    from nbrunner.client.auto import (
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from nbrunner.client.edits import Edit
    from nbrunner.client.patching import patch_grid
    from nbrunner.client.trace import Trace
    from nbrunner.errors import (
        BootstrapError,
        InviteError,
        MissingBlocksError,
        NBRunnerError,
        PeerError,
        SessionError,
        SwarmError,
        TrainingError,
        UserInputError,
    )
    from nbrunner.hosting import serve
    from nbrunner.local import LocalSwarm
    from nbrunner.protocol.credentials import Invite
    from nbrunner.tuning.finetune import finetune, resume
    from nbrunner.widgets.explorer import explore

    __version__: str

_HOMES = {
    "AutoDistributedModel": "nbrunner.client.auto",
    "AutoDistributedModelForCausalLM": "nbrunner.client.auto",
    "AutoDistributedModelForSequenceClassification": "nbrunner.client.auto",
    "BootstrapError": "nbrunner.errors",
    "Edit": "nbrunner.client.edits",
    "Invite": "nbrunner.protocol.credentials",
    "InviteError": "nbrunner.errors",
    "LocalSwarm": "nbrunner.local",
    "MissingBlocksError": "nbrunner.errors",
    "NBRunnerError": "nbrunner.errors",
    "PeerError": "nbrunner.errors",
    "SessionError": "nbrunner.errors",
    "SwarmError": "nbrunner.errors",
    "TrainingError": "nbrunner.errors",
    "Trace": "nbrunner.client.trace",
    "UserInputError": "nbrunner.errors",
    "patch_grid": "nbrunner.client.patching",
    "explore": "nbrunner.widgets.explorer",
    "finetune": "nbrunner.tuning.finetune",
    "resume": "nbrunner.tuning.finetune",
    "serve": "nbrunner.hosting",
}

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "BootstrapError",
    "Edit",
    "Invite",
    "InviteError",
    "LocalSwarm",
    "MissingBlocksError",
    "NBRunnerError",
    "PeerError",
    "SessionError",
    "SwarmError",
    "Trace",
    "TrainingError",
    "UserInputError",
    "__version__",
    "explore",
    "finetune",
    "patch_grid",
    "resume",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nbrunner")
    elif name in _HOMES:
        with importing():
            value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'nbrunner' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext nbrunner``: register the magics."""
    from nbrunner.magics import load_ipython_extension as load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext nbrunner``: take them away again."""
    from nbrunner.magics import unload_ipython_extension as unload

    unload(shell)
