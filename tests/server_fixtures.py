"""Two real server processes with the bundled model, a node that speaks to them, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from server_client import run

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.blocks.span import BlockSpan
from nbrunner.protocol.credentials import Invite
from nbrunner.swarm.node import Node


@pytest.fixture(scope="module")
def swarm() -> Iterator[nbrunner.LocalSwarm]:
    with nbrunner.LocalSwarm("tiny", ["0:3", "3:8"]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: nbrunner.LocalSwarm) -> Iterator[Node]:
    node = run(Node.create(invite=Invite.parse(swarm.invite), client_mode=True))
    yield node
    run(node.close())


@pytest.fixture(scope="module")
def spans(tiny_path: Path) -> list[BlockSpan]:
    torch.set_num_threads(1)
    checkpoint = resolve_checkpoint("tiny")
    return [BlockSpan.load(checkpoint, 0, 3), BlockSpan.load(checkpoint, 3, 8)]


@pytest.fixture(scope="module")
def uid() -> str:
    return resolve_checkpoint("tiny").uid
