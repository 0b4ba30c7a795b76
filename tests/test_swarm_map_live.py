"""The map, the waterfall and a re-route in a real kernel over a real swarm, with servers killed under them."""

from __future__ import annotations

import queue
import time
import xml.etree.ElementTree as ET

import pytest
from kernel_client import Kernel

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]

SLOW = "%%generate -n 250 --min-new-tokens 250 -b -o later\nOnce upon a time"


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    try:
        assert kernel.run("%load_ext nbrunner").status == "ok"
        started = kernel.run("%swarm start --servers 0:4 4:8 4:8 -o swarm", timeout=180)
        assert started.status == "ok", started.traceback
        yield kernel
    finally:
        kernel.close()


def pictures_until(kernel: Kernel, wanted: str, seconds: float) -> list[dict]:
    """The bundles that a live map sends, until one whose text has the wanted words."""
    seen, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            message = kernel.client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        data = message["content"].get("data", {})
        if message["msg_type"] == "update_display_data" and "image/svg+xml" in data:
            seen.append(data)
            if wanted in data["text/plain"]:
                return seen
    raise AssertionError(f"no map with {wanted!r} within {seconds} s; the last: {seen[-1:]}")


def test_a_lost_server_is_told_while_the_text_goes_on(kernel):
    first = kernel.run("%%generate -n 3 -o first\nHi")
    assert first.status == "ok", first.traceback
    assert [one.kind for one in first.outputs if one.kind == "stream"] == []
    # whether there is advice depends on this machine's load; that the model is known does not
    known = "[(f[0], f[1], f[2]) for f in get_ipython()._nbrunner_registered[0].fits._facts.values()]"
    ((name, size, blocks),) = kernel.value(known)
    assert (name, blocks) == ("tiny", 8)
    assert size > 1e6
    assert kernel.run(SLOW).status == "ok"
    killed = kernel.run(
        "import asyncio\n"
        "while later.partial is None or len(later.partial.tokens) < 20: await asyncio.sleep(0.02)\n"
        "peer = later.partial.chain[-1][0]\n"
        "next(one for one in swarm.servers if one.peer_id == peer).kill()\n"
        "while not later.reroutes: await asyncio.sleep(0.005)\n"
        "note, finished = later.note, later.done\n"
        "out = await later"
    )
    assert killed.status == "ok", killed.traceback
    lost = kernel.value("[(r.peer, r.start, r.end, r.token, len(r.replaced_by)) for r in out.reroutes]")
    peer, start, end, token, others = lost[0]
    assert (len(lost), start, end, others) == (1, 4, 8, 1)
    assert peer == kernel.value("peer")
    assert token >= 20
    note, finished = kernel.value("(note, finished)")
    assert "failed after token" in note
    assert not finished
    assert kernel.value("len(out.tokens)") == 250
    assert kernel.value("out.receipt['reroutes'][0]['replaced_by'] == [list(out.chain[-1])]")
    assert kernel.value("str(out.reroutes[0]).endswith('took over')")
    assert kernel.value("[t.index for t in out.times if t.replaced]") == [token]


def test_the_waterfall_is_made_of_what_was_measured(kernel):
    # Guessing may turn itself on when the machine is slow, and one pass then brings several tokens.
    ran = kernel.run("%%generate -n 30 --min-new-tokens 30 --speculate off --waterfall -o out\nOnce upon a time")
    assert ran.status == "ok", ran.traceback
    fall = next(one for one in ran.outputs if "image/svg+xml" in one.content.get("data", {}))
    ET.fromstring(fall.content["data"]["image/svg+xml"])
    assert "way back" in fall.plain
    footer = next(text for text in ran.final if "tok/s" in text)
    assert "costs most" in footer
    assert "[4, 8)" in fall.plain
    gaps = kernel.value(
        "[(t.total, b.seconds - a.seconds) for t, a, b in zip(out.times[1:], out.tokens, out.tokens[1:])]"
    )
    assert len(gaps) == 29
    for total, gap in gaps:  # the parts are all there is of the time between two tokens
        assert total == pytest.approx(gap, rel=0.02, abs=2e-4)
    assert kernel.value("all(h.compute > 0 for t in out.times for h in t.hops)")
    assert kernel.value("out.waterfall(0).time.index") == 0


def test_the_map_shows_a_killed_server_and_freezes_to_an_image(kernel):
    shown = kernel.run("%swarm map")
    assert shown.status == "ok", shown.traceback
    first = next(one for one in shown.outputs if "image/svg+xml" in one.content.get("data", {}))
    assert "route of the next request" in first.plain
    assert "text/html" in first.content["data"]
    assert kernel.value("1 + 1") == 2  # cells run meanwhile
    before = time.monotonic()
    kernel.start("swarm.servers[0].kill()")
    seen = pictures_until(kernel, "✖ nobody serves blocks [0, 4): nbrunner serve tiny --blocks 0:4", 15)
    assert "✖ unreachable" in seen[-1]["text/plain"]
    assert "nobody [0, 4)" in seen[-1]["image/svg+xml"]
    assert len(seen) <= 1.5 * (time.monotonic() - before) + 3  # once a second
    kernel.start("%swarm map stop")
    frozen = []
    while "text/html" in (frozen := pictures_until(kernel, "✖ nobody", 10))[-1]:
        pass
    assert set(frozen[-1]) == {"image/svg+xml", "text/plain"}
    names = "[thread.name for thread in __import__('threading').enumerate()]"
    assert "nbrunner-map" not in kernel.value(names)
    again = kernel.run("%swarm map stop")
    assert again.status == "error"
    assert again.text.strip() == "UsageError: %swarm map stop: no live map is shown"


def test_leaving_the_extension_ends_a_live_map(kernel):
    assert kernel.run("%swarm map").status == "ok"
    assert kernel.run("%unload_ext nbrunner").status == "ok"
    assert "nbrunner-map" not in kernel.value("[thread.name for thread in __import__('threading').enumerate()]")
