"""What a notebook's kernel, servers and swarm need together, when all of them are in one process."""

from __future__ import annotations

from benchmarks.report import Report, Result
from benchmarks.start import measure

ALL_IN_ONE = """
import nbrunner
from ipykernel.kernelapp import IPKernelApp  # what a kernel has loaded before its first cell
with nbrunner.LocalSwarm(model="tiny", servers=2, in_process=PLACE) as swarm:
    model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
    import torch
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=32)
    say(seconds=since_start(), **footprint())
    model.close()
"""


def run() -> Report:
    """PSS (shared pages divided among those who share them) of the process and all that it started."""
    inside = measure(ALL_IN_ONE.replace("PLACE", "True"))
    outside = measure(ALL_IN_ONE.replace("PLACE", "False"))
    return Report(
        "memory",
        [
            Result(
                "kernel, two servers, swarm and client in one process: PSS",
                inside["megabytes"],
                "MB",
                reach=1000,
                at_most=True,
            ),
            Result("the same with servers in processes of their own: PSS", outside["megabytes"], "MB"),
            Result("processes, all in one (p2p daemons are their own)", inside["processes"], ""),
            Result("nothing to 32 tokens, all in one", inside["seconds"], "s"),
        ],
        {"model": "tiny"},
    )
