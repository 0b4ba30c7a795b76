"""The magics: ``%%generate``, ``%%chat``, ``%explore``, ``%%finetune``, ``%swarm``, ``%host``, and ``%config``.

Nothing here imports torch, hivemind or plotly before it is used.
"""

from __future__ import annotations

from typing import Any

if __name__ != "nbrunner.magics":  # from the repository's root, `import magics` would make a second copy of it
    raise ImportError("import nbrunner.magics")

_ATTRIBUTE = "_nbrunner_registered"


def load_ipython_extension(shell: Any) -> None:
    """Give a shell the magics, their completion and their configuration."""
    from nbrunner.magics import async_cells
    from nbrunner.magics.chat import SUBCOMMANDS, ChatMagics
    from nbrunner.magics.completion import make_matcher
    from nbrunner.magics.config import NBRunner
    from nbrunner.magics.explore import ExploreMagics
    from nbrunner.magics.finetune import FinetuneMagics, alone
    from nbrunner.magics.generate import GenerateMagics
    from nbrunner.magics.host import HostMagics, host_parser
    from nbrunner.magics.run_views import set_run_views
    from nbrunner.magics.state import Notebook
    from nbrunner.magics.swarm import SwarmMagics, subcommand_parsers
    from nbrunner.tuning.settings import METHODS, SCHEDULES

    config = NBRunner(parent=shell)
    notebook = Notebook(shell, config)
    generate, chat = GenerateMagics(shell, notebook), ChatMagics(shell, notebook)
    swarm = SwarmMagics(shell, notebook)
    host = HostMagics(shell, notebook)
    explore = ExploreMagics(shell, notebook)
    looks = explore.explore.parser
    finetune = FinetuneMagics(shell, notebook)
    teaches = finetune.finetune.parser
    notebook.before_leaving.append(finetune.stop_runs)
    matcher = make_matcher(
        {
            "%%generate": generate.generate.parser,
            "%%chat": chat.chat_cell.parser,
            "%host": host_parser(),
            "%explore": looks,
            "%%explore": looks,
            "%finetune": teaches,
            "%%finetune": teaches,
        },
        {"%swarm": subcommand_parsers(), "%chat": dict.fromkeys(SUBCOMMANDS)},
        {
            "model": notebook.known_models,
            "session": notebook.session_names,
            "data": finetune.data_names,
            "eval_data": finetune.data_names,
            "method": lambda: METHODS,
            "schedule": lambda: SCHEDULES,
            "adapter": lambda: [*finetune.run_names(), *notebook.served_adapters()],
        },
    )
    shell.configurables.append(config)
    for magics in (generate, chat, swarm, host, explore, finetune):
        shell.register_magics(magics)
    if shell.Completer is not None:
        shell.Completer.custom_matchers.append(matcher)
    async_cells.install(shell)
    shell.input_transformers_cleanup.append(alone)
    set_run_views(shell, finetune)
    setattr(shell, _ATTRIBUTE, (notebook, matcher, [config, generate, chat, swarm, host, explore, finetune]))


def unload_ipython_extension(shell: Any) -> None:
    """Undo `load_ipython_extension`. What the notebook had started (servers, sessions) ends too."""
    from nbrunner.magics import async_cells
    from nbrunner.magics.run_views import unset_run_views

    registered = getattr(shell, _ATTRIBUTE, None)
    if registered is None:
        return
    delattr(shell, _ATTRIBUTE)
    notebook, matcher, configurables = registered
    async_cells.uninstall(shell)
    transformers = shell.input_transformers_cleanup
    transformers[:] = [one for one in transformers if getattr(one, "__module__", "") != "nbrunner.magics.finetune"]
    unset_run_views(shell)
    if shell.Completer is not None and matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(matcher)
    shell.configurables[:] = [one for one in shell.configurables if all(one is not ours for ours in configurables)]
    for kind, name in (
        ("cell", "generate"),
        ("cell", "chat"),
        ("line", "chat"),
        ("line", "swarm"),
        ("line", "explore"),
        ("cell", "explore"),
        ("line", "finetune"),
        ("cell", "finetune"),
        ("line", "host"),
    ):
        shell.magics_manager.magics[kind].pop(name, None)
    for one in configurables:
        if hasattr(one, "close"):  # servers that %host started
            one.close()
    notebook.close()
