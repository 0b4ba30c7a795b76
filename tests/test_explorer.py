"""The explorer without a browser: what it sends, what a page may ask, and that text stays text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from parity.chain import local_model

import nbrunner
from nbrunner.blocks.checkpoint import resolve_checkpoint
from nbrunner.client.edits import Edit
from nbrunner.errors import UserInputError
from nbrunner.widgets.explorer import Explorer, explore
from nbrunner.widgets.explorer_data import changed_cells, compared, pack, strided
from nbrunner.widgets.explorer_page import document, fragment, script

pytest_plugins = ["notebook_fixtures"]
FRANCE, SPAIN = "The capital of France is", "The capital of Spain is"


@dataclass
class Run:
    """As much of a `Trace` as is drawn."""

    layers: list[int]
    positions: list[int]
    top_ids: Any
    top_probs: Any
    ids: list[int]
    tokens: list[str]
    num_blocks: int
    norm: Any = None
    entropy: Any = None
    chosen_probs: Any = None
    chosen_ranks: Any = None
    cos_previous: Any = None
    cos_last: Any = None
    kl: Any = None
    chosen: list[int] = field(default_factory=list)
    hops: Any = ()
    model_name: str = "made up"
    seconds: float = 0.0
    bytes_received: int = 0
    model: Any = None
    tokenizer: Any = None

    def token_text(self, token: int) -> str:
        return f"t{token}"


def made_up(rows: int, columns: int, top: int = 5, vocabulary: int = 3000, seed: int = 0) -> Run:
    rng = np.random.default_rng(seed)
    shape = (rows, columns)
    return Run(
        layers=list(range(rows)),
        positions=list(range(columns)),
        top_ids=rng.integers(0, vocabulary, (*shape, top)).astype(np.int32),
        top_probs=rng.random((*shape, top), np.float32),
        ids=rng.integers(0, vocabulary, columns).tolist(),
        tokens=[f"w{i}" for i in range(columns)],
        num_blocks=rows - 1,
        norm=(rng.random(shape) * 1e6).astype(np.float32),
        entropy=rng.random(shape, np.float32) * 10,
        kl=rng.random(shape, np.float32) * 10,
        cos_previous=rng.random(shape, np.float32),
        cos_last=rng.random(shape, np.float32),
    )


@pytest.fixture(scope="module")
def tiny():
    checkpoint = resolve_checkpoint("tiny")
    model = local_model(checkpoint, 5)
    yield model
    model.close()


@pytest.fixture
def pair(tiny):
    explorer = explore((FRANCE, SPAIN), tiny)
    yield explorer
    explorer.close()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 6),
    top=st.integers(1, 4),
    vocabulary=st.sampled_from([1, 50, 200_000]),
    seed=st.integers(0, 1000),
)
def test_what_is_packed_is_what_was_traced(rows, columns, top, vocabulary, seed):
    run = made_up(rows, columns, top, vocabulary, seed)
    packed = pack(run)
    json.dumps(packed.meta)
    ids = np.asarray(packed.meta["vocabulary_ids"])
    assert (ids[packed.array("top")] == run.top_ids).all()
    assert packed.meta["vocabulary"] == [f"t{one}" for one in ids]
    np.testing.assert_allclose(packed.array("probs"), run.top_probs, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        packed.array("norm").astype(np.float64) * packed.meta["norm_scale"], run.norm, rtol=2e-3, atol=2
    )
    for one in packed.meta["arrays"].values():
        assert one["offset"] % 4 == 0


def test_ids_of_a_huge_vocabulary_do_not_wrap_around():
    run = made_up(120, 140, 5, 200_000)
    packed = pack(run, most_rows=120)
    assert len(packed.meta["vocabulary"]) > 65536
    assert (np.asarray(packed.meta["vocabulary_ids"])[packed.array("top")] == run.top_ids).all()


def test_a_probability_of_zero_and_an_infinite_norm_can_be_drawn():
    run = made_up(2, 2)
    run.norm[0, 0] = np.inf
    run.chosen, run.chosen_ranks = [5], np.zeros((2, 2, 1), np.int32)
    run.chosen_probs = np.zeros((2, 2, 1), np.float32)
    packed = pack(run)
    assert packed.array("chosen_logs").max() == np.finfo(np.float16).min
    assert np.isfinite(packed.array("norm")).all()


@given(st.integers(1, 300), st.integers(1, 80))
def test_thinning_keeps_the_last_layer(count, most):
    kept = strided(range(count), most)
    assert kept[-1] == count - 1
    assert len(kept) <= most
    assert len(set(np.diff(kept))) <= 1


def test_a_big_trace_stays_under_its_budget():
    run = made_up(65, 128)
    packed = pack(run)
    html = fragment([packed], key="k")
    print(f"explorer: buffer {len(packed.buffer) / 1000:.0f} kB, all {len(html) / 1000:.0f} kB, 128 × 65 × top-5")
    assert len(html) < 400_000  # with the script, the style and the table
    assert packed.meta["thinned"] == 0
    assert pack(made_up(65, 400)).meta["layers"][-1] == 64
    assert len(pack(made_up(65, 400)).buffer) < 400_000


def test_nothing_in_a_text_becomes_markup():
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&\u2028"
    run = made_up(3, 2)
    run.tokens = [evil, evil]
    run.token_text = lambda token: evil
    run.hops = [SimpleNamespace(peer=evil, start=0, end=2, seconds=0.1)]
    html = document([pack(run, title=evil)], key="'><b>", view={"note": evil, "name": evil})
    assert html.count("<script") == 1
    assert html.count("</script") == 1
    assert "<img" not in html
    assert "<b>'" not in html
    assert "\u2028" not in html[html.index("startPage(") :]
    assert "</script" not in script()


def test_a_page_asks_for_nothing_from_elsewhere():
    html = document([pack(made_up(3, 2))], key="k")
    found = set(re.findall(r"https?://[\w./]+", html))
    assert found <= {"http://www.w3.org/2000/svg"}
    assert "<table>" in html
    assert "<caption>Logit lens" in html


def test_what_a_page_chooses_is_known_in_python(pair):
    cell = {"trace": 1, "layer": 3, "position": 2}
    answer, _ = pair.handle({"action": "select", "pins": [cell], "source": cell, "target": None, "statistic": "kl"})
    assert "error" not in answer
    assert pair.selection == [cell]
    assert pair.state["source"] == cell
    assert pair.state["target"] is None
    pair.select(4, 1)
    assert pair.selection[-1] == {"trace": 0, "layer": 4, "position": 1}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("hello", "unknown"),
        ({"action": "__init__"}, "unknown"),
        ({"action": "patch"}, "choose a source first"),
        ({"action": "patch", "source": {"trace": 9, "layer": 0, "position": 0}}, "no run 9"),
        ({"action": "patch", "source": {"trace": 0, "layer": 99, "position": 0}}, "no cell at layer 99"),
        ({"action": "patch", "source": {"trace": True, "layer": 1, "position": 0}}, "not a run, a layer"),
        (
            {"action": "steer", "source": {"trace": 0, "layer": 1, "position": 0}, "strength": float("nan")},
            "must be a number",
        ),
        (
            {"action": "steer", "source": {"trace": 0, "layer": 1, "position": 0}, "strength": 1e9},
            "beyond",
        ),
        ({"action": "follow", "tokens": ["Paris Rome Madrid"]}, "choose one"),
        ({"action": "follow", "tokens": []}, "one or two"),
    ],
)
def test_what_cannot_be_done_is_answered_in_words(pair, asked, words):
    answer, buffers = pair.handle(asked)
    assert words in answer["error"]
    assert pair.error == answer["error"]
    assert buffers == []


def test_a_patch_is_the_edit_it_says(pair, tiny):
    answer, buffers = pair.handle(
        {
            "action": "patch",
            "source": {"trace": 1, "layer": 2, "position": 4},
            "target": {"trace": 0, "layer": 2, "position": 4},
        }
    )
    assert "error" not in answer
    plain = tiny.trace(FRANCE, edits=[Edit.patch(2, 4, pair.traces[1])])
    assert (pair.patched.top_ids == plain.top_ids).all()
    assert pair.patched.token_text(int(plain.top_ids[-1, -1, 0])).strip() == "Madrid"
    assert [*map(tuple, answer["changed"])] == changed_cells(pair.traces[0], plain)
    assert answer["changed"]
    assert len(buffers[0]) == len(pack(plain).buffer)
    assert pair.patch((0, 2, 4), (1, 2, 4)) is pair.patched  # and the other way round, in Python
    assert pair.patched.token_text(int(pair.patched.top_ids[-1, -1, 0])).strip() == "Paris"


def test_a_patch_from_python_says_what_is_wrong(pair):
    with pytest.raises(UserInputError, match="no run 7"):
        pair.patch((7, 0, 0), (0, 0, 0))


def test_steering_is_the_edit_it_says(pair, tiny):
    source, target = {"trace": 1, "layer": 4, "position": 4}, {"trace": 0, "layer": 4, "position": 4}
    answer, _ = pair.handle({"action": "steer", "source": target, "target": source, "strength": -1.5})
    direction = pair.traces[0].state(4, 4) - pair.traces[1].state(4, 4)
    ids = torch.tensor([pair.traces[0].ids])
    edits = [Edit.add(4, direction, strength=-1.5)]
    wanted = tiny.generate(ids, max_new_tokens=16, do_sample=False, edits=edits)[0, ids.shape[1] :]
    assert answer["steered"] == "".join(pair.trace.token_text(int(one)) for one in wanted)
    assert answer["plain"].strip().startswith("Paris")
    assert answer["steered"] != answer["plain"]


def test_chosen_tokens_are_measured_at_every_cell(pair):
    answer, buffers = pair.handle({"action": "follow", "tokens": [" Paris", " Madrid"]})
    assert [len(meta["chosen"]) for meta in answer["metas"]] == [2, 2]
    assert len(buffers) == 2
    assert pair.trace.prob(" Paris")[-1, -1] > 0.9


def test_two_prompts_of_another_length_have_no_difference(tiny):
    pair = explore(("The capital of France is", "Paris is"), tiny)
    assert "tokenise differently (6 and 3 tokens)" in pair.note
    assert pair.note in pair.to_html()
    assert not compared(*pair.traces).comparable
    same = compared(*explore((FRANCE, SPAIN), tiny).traces)
    assert same.comparable
    assert "' France' / ' Spain'" in same.reason


def test_two_runs_of_one_text_are_told_apart(tiny):
    plain = tiny.trace(FRANCE)
    other = tiny.trace(FRANCE, edits=[Edit.patch(2, 4, tiny.trace(SPAIN))])
    explorer = explore([plain, other])
    titles = [one.meta["title"] for one in explorer._packed]
    assert titles == [f"run 1: {FRANCE}", f"run 2, 1 edit: {FRANCE}"]
    assert explorer.note == ""
    assert compared(plain, other).comparable


def test_shown_again_it_begins_with_what_was_chosen(tiny, ip):
    seen = explore(FRANCE, tiny)
    for layer in (1, 2, 3, 4, 5, 6, 7, 3):
        seen.select(layer, 2)
    assert [one["layer"] for one in seen.selection] == [2, 4, 5, 6, 7, 3]
    seen.handle({"action": "select", "pins": seen.selection[-2:], "source": seen.selection[0], "statistic": "kl"})
    ip.user_ns["looked_at"] = seen
    view = json.loads(re.search(r'startPage\("\w+", \[.*\], (\{.*\})\);</script>', seen.to_html())[1])
    assert view["name"] == "looked_at"
    assert view["pins"] == seen.selection == [{"trace": 0, "layer": one, "position": 2} for one in (7, 3)]
    assert (view["source"]["layer"], view["target"], view["statistic"]) == (2, None, "kl")
    assert seen.widget().view == view
    seen.close()


def test_a_trace_without_its_model_can_be_looked_at_only(tiny, tmp_path):
    trace = tiny.trace(FRANCE)
    trace.model = None
    explorer = nbrunner.explore(trace)
    assert "no model" in explorer.handle({"action": "follow", "tokens": [" Paris"]})[0]["error"]
    explorer.to_html(tmp_path / "page.html")
    assert "Paris" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize("what", [["a", "b", "c"], [], [7], "a"])
def test_what_cannot_be_explored_is_refused(what):
    with pytest.raises(UserInputError):
        explore(what)


def test_a_trace_without_a_lens_is_refused(tiny):
    with pytest.raises(UserInputError, match="lens"):
        Explorer([tiny.trace(FRANCE, keep=("norm",))])


def test_the_magic(ip, tiny, displayed, tmp_path):
    ip.user_ns.update(model=tiny, country="Spain")
    ip.run_line_magic(
        "explore", f"-m model -o seen --layers 0,4,8 --html {tmp_path / 'p.html'} The capital of France is"
    )
    seen = ip.user_ns["seen"]
    assert seen.trace.layers == [0, 4, 8]
    assert "".join(seen.trace.tokens[1:]) == FRANCE
    assert (tmp_path / "p.html").exists()
    bundle = displayed[-1][0]
    assert "nbx" in bundle["text/html"]
    assert (
        "application/vnd.jupyter.widget-view+json" not in bundle
    )  # it would say "model not found" after a restart
    ip.run_cell_magic(
        "explore", "-m model --token ' Madrid'", "The capital of France is\n---\nThe capital of {{ country }} is\n"
    )
    explorer = ip.user_ns["explorer"]
    assert ["".join(one.tokens[1:]) for one in explorer.traces] == [FRANCE, SPAIN]
    assert explorer.traces[1].prob(" Madrid")[-1, -1] > 0.9


@pytest.mark.parametrize(
    ("line", "cell", "words"),
    [
        ("-m model", None, "give a text"),
        ("-m model", "a\n---\nb\n---\nc\n", "two texts can be compared, not 3"),
        ("-m model", "a\n---\n", "empty"),
        ("-m model hello", "a\n", "below the first line"),
        ("--layers x", "a\n", "neither like"),
        ("-m here", "a\n", "cannot be traced"),
        ("-m model --top-k 1000", "a\n", "top_k"),
    ],
)
def test_a_mistake_is_one_line(here, tiny, line, cell, words):
    here.user_ns["model"] = tiny
    with pytest.raises(UsageError, match=words):
        here.run_line_magic("explore", line) if cell is None else here.run_cell_magic("explore", line, cell)


@pytest.mark.parametrize("magic", ["%explore", "%%explore"])
def test_options_are_completed(here, magic):
    line = f"{magic} --la"
    assert "--layers" in here.complete("", line, len(line))[1]
