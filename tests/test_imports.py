"""What the two ways in cost: `import nbrunner` and `%load_ext nbrunner`, each in a fresh interpreter."""

from __future__ import annotations

import ast
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import ROOT

from nbrunner.imports import importing

HEAVY = ("torch", "hivemind", "plotly", "transformers", "numpy", "scipy", "peft", "bitsandbytes")

REPORT = """
import json, sys, threading
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules), "threads": threading.active_count()}))
"""

IMPORT = """
import time
begin = time.perf_counter()
import nbrunner
seconds = time.perf_counter() - begin
"""

LOAD = """
import time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
begin = time.perf_counter()
shell.extension_manager.load_extension("nbrunner")
seconds = time.perf_counter() - begin
assert "generate" in shell.magics_manager.magics["cell"]
"""


def fresh(code: str, tmp_path: Path) -> dict[str, object]:
    ran = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(("what", "code"), [("import nbrunner", IMPORT), ("%load_ext nbrunner", LOAD)])
def test_the_way_in_is_light(what: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    runs = [fresh(code, tmp_path) for _ in range(3)]
    modules = set(runs[0]["modules"])
    assert "nbrunner" in modules
    assert sorted(modules & set(HEAVY)) == []
    assert runs[0]["threads"] == fresh(code.split("begin =")[0] + "seconds = 0\n", tmp_path)["threads"]
    best = min(run["seconds"] for run in runs)
    print(f"{what}: {best:.3f} s")
    assert best < 0.3


def test_the_classes_of_models_are_light_so_that_a_swarm_is_joined_while_torch_is_imported(tmp_path: Path) -> None:
    code = "import nbrunner\nseconds = 0\nnbrunner.AutoDistributedModelForCausalLM.from_pretrained\n"
    modules = set(fresh(code, tmp_path)["modules"])
    assert "nbrunner.client.auto" in modules
    assert sorted(modules & set(HEAVY)) == []


def test_one_thread_imports_at_a_time_and_nothing_is_collected_meanwhile() -> None:
    inside, others = threading.Event(), []

    def other() -> None:
        with importing():
            others.append(inside.is_set())

    def fails(thread: threading.Thread) -> None:
        with importing():
            assert not gc.isenabled()
            thread.start()
            with importing():  # the same thread may
                thread.join(0.05)
            assert others == []
            inside.set()
            raise ImportError

    thread = threading.Thread(target=other)
    with pytest.raises(ImportError):
        fails(thread)
    thread.join()
    assert others == [True]
    assert gc.isenabled()


def test_what_was_imported_is_old_at_once() -> None:
    gc.unfreeze()  # of commands that ran in this process
    made: list[list[int]] = []
    with importing():
        made.append([1])
    old = {id(one) for one in gc.get_objects(generation=2)}
    assert id(made[0]) in old
    assert gc.get_freeze_count() == 0  # and yet not for ever: it can be collected


def test_public_names_resolve() -> None:
    import nbrunner

    assert len(set(nbrunner.__all__)) == len(nbrunner.__all__)
    assert set(nbrunner.__all__) <= set(dir(nbrunner))
    for name in nbrunner.__all__:
        assert getattr(nbrunner, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nbrunner.no_such_name


def test_public_names_are_documented() -> None:
    """docs/api.md names what is public, and nothing that is not."""
    import nbrunner

    page = (ROOT / "docs" / "api.md").read_text()
    listed = {line.split("`")[1].split("(")[0] for line in page.splitlines() if line.startswith("### `")}
    assert listed == set(nbrunner.__all__) - {"__version__"}


def test_version_is_the_projects() -> None:
    import tomllib

    import nbrunner

    assert nbrunner.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_only_one_file_reaches_into_transformers() -> None:
    """Semi-private parts of transformers move between releases: one file has them, and says so."""
    offenders = []
    for path in sorted((ROOT / "nbrunner").rglob("*.py")):
        if path.name in ("compat.py", "train.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            private = [
                n for n in names if n.startswith("transformers.") and any(p.startswith("_") for p in n.split("."))
            ]
            deep = [n for n in names if n.startswith("transformers.models.")]
            offenders += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in private + deep]
    assert offenders == []
