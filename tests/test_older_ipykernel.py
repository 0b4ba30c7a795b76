"""The magics in the generation of ipykernel that Colab runs: 6.31, beside everything else of this environment."""

from __future__ import annotations

import os
import subprocess
import sys
import venv

import pytest
from helpers import ROOT

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]

WORK = """
import ipykernel, sys
sys.path.insert(0, "tests")
from kernel_client import Kernel
kernel = Kernel()
try:
    print(kernel.value("__import__('ipykernel').__version__"))
    for cell in (
        "%load_ext nbrunner",
        "%%generate -n 12 -o out\\nThe capital of France is",
        "%%generate -n 40 --min-new-tokens 40 -b -o later\\nOnce upon a time",
        "%swarm status",
        "%swarm map",
        "%swarm map stop",
        "%%explore -o seen\\nThe capital of France is\\n---\\nThe capital of Spain is",
        "print(seen.patch((1, 2, 4), (0, 2, 4)).token_text(seen.patched.top_ids[-1, -1, 0]), 'patched')",
        "%host tiny --blocks 4:8 --threads 1 -o server",
        "server.wait_ready(60); server.pause(); server.resume(); server.drain()",
        "print(len((await later).tokens), server.state)",
    ):
        ran = kernel.run(cell, 120)
        print(ran.status, ran.text[-300:], *ran.traceback)
finally:
    kernel.close()
"""


def test_the_magics_run_there(tmp_path):
    place = tmp_path / "venv"
    venv.create(place, system_site_packages=True, with_pip=False, symlinks=True)
    site = next(place.glob("lib/python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # ours come after its own: what is installed there wins
    (site / "ours.pth").write_text("\n".join([*ours, str(ROOT)]) + "\n")
    python = place / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        "ipykernel==6.31.*",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"ipykernel 6.31 cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    kernels = tmp_path / "share" / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        f'{{"argv": ["{python}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], "display_name": "6.31", '
        '"language": "python"}'
    )
    environment = {**os.environ, "JUPYTER_PATH": str(tmp_path / "share" / "jupyter"), "PYTHONPATH": ""}
    ran = subprocess.run(
        [python, "-c", WORK], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("6.31."), ran.stdout
    assert "error" not in [line.split(" ")[0] for line in ran.stdout.splitlines()], ran.stdout
    assert "Paris" in ran.stdout
    assert "● online" in ran.stdout
    assert "40 ended" in ran.stdout
    assert "route of the next request" in ran.stdout
    assert "Explorer: 'The capital of France is' / 'The capital of Spain is'" in ran.stdout
    assert " Madrid patched" in ran.stdout
