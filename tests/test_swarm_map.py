"""The map, the waterfall and the advice as drawn and decided: no network."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import msgspec
import pytest
from test_notebook_views import NASTY, PEERS, record

from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.reroute import reroutes
from nbrunner.client.step_times import StepTime, costs_most, token_time, typical
from nbrunner.client.waterfall import Waterfall
from nbrunner.magics.fits_here import SURELY_FASTER, Fit, LocalFits, advise
from nbrunner.magics.swarm_map import is_relayed, map_of
from nbrunner.protocol.steps import HopTiming
from nbrunner.swarm.view import ServerEntry, SwarmView

A, B, C = PEERS
CHAIN = ((A, 0, 4), (B, 4, 8))


def swarm(**changes) -> SwarmView:
    servers = {
        A: ServerEntry(record(0, 4, name="anna", queue_seconds=0.0021, adapters=["poet"]), round_trip=0.0123),
        B: ServerEntry(record(4, 8, addresses=["/ip4/1.2.3.4/tcp/1/p2p/X/p2p-circuit"]), round_trip=0.002),
        C: ServerEntry(msgspec.structs.replace(record(2, 8), state="joining"), round_trip=0.001),
    }
    return SwarmView(**{"servers": servers, "nodes_heard": 2, **changes})


def texts(svg: str) -> list[str]:
    """All lines of text in a picture; fails unless it is well-formed XML."""
    return [one.text or "" for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def route_points(svg: str) -> list[tuple[float, float]]:
    path = next(one.get("d") for one in ET.fromstring(svg).iter() if one.get("class") == "nbp-route-line")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_map_says_everything_in_picture_and_text():
    shown = map_of(swarm(), title="Swarm x", moment="12:00:00")
    for whole in ("\n".join(texts(shown.svg())), repr(shown)):
        for part in ("Swarm x", "12:00:00", "anna", "● online", "◐ joining", "250", "12.3 ms", "2.1 ms"):
            assert part in whole
        for part in ("1.0 M tok", "poet", "relayed", "direct", "0.1.0", "route of the next request"):
            assert part in whole
        assert "nobody" not in whole
    root = ET.fromstring(shown.svg())
    assert root.get("role") == "img"
    described = root.find("{http://www.w3.org/2000/svg}desc").text
    assert "anna holds blocks 0 to 3: online" in described


def test_a_narrow_map_says_the_same_and_stays_inside():
    whole = swarm()
    shown = map_of(
        SwarmView({A: whole.servers[A]}, {B: replace(whole.servers[B], failure="gone " * 40)}), title="x"
    )
    for narrow in (False, True):
        svg = shown.svg(narrow=narrow)
        width = float(ET.fromstring(svg).get("viewBox").split()[2])
        lines = list(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))
        for line in lines:
            if line.get("text-anchor") == "start":
                assert float(line.get("x")) + 5.2 * len(line.text) <= width, line.text
        whole_text = "".join(line.text for line in lines)
        assert "--blocks 4:8 --invite INVITE" in whole_text
        assert "cache left" in whole_text
    patterns = [re.search(r"pattern id='([^']+)'", shown.svg(narrow=narrow))[1] for narrow in (False, True)]
    assert len(set(patterns)) == 2
    for narrow, pattern in zip((False, True), patterns, strict=True):
        assert f"fill='url(#{pattern})'" in shown.svg(narrow=narrow)
    assert "@container" in shown.bundle(live=True)["text/html"]


def test_the_route_enters_and_leaves_servers_at_its_blocks():
    points = route_points(map_of(swarm(), title="x").svg())
    xs = [x for x, _ in points]
    assert xs == sorted(xs)
    assert len(points) == 4
    assert points[1][0] == points[2][0]  # from one server to the next at the same boundary
    assert points[0][1] == points[1][1] != points[2][1] == points[3][1]
    assert points[1][0] - points[0][0] == pytest.approx(points[3][0] - points[2][0], abs=0.2)  # 4 blocks each


def test_a_lost_server_leaves_a_gap_with_the_command_that_fills_it():
    whole = swarm()
    servers = {peer: entry for peer, entry in whole.servers.items() if peer == A}
    failed = {B: replace(whole.servers[B], failure="did not answer")}
    shown = map_of(SwarmView(servers, failed), title="x")
    for text in ("\n".join(texts(shown.svg())), repr(shown)):
        assert "✖ unreachable" in text
        assert "did not answer" in text
        assert "nobody" in text
        assert "nbrunner serve tiny --blocks 4:8 --invite INVITE" in text
        assert "No route can be made now." in text
    assert "nbp-route-line'" not in shown.svg()


def test_nothing_that_strangers_say_becomes_markup_or_a_command():
    nasty = NASTY + "\x00\x1b[31m\n\u202e"
    entry = ServerEntry(record(0, 4, name=nasty, version=nasty, adapters=[nasty]), failure=nasty)
    model = "a/b; rm -rf ~\n@1; reboot"
    evil = replace(entry, record=type(entry.record)(model=model, num_blocks=8, start=0, end=4, state="online"))
    shown = map_of(SwarmView({A: entry, C: evil}, {B: entry}), title=nasty)
    root = ET.fromstring(shown.svg())
    assert {one.tag.rpartition("}")[2] for one in root.iter()} <= {
        *("svg", "title", "desc", "style", "defs", "pattern", "rect", "g", "text", "path", "circle"),
    }
    assert not [name for one in root.iter() for name in one.attrib if name.startswith("on")]
    assert "\x1b" not in repr(shown)
    assert "\u202e" not in repr(shown)
    assert "nbrunner serve 'a/b; rm -rf ~' --revision '1; reboot' --blocks 4:8" in repr(shown)


def test_what_is_saved_is_an_image_and_a_table():
    shown = map_of(swarm(), title="x")
    assert set(shown.bundle(live=False)) == {"image/svg+xml", "text/plain"}
    assert "text/html" in shown.bundle(live=True)
    assert "prefers-color-scheme:dark" in shown.svg()
    assert "data-jp-theme-light" in shown.svg()
    assert "http" not in shown.svg().replace("http://www.w3.org/2000/svg", "")


def test_many_servers_and_blocks_still_make_a_picture():
    many = {f"{A[:-4]}{index:04d}": ServerEntry(record(0, 8)) for index in range(300)}
    assert "and 236 more servers: %swarm status lists them" in texts(map_of(SwarmView(many), title="x").svg())
    big = ServerEntry(type(record(0, 1))(model="m@1", num_blocks=100_000, start=0, end=100_000, state="online"))
    assert len(map_of(SwarmView({A: big}), title="x").svg()) < 20_000
    assert "No server has announced itself yet" in repr(map_of(SwarmView(), title="x"))


def test_relayed_means_by_relays_only():
    assert is_relayed(record(0, 4, addresses=["/ip4/1.2.3.4/tcp/1/p2p/X/p2p-circuit"]))
    assert not is_relayed(record(0, 4, addresses=["/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/X/p2p-circuit"]))
    assert not is_relayed(record(0, 4))


# -- where the time goes -----------------------------------------------------------------------------------------


def a_token(index: int = 3, *, ways=None, hops=((0.001, 0.010, 0.012), (0.0, 0.004, 0.005)), **changes):
    timings = [HopTiming(peer, *said) for (peer, _, _), said in zip(CHAIN, hops, strict=True)]
    step = StepTime(100.002, 100.032, timings)
    return token_time(index, step, CHAIN, asked=100.0, emitted=100.035, ways=ways, **changes)


def test_the_parts_of_a_token_add_up_to_its_time():
    time = a_token(ways=[0.002, 0.001, 0.001])
    assert time.total == pytest.approx(0.035)
    assert time.before == pytest.approx(0.002)
    assert time.after == pytest.approx(0.003)
    assert time.wire == pytest.approx(0.030 - 0.017)
    assert time.hops[0].wire == pytest.approx(2 * time.hops[1].wire)
    assert [hop.handling for hop in time.hops] == pytest.approx([0.001, 0.001])
    even = a_token()
    assert even.hops[0].wire == pytest.approx(even.back)


def test_servers_that_say_more_than_it_took_do_not_make_the_way_negative():
    time = a_token(hops=((0.0, 5.0, 5.0), (0.0, 5.0, 5.0)))
    assert time.wire == 0
    ET.fromstring(Waterfall(time).svg())


def test_parts_of_a_prompt_are_counted_together():
    timings = [HopTiming(peer, 0.0, 0.002, 0.003) for peer in (A, B, A, B)]
    time = token_time(0, StepTime(0.0, 0.02, timings), CHAIN, asked=0.0, emitted=0.02)
    assert time.parts == 2
    assert time.hops[0].compute == pytest.approx(0.004)
    assert "2 parts" in repr(Waterfall(time))


@pytest.mark.parametrize(
    ("hops", "words"),
    [
        (((0.0, 0.001, 0.001), (0.0, 0.001, 0.001)), "The way costs most: 28.0 of 35.0 ms"),
        (((0.020, 0.001, 0.022), (0.0, 0.001, 0.001)), "Waiting costs most: 20.0 of 35.0 ms a token, mainly at"),
        (((0.0, 0.004, 0.004), (0.0, 0.020, 0.020)), "Computing costs most: 24.0 of 35.0 ms a token, mainly at"),
        (((0.0, 0.001, 0.020), (0.0, 0.001, 0.001)), "Handing on costs most"),
    ],
)
def test_one_sentence_names_what_costs_most(hops, words):
    sentence = costs_most(a_token(hops=hops))
    assert sentence.startswith(words)
    assert "would help." in sentence
    assert sentence.count(".\n") == 0


def test_the_sentence_names_the_slowest_server_and_this_process():
    assert "[4, 8)" in costs_most(a_token(hops=((0.0, 0.004, 0.004), (0.0, 0.020, 0.020))))
    slow_here = token_time(1, StepTime(0.1, 0.101, []), CHAIN, asked=0.0, emitted=0.2)
    assert costs_most(slow_here).startswith("This process costs most: 199.0 of 200.0 ms")
    assert "Finding another server" in costs_most(a_token(replaced=True))
    assert costs_most(token_time(1, StepTime(0.1, 0.101, []), (), asked=0.0, emitted=0.2)) == ""


def test_the_typical_token_is_neither_the_first_nor_one_of_a_loss():
    times = [a_token(0), a_token(1, replaced=True), a_token(2)]
    assert typical(times).index == 2
    assert typical(times[:1]).index == 0
    assert typical([]) is None


def test_the_waterfall_says_the_same_in_picture_and_text():
    fall = Waterfall(a_token(), "<b>")
    for whole in ("\n".join(texts(fall.svg())), repr(fall)):
        for part in (
            "35.0 ms",
            "embedding",
            "norm, head",
            "way back",
            "queue 1.00 ms",
            "compute 10.00 ms",
            "[4, 8)",
        ):
            assert part in whole
        assert "<b>" in whole
    widths = [float(one.get("width")) for one in ET.fromstring(fall.svg()).iter() if one.get("height") == "14"]
    assert sum(widths) == pytest.approx(492, abs=0.2)


# -- who took over -----------------------------------------------------------------------------------------------


def test_a_loss_is_told_with_who_took_over():
    searching = reroutes(CHAIN, [(B, "it hung up")], ((A, 0, 4),), token=7)
    assert str(searching[0]).endswith("[4, 8) failed after token 7: it hung up; looking for another")
    (done,) = reroutes(CHAIN, [(B, "it hung up.")], ((A, 0, 4), (C, 2, 6), (A, 6, 8)), token=7)
    assert done.replaced_by == ((C, 4, 6), (A, 6, 8))
    assert str(done).endswith("took over")
    (never,) = reroutes(CHAIN, [(C, "full")], CHAIN, token=0)
    assert "looking" not in str(never)


# -- does it fit here --------------------------------------------------------------------------------------------

FIT = Fit("mid", 2 * 10**9, 16, "cpu", 8 * 10**9, 20e9)


def test_advice_has_the_figures():
    assert FIT.local_seconds == pytest.approx(0.108)
    line = advise(FIT, 0.5)
    assert line.startswith("mid fits here: it needs 2.4 GB, 8.0 GB are free (cpu); about 9 tok/s in this process")
    assert "2 over the swarm" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("fit", "seconds"),
    [
        (replace(FIT, free_bytes=2_300_000_000), 0.5),
        (FIT, 0.1),
        (FIT, FIT.local_seconds * SURELY_FASTER),
        (replace(FIT, weight_bytes=0), 0.5),
        (replace(FIT, bytes_per_second=0.0), 0.5),
    ],
)
def test_no_advice_where_it_does_not_fit_or_is_not_surely_faster(fit, seconds):
    assert advise(fit, seconds) == ""


def test_advice_is_given_once_for_each_model():
    fits = LocalFits()
    assert fits.sentence("tiny@1", 1.0) == ""
    fits.learn("tiny@1", resolve_checkpoint("tiny"))
    fit = fits.fit("tiny@1")
    assert 3e6 < fit.weight_bytes < 1e7
    assert fit.blocks == 8
    assert fits.once("tiny@1", None) == ""
    assert fits.once("tiny@1", 0.00001) == ""
    assert "tiny fits here" in fits.once("tiny@1", 1.0)
    assert fits.once("tiny@1", 1.0) == ""
    assert fits.sentence("tiny@1", 1.0)
