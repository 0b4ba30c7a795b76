"""A shell as in a terminal, and a model that needs no swarm; for the tests of the magics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nbrunner.tiny

TINY = Path(nbrunner.tiny.__file__).parent


@pytest.fixture(scope="session")
def shell_of_session(tmp_path_factory):
    import os

    os.environ["IPYTHONDIR"] = str(tmp_path_factory.mktemp("ipython"))
    from IPython.testing.globalipapp import start_ipython

    return start_ipython()  # a TerminalInteractiveShell; get_ipython() finds it


@pytest.fixture
def ip(shell_of_session):
    shell = shell_of_session
    shell.Completer.use_jedi = False
    shell.reset(new_session=False)
    shell.config.pop("NBRunner", None)  # what %config said in another test outlives a reload, as it should
    shell.run_line_magic("load_ext", "nbrunner")
    yield shell
    if "nbrunner" in shell.extension_manager.loaded:
        shell.run_line_magic("unload_ext", "nbrunner")


@pytest.fixture(scope="session")
def plain_model():
    """The bundled model in this process, without a swarm."""
    import transformers

    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture
def here(ip, plain_model):
    """The shell, with ``-m here`` a model that runs in this process."""
    ip.user_ns["here"] = plain_model
    return ip


@pytest.fixture
def displayed(ip, monkeypatch):
    """Everything displayed: (data, display_id, whether it was an update)."""
    published = []

    def publish(data, metadata=None, *, transient=None, update=False, **_):
        published.append((data, (transient or {}).get("display_id"), update))

    monkeypatch.setattr(ip.display_pub, "publish", publish)
    return published
