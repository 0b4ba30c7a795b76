"""Tables, chains and texts as shown: complete in plain text and in HTML, and safe whatever strangers say."""

from __future__ import annotations

import html.parser
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrunner.client.result import Generation, Timings, Token, chain_text
from nbrunner.errors import serve_command
from nbrunner.magics import doctor
from nbrunner.magics.doctor import Finding, Report
from nbrunner.magics.swarm_views import chain_view, swarm_table, uncovered
from nbrunner.protocol.records import ServerRecord
from nbrunner.swarm.routing import explain
from nbrunner.swarm.view import ServerEntry, SwarmView
from nbrunner.widgets.swarm_table import blocks_bar, plain_bar

PEERS = [f"12D3KooWGzh8VWzYQ8Vi4oSp3n5W3GHPqbCqQBdVq1mSPe{letter}{letter}{letter}" for letter in "ABC"]
NASTY = "<img src=x onerror=alert(1)>\"'&"


def record(start: int, end: int, **changes) -> ServerRecord:
    facts = {"step_seconds": 0.004, "version": "0.1.0", "cache_bytes_left": 10**9, "cache_bytes_per_token": 1000}
    return ServerRecord(
        model="tiny@abc", num_blocks=8, start=start, end=end, state="online", **{**facts, **changes}
    )


def view(*entries: ServerEntry, failed: dict | None = None) -> SwarmView:
    return SwarmView(dict(zip(PEERS, entries, strict=False)), failed or {}, nodes_heard=2)


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_a_table_says_the_same_in_text_and_html():
    table = swarm_table(
        view(ServerEntry(record(0, 4, name="anna"), round_trip=0.0123), ServerEntry(record(4, 8))),
        title="Swarm x",
        invite=True,
    )
    for shown in (repr(table), table._repr_html_()):
        for part in ("Swarm x", "anna", "[0, 4)", "[4, 8)", "● online", "250", "12.3 ms", "1.0 M tok", "0.1.0"):
            assert part in shown
        assert "nobody serves" not in shown
    assert table._repr_html_().count("<caption>") == 1
    assert "scope='col'" in table._repr_html_()


def test_missing_blocks_are_named_with_what_to_do():
    table = swarm_table(
        view(ServerEntry(record(2, 4)), failed={PEERS[2]: ServerEntry(record(4, 8), failure="gone")}),
        title="Swarm x",
        invite=True,
    )
    for shown in (repr(table), table._repr_html_()):
        assert "nobody serves blocks [0, 2), [4, 8)" in shown
        assert "nbrunner serve tiny --blocks 0:2" in shown
        assert "✖ unreachable" in shown


def test_an_empty_swarm_says_so():
    assert "No server has announced itself yet" in repr(swarm_table(SwarmView(), title="Swarm x", invite=True))


def test_the_chain_says_where_and_why():
    seen = view(
        ServerEntry(record(0, 4), round_trip=0.001),
        ServerEntry(record(4, 8), round_trip=0.001),
        ServerEntry(record(4, 8, step_seconds=0.5), round_trip=0.3),
    )
    chain = chain_view(explain(seen, model="tiny@abc", start=0, end=8), seen, "tiny@abc")
    for shown in (repr(chain), chain._repr_html_()):
        assert "through 2 servers" in shown
        assert "ms computing" in shown
        assert "a chain without it is faster" in shown
    broken = chain_view(explain(view(), model="tiny@abc", start=0, end=8), view(), "tiny@abc")
    assert "nobody serves blocks [0, 8)" in repr(broken)


@pytest.mark.parametrize("shown", ["table", "chain", "report", "generation"])
def test_what_strangers_say_is_shown_as_text(shown):
    seen = view(
        ServerEntry(record(0, 8, name=NASTY, version=NASTY)),
        failed={PEERS[1]: ServerEntry(record(0, 8, name=NASTY), failure=NASTY)},
    )
    page = {
        "table": lambda: swarm_table(seen, title=NASTY, invite=True)._repr_html_(),
        "chain": lambda: chain_view(explain(seen, model="tiny@abc", start=0, end=8), seen, NASTY)._repr_html_(),
        "report": lambda: Report((Finding(NASTY, "problem", NASTY, NASTY),))._repr_html_(),
        "generation": lambda: generation(NASTY)._repr_html_(),
    }[shown]()
    tags = Tags(page)
    assert "img" not in tags.names
    assert "onerror" not in tags.attributes
    assert "&lt;img" in page


def generation(text: str) -> Generation:
    tokens = (Token(5, text, -0.5, 0.1), Token(6, "", -0.25, 0.3), Token(7, "", -0.25, 0.4))
    timings = Timings.of(tokens, started=0.0, total=0.5)
    chain = ((PEERS[0], 0, 4), (PEERS[1], 4, 8))
    return Generation(text, text, tokens, 3, "stop", timings, chain, receipt={"model": text})


def test_the_doctor_names_a_package_out_of_its_range(monkeypatch):
    real = doctor.importlib.metadata.version
    assert doctor._versions().result == "ok"
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "4.0.1" if name == "transformers" else real(name)
    )
    found = doctor._versions()
    assert found.result == "problem"
    assert "transformers 4.0.1" in found.found
    assert "pip install 'transformers" in found.advice


def test_commands_to_paste_are_one_word_for_a_name():
    assert serve_command("tiny@820d", 0, 4) == "nbrunner serve tiny --blocks 0:4 --invite INVITE"
    assert serve_command("a/b@c1", 2, 3) == "nbrunner serve a/b --revision c1 --blocks 2:3 --invite INVITE"
    assert serve_command("llama@d1", 2, 3).startswith("nbrunner serve DIRECTORY_OF_THE_MODEL --blocks")
    assert serve_command("", 2, 3).startswith("nbrunner serve MODEL --blocks")
    assert serve_command("a/b; ls@`id`", 2, 3).startswith("nbrunner serve 'a/b; ls' --revision '`id`' --blocks")


def test_the_line_under_a_text():
    line = generation("x").summary()
    assert line == f"6.7 tok/s · first token 0.10 s · {chain_text(generation('x').chain)}"
    assert re.search(r"…\w{6} \[0, 4\) → …\w{6} \[4, 8\)$", line)
    assert generation("x").timings.longest_gap == pytest.approx(0.2)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda span: span[0] < span[1])))
def test_uncovered_ranges_are_exactly_what_nobody_has(spans):
    missing = uncovered(spans, 12)
    lacking = {block for block in range(12) if not any(start <= block < end for start, end in spans)}
    assert {block for start, end in missing for block in range(start, end)} == lacking
    assert missing == sorted(missing)


@given(st.integers(1, 200), st.data())
def test_bars_fit_and_are_never_empty(total, data):
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    bar = plain_bar(start, end, total).partition(" ")[0]
    assert "█" in bar
    assert len(bar) <= 17
    assert f"[{start}, {end})" in blocks_bar(start, end, total)
