"""From nothing to the first token, and what a client costs: each in a fresh Python process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.report import Report, Result

ROUNDS = 5

WHOLE_SWARM = """
import nbrunner
with nbrunner.LocalSwarm(model="tiny", servers=2) as swarm:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
    import torch
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
    say(seconds=since_start())
"""

CLIENT_ALONE = """
import nbrunner
model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained("tiny", invite=sys.argv[1])
import torch
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
say(seconds=since_start(), **footprint())
"""

BARE = """
import torch, transformers
from nbrunner import tiny
model = transformers.AutoModelForCausalLM.from_pretrained(tiny.path())
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
say(seconds=since_start(), **footprint())
"""

LOAD_EXT = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
began = time.perf_counter()
shell.run_line_magic("load_ext", "nbrunner")
say(seconds=time.perf_counter() - began)
"""

IMPORT = """
began = time.perf_counter()
import nbrunner
say(seconds=time.perf_counter() - began)
"""

# psutil's create_time counts from when the machine was booted, in whole seconds: it was off by 0.9 s here
PRELUDE = """
import json, os, sys, time
import psutil
def since_start():
    return time.monotonic() - float(os.environ["STARTED"])
def footprint():
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {"processes": len(family), "megabytes": sum(one.memory_full_info().pss for one in family) / 1e6}
def say(**facts):
    print("RESULT", json.dumps(facts), flush=True)
"""


def run() -> Report:
    """Medians of five fresh processes each."""
    import nbrunner

    whole = [measure(WHOLE_SWARM)["seconds"] for _ in range(ROUNDS)]
    alone, bare = [], []
    with nbrunner.LocalSwarm(model="tiny", servers=2) as swarm:
        # in turn, and both beside the servers: pages of torch that several processes map count only in part
        for _ in range(ROUNDS):
            alone.append(measure(CLIENT_ALONE, swarm.invite))
            bare.append(measure(BARE))
    load_ext = [measure(LOAD_EXT)["seconds"] for _ in range(ROUNDS)]
    imported = [measure(IMPORT)["seconds"] for _ in range(ROUNDS)]

    def median(rows: list[dict[str, float]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    extra = median(alone, "megabytes") - median(bare, "megabytes")
    return Report(
        "start",
        [
            Result(
                "local swarm of two servers, nothing to first token",
                statistics.median(whole),
                "s",
                reach=10,
                at_most=True,
            ),
            Result(
                "client alone joins a running swarm, nothing to first token",
                median(alone, "seconds"),
                "s",
                reference=median(bare, "seconds"),
                reach=4,
                at_most=True,
            ),
            Result("plain transformers, nothing to first token", median(bare, "seconds"), "s"),
            Result("%load_ext nbrunner", statistics.median(load_ext), "s", reach=0.3, at_most=True),
            Result("import nbrunner", statistics.median(imported), "s", reach=0.3, at_most=True),
            Result("processes of the client", median(alone, "processes"), "", reach=2, at_most=True),
            Result("PSS of the client above plain torch + transformers", extra, "MB", reach=120, at_most=True),
        ],
        {"rounds": ROUNDS, "model": "tiny"},
    )


def measure(code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "STARTED": str(time.monotonic())},  # one clock for all processes of a machine
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            facts: dict[str, float] = json.loads(line[7:])
            return facts
    raise RuntimeError(f"no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
