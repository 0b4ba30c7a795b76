"""`binder/`: what repo2docker makes of it, and whether what it installs fits together."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from helpers import ROOT


def test_repo2docker_takes_the_folder() -> None:
    """`pip install jupyter-repo2docker`; needs no docker for this. It checks structure, not what pip resolves."""
    program = shutil.which("jupyter-repo2docker")
    if program is None:
        pytest.skip("jupyter-repo2docker is not installed")
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


def test_python_and_scripts() -> None:
    assert (ROOT / "binder" / "runtime.txt").read_text().strip() == "python-3.11"
    for script in ("postBuild", "start"):
        subprocess.run(["bash", "-n", str(ROOT / "binder" / script)], check=True)
    path = f"{ROOT / 'binder' / 'start'}"
    ran = subprocess.run([path, "sh", "-c", "echo $OMP_NUM_THREADS"], capture_output=True, text=True, check=True)
    assert ran.stdout == "1\n"
