"""Over slow links, 50 ms there and back: what guessing ahead and pushing from server to server are worth."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.links import Namespaces, Proxies, namespaces_possible
from benchmarks.report import Report, Result

ROUND_TRIP = 0.05
MEGABITS = 100.0
TOKENS = 128
BLOCKS = ((0, 4), (4, 8))

CLIENT = """
import json, statistics, sys, time
import torch
import nbrunner
from benchmarks.report import interleaved
from nbrunner.swarm.loop import EngineLoop

invite, tokens = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained("tiny", invite=invite, retry_budget=60)
tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(model.config._name_or_path)
prompt = tokenizer(["one two three four five six seven eight one two three four five six"], return_tensors="pt")
directory = model.swarm.directory

def star(on):
    # as if no server could reach another: the client carries everything across (there is no switch for it)
    def change():
        directory._bad_links.clear()
        peers = list(directory.view.servers)
        for near in peers if on else ():
            for far in peers:
                directory.mark_link_failed(near, far)
        directory._rebuild()
    EngineLoop.get().loop.call_soon_threadsafe(change)
    while bool(directory.view.bad_links) is not on:
        time.sleep(0.01)

def run(**options):
    begun = options.pop("star", False)
    star(begun)
    with model.inference_session() as session:
        model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False, session=session)
        began = time.perf_counter()
        model.generate(session=session, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
        return (time.perf_counter() - began) / tokens

plain, guessed, carried = interleaved([run, lambda: run(speculate="auto"), lambda: run(star=True)])
print("RESULT", json.dumps({"plain": plain, "guessed": guessed, "carried": carried}), flush=True)
model.close()
"""


def run() -> Report:
    """Greedy text of the bundled model, which repeats itself, over two servers."""
    by = "network namespaces and a switch" if namespaces_possible() else "loopback proxies"
    with ExitStack() as stack:
        found = stack.enter_context(_namespaces() if namespaces_possible() else _proxies())
    results = [
        Result(
            "greedy text with repetition, guessing ahead over none",
            1 / found["guessed"],
            "tokens/s",
            1 / found["plain"],
            found["plain"] / found["guessed"],
            reach=2.0,
        ),
        Result(
            "the same without guesses, pushed from server to server over carried by the client",
            1 / found["plain"],
            "tokens/s",
            1 / found["carried"],
            found["carried"] / found["plain"],
            reach=1.3,
        ),
    ]
    conditions = {
        "round trip ms": 1000 * ROUND_TRIP,
        "Mbit/s": MEGABITS,
        "links": by,
        "tokens": TOKENS,
        "model": "tiny",
    }
    return Report("wan", results, conditions)


@contextmanager
def _namespaces() -> Iterator[dict[str, float]]:
    network = Namespaces(1 + len(BLOCKS), ROUND_TRIP / 2, MEGABITS)
    try:
        places = [
            (network.command(1 + number, []), ["--listen", f"/ip4/{network.address(1 + number)}/tcp/31330"])
            for number in range(len(BLOCKS))
        ]
        with _servers(places) as invite:
            yield _client(invite, network.command(0, []))
    finally:
        network.close()


@contextmanager
def _proxies() -> Iterator[dict[str, float]]:
    proxies = Proxies(ROUND_TRIP / 2, MEGABITS)
    try:
        places = []
        for number in range(len(BLOCKS)):
            port = 31330 + number
            told = f"/ip4/127.0.0.1/tcp/{proxies.open(port)}"
            places.append(([], ["--listen", f"/ip4/127.0.0.1/tcp/{port}", "--announce", told]))
        with _servers(places) as invite:
            yield _client(invite, [])
    finally:
        proxies.close()


@contextmanager
def _servers(places: list[tuple[list[str], list[str]]]) -> Iterator[str]:
    """Servers at these places (what to put before their command, and behind); gives an invite."""
    from nbrunner.child import Spawner, serve_command, start_server
    from nbrunner.protocol.credentials import SwarmKey

    spawner, key, servers = Spawner(), SwarmKey(), []
    deadline = time.monotonic() + 180
    try:
        for (before, behind), (start, end) in zip(places, BLOCKS, strict=True):
            command = [*before, *serve_command("tiny", "--blocks", f"{start}:{end}", "--threads", "1", *behind)]
            servers.append(start_server(spawner, command, (start, end), threads=1))
        servers[0].tell("swarm-key:" + key.identity.seed.hex())
        addresses = list(servers[0].wait_for("joined", deadline)["addresses"])
        for server in servers[1:]:
            server.tell(str(key.invite(addresses, role="host")))
        ready = [server.wait_for("ready", deadline)["addresses"] for server in servers]
        yield str(key.invite([address for found in ready for address in found]))
    finally:
        for server in servers:
            server.kill()
        spawner.close()


def _client(invite: str, before: list[str]) -> dict[str, float]:
    command = [*before, sys.executable, "-c", CLIENT, invite, str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise RuntimeError(f"the client failed: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return found
