from __future__ import annotations

import os
import signal

# Before torch is imported anywhere: it takes its number of threads from here, as do the servers that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, Leftovers, find_chromium, mark_this_run
from hypothesis import HealthCheck, settings

mark_this_run()

# Two shared cores make single examples slow now and then; a deadline would only measure the neighbours.
settings.register_profile("nbrunner", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nbrunner")


@pytest.fixture(autouse=True)
def _takes_interrupts() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C; some of them send it to themselves.

    Before each test, because libraries put back what they found when they were imported.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no new process, no thread that keeps the interpreter alive, no socket file.

    What fixtures of a wider scope started is there before and does not count.
    """
    before = Leftovers.now()
    yield
    allowed = request.node.get_closest_marker("allow_leaks")
    if allowed is not None:
        if not (allowed.args or allowed.kwargs.get("reason")):
            pytest.fail("allow_leaks needs a reason")
        return
    left = before.wait_until_gone(timeout=10.0)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The bundled model's directory."""
    return ROOT / "nbrunner" / "tiny"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser; skips where there is none."""
    path = find_chromium()
    if path is None:
        pytest.skip("no chromium: install Debian's package or run `python -m playwright install chromium`")
    return path
