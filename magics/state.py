"""What a notebook is connected to: a swarm, loaded models, named sessions, conversations."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbrunner.errors import NBRunnerError, UserInputError
from nbrunner.imports import importing
from nbrunner.magics.config import NBRunner
from nbrunner.magics.fits_here import LocalFits
from nbrunner.magics.worker import Worker

if TYPE_CHECKING:
    from nbrunner.blocks.checkpoint import Checkpoint
    from nbrunner.client.connection import SwarmConnection
    from nbrunner.local import LocalSwarm
    from nbrunner.magics.swarm_map import MapKeeper

BUNDLED = "tiny"
"""Name of the model that comes with the package."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate. ``owned``: loaded here, and closed here."""

    name: str
    model: Any
    tokenizer: Any
    owned: bool = True


@dataclass
class Conversation:
    """A chat: its messages, and the session that holds their caches."""

    messages: list[dict[str, str]] = field(default_factory=list)
    session: Any = None


class Notebook:
    """The state behind the magics of one kernel.

    Methods that may take seconds say so, and are to be run by `worker`.

    Parameters
    ----------
    shell
        IPython's shell; its namespace is read for models and written for results.
    config
        ``%config NBRunner``.
    """

    def __init__(self, shell: Any, config: NBRunner) -> None:
        self.shell = shell
        self.config = config
        self.worker = Worker()
        self.local: LocalSwarm | None = None
        self.connection: SwarmConnection | None = None
        self._models: dict[str, LoadedModel] = {}
        self._sessions: dict[tuple[str, str], Any] = {}
        self._drafts: dict[str, Any] = {}
        self.conversations: dict[tuple[str, str], Conversation] = {}
        self.fits = LocalFits()
        self.map: MapKeeper | None = None
        self.before_leaving: list[Callable[[], None]] = []

    # -- the swarm -----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether there is a swarm to use."""
        return self.connection is not None

    @property
    def invite(self) -> str:
        """The invite this notebook came in with."""
        if self.local is not None:
            return str(self.local.invite)
        return str(self.connection.invite) if self.connection is not None else ""

    def will_start_swarm(self, model: str | None) -> bool:
        """Whether a cell for this model would first start a swarm on this machine."""
        name = model or self.config.model or BUNDLED
        return not self.connected and not self.config.invite and name == BUNDLED and name not in self.shell.user_ns

    def start_swarm(self, model: str = BUNDLED, servers: int | Sequence[str] = 2) -> LocalSwarm:
        """Start servers on this machine and connect to them. Seconds."""
        from nbrunner.local import LocalSwarm

        self.leave()
        # The servers take seconds to import torch; this process can do the same meanwhile.
        threading.Thread(target=_import_client, name="nbrunner-import", daemon=True).start()
        swarm = LocalSwarm(model=model, servers=servers if isinstance(servers, int) else list(servers))
        try:
            self._connect(str(swarm.invite))
        except BaseException:
            swarm.close()
            raise
        self.local = swarm
        return swarm

    def join(self, invite: str) -> SwarmConnection:
        """Connect to the swarm of an invite. Seconds."""
        from nbrunner.protocol.credentials import Invite

        parsed = Invite.parse(invite)
        self.leave()
        return self._connect(str(parsed))

    def _connect(self, invite: str) -> SwarmConnection:
        from nbrunner.client.connection import SwarmConnection
        from nbrunner.swarm.loop import EngineLoop

        self.connection = EngineLoop.get().run(SwarmConnection.join(invite))
        return self.connection

    def leave(self) -> None:
        """Close models and sessions, leave the swarm, stop the servers that were started here. A second or two."""
        for stop in self.before_leaving:
            stop()
        self.stop_map()
        self._close_models()
        connection, self.connection = self.connection, None
        if connection is not None:
            from nbrunner.swarm.loop import EngineLoop

            EngineLoop.get().run(connection.leave())
        local, self.local = self.local, None
        if local is not None:
            local.close()

    def stop_map(self) -> bool:
        """Freeze the live map, if there is one."""
        shown, self.map = self.map, None
        if shown is None:
            return False
        running = shown.running
        shown.stop()
        return running

    def learn_fits(self) -> None:
        """Find out how big the models are whose weights are known here. Asks no network; 0.1 s for each, once."""
        from nbrunner.blocks.checkpoint import Checkpoint, resolve_checkpoint

        known: dict[str, tuple[Callable[[], Checkpoint], str]] = {}
        for name, loaded in self._models.items():
            checkpoint = getattr(loaded.model, "nbrunner_checkpoint", None)
            if isinstance(checkpoint, Checkpoint):
                known[checkpoint.uid] = (functools.partial(_same, checkpoint), name)
        view = self.connection.directory.view if self.connection is not None else None
        for uid in {entry.record.model for entry in view.servers.values()} if view is not None else ():
            if uid.partition("@")[0] == BUNDLED:
                known.setdefault(uid, (functools.partial(resolve_checkpoint, BUNDLED), BUNDLED))
            elif self.local is not None:
                known.setdefault(uid, (functools.partial(resolve_checkpoint, Path(self.local.model)), ""))
        for uid, (find, name) in known.items():
            if not self.fits.knows(uid):
                with contextlib.suppress(NBRunnerError, OSError, ValueError, RuntimeError):  # it is only advice
                    found = find()
                    if found.uid == uid:  # else a stranger calls his model like ours
                        self.fits.learn(uid, found, name=name)

    def _close_models(self) -> None:
        sessions = [*self._sessions.values(), *[one.session for one in self.conversations.values()]]
        for session in sessions:
            if session is not None:
                with contextlib.suppress(NBRunnerError):  # its servers may be gone already
                    session.close()
        for conversation in self.conversations.values():
            conversation.session = None
        self._sessions.clear()
        models, self._models = list(self._models.values()), {}
        for loaded in models:
            if loaded.owned:
                loaded.model.close()

    def close(self) -> None:
        """Everything this notebook started, ended. Called when the extension is unloaded."""
        if self.connected or self._models or self._sessions:
            self.worker.submit(self.leave).result(30)
        self.worker.close()

    # -- models --------------------------------------------------------------------------------------------------

    def load(self, name: str | None) -> LoadedModel:
        """The model for a cell: named, configured, served, or the bundled one on a swarm of its own. Seconds."""
        name = name or self.config.model or None
        if name is not None and name in self.shell.user_ns:
            return self._from_variable(name, self.shell.user_ns[name])
        if not self.connected:
            if self.config.invite:
                self.join(self.config.invite)
            elif name in (None, BUNDLED):
                self.start_swarm(BUNDLED, self.config.servers)
            else:
                raise UserInputError(
                    f"no swarm was joined that could serve {name!r}: %swarm join INVITE, or %swarm start {name} "
                    "to serve it on this machine."
                )
        name = name or self._served_model()
        if name not in self._models:
            self._models[name] = self._from_swarm(name)
        return self._models[name]

    def _from_variable(self, name: str, value: Any) -> LoadedModel:
        if not (callable(getattr(value, "generate", None)) and hasattr(value, "config")):
            raise UserInputError(f"the variable {name!r} holds no model with a generate() method.")
        known = self._models.get(name)
        if known is not None and known.model is value:
            return known
        from nbrunner.client.tokenizers import load_tokenizer

        config = value.config
        if not config._name_or_path:
            raise UserInputError(f"the model in {name!r} was made in memory: no tokenizer is known for it.")
        tokenizer = load_tokenizer(config._name_or_path, revision=getattr(config, "_commit_hash", None))
        self._models[name] = LoadedModel(name, value, tokenizer, owned=False)
        return self._models[name]

    def _from_swarm(self, name: str) -> LoadedModel:
        from nbrunner.client.auto import AutoDistributedModelForCausalLM
        from nbrunner.client.tokenizers import load_tokenizer

        source, revision = self._source(name)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            source, invite=self.invite, revision=revision, wire=self.config.wire
        )
        try:
            tokenizer = load_tokenizer(source, revision=revision)
        except NBRunnerError:
            model.close()
            raise
        return LoadedModel(name, model, tokenizer)

    def _source(self, name: str) -> tuple[str, str | None]:
        """Where a name or uid can be loaded from: directory or repository, and revision."""
        if self.local is not None and name in (self.local_name, str(self.local.model)):
            return str(self.local.model), None
        if name == BUNDLED:
            import nbrunner.tiny

            return str(Path(str(nbrunner.tiny.__file__)).parent), None
        repository, _, revision = name.partition("@")
        if not revision:
            self._check_served(name)
            return name, None
        if "/" in repository:
            return repository, revision
        raise UserInputError(
            f"this swarm serves {name}, which its servers read from a directory: give your own copy of it with "
            "-m DIRECTORY (only embeddings, norm and head are read from it)."
        )

    def _check_served(self, name: str) -> None:
        """Refuse a hub's model that nobody here serves before the hub is asked for it, which takes a while."""
        if self.connection is None or Path(name).expanduser().exists():
            return  # the uid of a directory is known only when it has been read
        view = self.connection.directory.view
        served = {entry.record.model for entry in [*view.servers.values(), *view.failed.values()]}
        if served and name not in {uid.partition("@")[0] for uid in served}:
            raise UserInputError(f"this swarm serves {', '.join(sorted(served))}, not {name}: choose with -m.")

    @property
    def local_name(self) -> str:
        """The name under which the model of the swarm started here is known; empty without one."""
        if self.local is None:
            return ""
        source = Path(str(self.local.model))
        return BUNDLED if source.parent.name == "nbrunner" and source.name == BUNDLED else str(self.local.model)

    def _served_model(self) -> str:
        if self.local is not None:
            return self.local_name
        served = self.served_models()
        if len(served) == 1:
            return served[0]
        if served:
            raise UserInputError(f"this swarm serves {', '.join(served)}: choose one with -m.")
        raise UserInputError("nobody in this swarm serves a model yet: %swarm status shows who is there.")

    def draft(self, name: str) -> Any:
        """A small model in this process that guesses for another. Seconds, the first time."""
        value = self.shell.user_ns.get(name)
        if value is not None:
            if not (callable(value) and hasattr(value, "config")):
                raise UserInputError(f"the variable {name!r} holds no model that could guess.")
            return value
        if name not in self._drafts:
            from transformers import AutoModelForCausalLM

            import nbrunner.tiny

            source = nbrunner.tiny.path() if name == BUNDLED else Path(name).expanduser()
            if not source.is_dir():
                raise UserInputError(f"--draft {name}: no variable, and no directory of a model, is called so.")
            try:
                self._drafts[name] = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise UserInputError(f"--draft {name} cannot be loaded: {error}") from None
        return self._drafts[name]

    def served_models(self) -> list[str]:
        """Models in the directory's view, as names that `load` takes. Reads what is known; asks nobody."""
        if self.connection is None:
            return []
        view = self.connection.directory.view
        return sorted({_name_of(entry.record.model) for entry in view.servers.values()})

    def served_adapters(self) -> list[str]:
        """Names of adapters in the directory's view. Reads what is known; asks nobody."""
        if self.connection is None:
            return []
        servers = self.connection.directory.view.servers.values()
        return sorted({uid.partition("@")[0] for entry in servers for uid in entry.record.adapters})

    def known_models(self) -> list[str]:
        """Names worth offering for -m: served, loaded, configured, bundled, and variables that hold a model."""
        variables = [
            name
            for name, value in self.shell.user_ns.items()
            if not name.startswith("_") and hasattr(value, "generate") and hasattr(value, "generation_config")
        ]
        names = {*self.served_models(), *self._models, *variables, BUNDLED}
        if self.config.model:
            names.add(self.config.model)
        return sorted(names)

    # -- sessions ------------------------------------------------------------------------------------------------

    def session(self, loaded: LoadedModel, name: str, *, new: bool = False) -> Any:
        """The session of this name with this model, opened when it is first asked for."""
        if not hasattr(loaded.model, "inference_session"):
            raise UserInputError(f"the model {loaded.name!r} runs without a swarm and has no sessions.")
        key = (loaded.name, name)
        session = self._sessions.get(key)
        if session is not None and (new or session.closed):
            session.close()
            session = None
        if session is None:
            session = self._sessions[key] = loaded.model.inference_session()
        return session

    def session_names(self) -> list[str]:
        """Names of the open sessions."""
        return sorted({name for _, name in self._sessions})

    def conversation(self, model: str, name: str) -> Conversation:
        """The conversation of this name with this model."""
        return self.conversations.setdefault((model, name), Conversation())

    def store(self, name: str | None, value: Any) -> None:
        """Put a result into the notebook."""
        if name is not None:
            self.shell.user_ns[name] = value

    @property
    def namespace(self) -> Mapping[str, Any]:
        """The notebook's variables."""
        return dict(self.shell.user_ns)


def _same(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def _import_client() -> None:
    with importing():
        importlib.import_module("nbrunner.client.load")
        importlib.import_module("nbrunner.client.generation")


def _name_of(uid: str) -> str:
    """What to call a model that is announced as ``tiny@…`` or ``owner/repo@…``."""
    name, _, _ = uid.partition("@")
    return name if name == BUNDLED else uid
