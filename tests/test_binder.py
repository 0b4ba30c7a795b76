"""`binder/`: what repo2docker makes of it, and whether what it installs fits together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import ROOT


def test_repo2docker_takes_the_folder() -> None:
    """It needs no docker for this, and checks structure, not what pip resolves."""
    program = shutil.which("jupyter-repo2docker", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("jupyter-repo2docker is not installed: it is in the extra 'test'")
    done = subprocess.run(
        [program, "--no-build", "--debug", "."], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("binder/postBuild", "binder/start", 'install --no-cache-dir -r "binder/requirements.txt"'):
        assert name in done.stdout + done.stderr


def test_what_it_asks_for_is_installed_here() -> None:
    """The requirements without the project itself, against this environment: nothing (no torch) is downloaded."""
    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert "." in wanted  # with a binder folder, the files at the root are not looked at
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--quiet"]
    others = [line for line in wanted if line != "."]
    done = subprocess.run([*pip, *others], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


FIRST_CELL = """
import nbrunner
with nbrunner.LocalSwarm("tiny", servers=2, in_process=True) as swarm:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(swarm.model)
    prompt = tokenizer("The capital of France is", add_special_tokens=False, return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0]))
    model.close()
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_the_same_steps_in_a_clean_environment(tmp_path: Path) -> None:
    """What the Dockerfile does, in its order: copy the repository, install, postBuild, and a cell under `start`."""
    repository, place = tmp_path / "repository", tmp_path / "venv"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        target = repository / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    venv.create(place, with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(place)}

    def step(*command: str, timeout: int = 300) -> str:
        done = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    step("pip", "install", "--no-cache-dir", "--quiet", "-r", "binder/requirements.txt", timeout=1500)
    step("binder/postBuild")
    shutil.rmtree(repository / "nbrunner")  # what runs is what was installed
    assert step("binder/start", "python", "-c", FIRST_CELL).startswith("The capital of France is Paris")
    assert step("binder/start", "jupyter", "lab", "--version").startswith("4.")


def test_python_and_scripts() -> None:
    assert (ROOT / "binder" / "runtime.txt").read_text().strip() == "python-3.11"
    for script in ("postBuild", "start"):
        subprocess.run(["bash", "-n", str(ROOT / "binder" / script)], check=True)
    path = f"{ROOT / 'binder' / 'start'}"
    ran = subprocess.run([path, "sh", "-c", "echo $OMP_NUM_THREADS"], capture_output=True, text=True, check=True)
    assert ran.stdout == "1\n"
