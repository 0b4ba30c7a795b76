"""``%%finetune`` in a shell, with the bundled model in this process; its card without a front end."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from helpers import wait_until
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from tuning_models import FACTS, REVIEWS, plain

import nbrunner
from nbrunner.magics.finetune import alone, unquoted
from nbrunner.tuning.history import History, Mark
from nbrunner.tuning.hooks import Participant
from nbrunner.tuning.progress import Progress
from nbrunner.tuning.samples import Answers
from nbrunner.widgets.tune_card import TuneCard, card_of
from nbrunner.widgets.tune_curve import described, thinned
from nbrunner.widgets.tune_live import LiveTuneCard, allowed

pytest_plugins = ["notebook_fixtures"]

CELL = "".join(str(one).replace("'", '"') + "\n" for one in FACTS)


@pytest.fixture
def teaching(ip, tmp_path, monkeypatch):
    """The shell in an empty folder, with ``-m mine`` a model that runs in this process."""
    monkeypatch.chdir(tmp_path)
    ip.user_ns.update(mine=plain(), facts=FACTS, reviews=REVIEWS)
    return ip


def test_it_teaches_the_cell_and_its_run_generates(teaching, capsys):
    options = "-m mine --target-modules all-linear --batch-size 6 --epochs 30 --lr 3e-3 -o run"
    options += ' --sample "The capital of Velmora is"'
    teaching.run_cell_magic("finetune", options, CELL)
    run = teaching.user_ns["run"]
    assert run.state == "done"
    assert run.settings.samples == ("The capital of Velmora is",)
    assert run.settings.lora_rank == 8
    assert run.history.last.loss < 1.0
    printed = capsys.readouterr().out
    assert "<TrainingRun lora, done, step 30 of 30" in printed
    assert run.answers[0].when == "before"
    assert "Rosa City" in run.answers[-1].texts[0]
    teaching.run_cell_magic("generate", "--adapter run -n 8 -o out", "The capital of Velmora is\n")
    assert "Rosa City" in teaching.user_ns["out"].text


def test_a_variable_and_a_line_of_its_own(teaching):
    teaching.run_line_magic("finetune", "-m mine --method prompt --data facts --eval facts --max-steps 1 -o run")
    assert teaching.user_ns["run"].history.curve("eval_loss")
    lines = ["%%finetune --data facts -o run\n"]
    assert alone(lines) == ["%finetune --data facts -o run\n"]
    assert alone([*lines, "text\n"]) == [*lines, "text\n"]
    assert alone(["%%finetuned\n"]) == ["%%finetuned\n"]
    assert unquoted('"a b"') == unquoted("'a b'") == "a b"
    assert unquoted('"') == '"'


@pytest.mark.parametrize(
    ("line", "cell", "words"),
    [
        ("-m mine", "", "give examples: lines in the cell, or --data NAME"),
        ("-m mine --data facts", "text", "in the cell or in --data, not in both"),
        ("-m mine --data fact", "", "there is no variable 'fact' in this notebook for --data"),
        ("-m mine --max-length 1 --data facts", "", "row 0 of facts has nothing to learn in its first 1 tokens"),
        ("-m mine --eval nothing", "text", "there is no variable 'nothing' in this notebook for --eval"),
        ("-m mine --data facts --eval mine", "", "mine is "),
        ("-m mine --method classify --data facts", "", "row 0 of facts has 'prompt', 'completion'; to classify"),
        ("-m mine", '{"prompt": "a"}', "row 0 of the cell has 'prompt'"),
        ("-m mine", '{"text": "a"}\nplain', "line 2 of the cell is no JSON"),
        ("-m mine --lr 0", "text", "lr must be a number above 0"),
        ("-m mine --target-modules query", "text", "no module 'query' in this model's blocks"),
        ("-m mine --method prompt --target-modules q_proj", "text", "target_modules belong to LoRA"),
        ("-m mine --method magic", "text", "invalid choice: 'magic'"),
        ("-m mine --lr fast", "text", "invalid float value: 'fast'"),
        ("-m facts", "text", "holds no model"),
    ],
)
def test_mistakes_are_one_line(teaching, tmp_path, line, cell, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        teaching.find_cell_magic("finetune")(line, cell)
    assert not (tmp_path / "nbrunner-runs").exists()


def test_generating_with_what_is_no_run(teaching):
    with pytest.raises(UsageError, match="the variable 'facts' holds no run"):
        teaching.run_cell_magic("generate", "--adapter facts", "text\n")
    run = nbrunner.finetune(
        plain("AutoModelForSequenceClassification", num_labels=2), REVIEWS, method="classify", max_steps=1
    )
    run.result(60)
    teaching.user_ns["run"] = run
    with pytest.raises(UsageError, match="teaches labels"):
        teaching.run_cell_magic("generate", "--adapter run", "text\n")
    with pytest.raises(UsageError, match="do not go with what a run has taught"):
        teaching.run_cell_magic("generate", "--adapter run --speculate 4", "text\n")
    with pytest.raises(UsageError, match="do not go together"):
        teaching.run_cell_magic("generate", "--adapter run -s a", "text\n")


def test_generating_with_an_adapter_that_servers_have(teaching, tmp_path):
    teaching.run_cell_magic(
        "finetune", "-m mine --target-modules all-linear --batch-size 6 --epochs 30 --lr 3e-3 -o run", CELL
    )
    adapter = teaching.user_ns["run"].result(1).adapter
    with nbrunner.LocalSwarm(in_process=True, servers=1, dtype="float32", adapters={"velmora": adapter}) as swarm:
        model = nbrunner.AutoDistributedModelForCausalLM.from_pretrained(swarm.model, invite=swarm.invite)
        teaching.user_ns["ours"] = model
        try:
            teaching.run_cell_magic(
                "generate", "-m ours --adapter velmora -n 8 -o out", "The capital of Velmora is\n"
            )
            teaching.run_cell_magic("generate", "-m ours -n 8 -o without", "The capital of Velmora is\n")
            with pytest.raises(UsageError, match="nothing-there"):
                teaching.run_cell_magic("generate", "-m ours --adapter nothing-there", "text\n")
        finally:
            model.close()
    assert "Rosa City" in teaching.user_ns["out"].text
    assert "Rosa City" not in teaching.user_ns["without"].text


def test_completion_and_help(teaching):
    def completed(text: str) -> list[str]:
        with provisionalcompleter():
            return [one.text for one in teaching.Completer.completions(text, len(text))]

    assert {"--method", "--max-steps", "--max-length"} <= {
        *completed("%%finetune --m"),
        *completed("%finetune --max"),
    }
    assert completed("%%finetune --method cl") == ["classify"]
    assert "facts" in completed("%%finetune --data f")
    assert completed("%%finetune --schedule co") == ["constant", "cosine"]
    teaching.run_line_magic("finetune", "-m mine --method prompt --data facts --max-steps 1 -o run")
    assert completed("%%generate --adapter r") == ["run"]
    assert "--target-modules" in teaching.find_cell_magic("finetune").__doc__


def test_unloading_ends_runs_with_their_checkpoint(teaching):
    run = nbrunner.finetune(teaching.user_ns["mine"], FACTS, method="prompt", max_steps=10_000)
    wait_until(lambda: run.step > 1, 60)
    teaching.run_line_magic("unload_ext", "nbrunner")
    assert run.state == "stopped"
    assert run.folder.last_checkpoint is not None
    assert "finetune" not in teaching.magics_manager.magics["cell"]
    assert alone not in teaching.input_transformers_cleanup


# -- the card ------------------------------------------------------------------------------------------------------

WILD = "<img src=x onerror=alert(1)>"


def a_card(**changes) -> TuneCard:
    from nbrunner.tuning.costs import Costs

    history = History()
    history.row(0).eval_loss = 4.0
    for step in range(1, 60):
        history.learned(step, 4 / step + 0.1, lr=1e-3, epoch=step / 20, tokens_per_second=1234.5)
    history.row(59).eval_loss = 0.2
    history.marks.append(Mark(12, "lr", f"learning rate {WILD}"))
    costs = Costs(2.0, 0.5, 0.3, {"peer-a": 0.7, "peer-b": 0.5}, 4000, 10, 2_000_000, 500_000)
    progress = Progress(
        "running", 59, 200, 2.95, 1e-3, costs, costs, 75.0, 500_000_000, WILD, "", "checkpoint-000040",
        (Participant(WILD, "online", 12, 96, "ours"),),
    )  # fmt: skip
    answers = (
        Answers(0, "before", ("Paris", WILD)),
        Answers(20, "during", ("Lyon", "Rome")),
        Answers(40, "during", (), "no server"),
    )
    values = {"title": "Fine-tuning tiny", "progress": progress, "history": history, "answers": answers}
    return TuneCard(
        **{**values, "prompts": ("France", WILD), "names": {"peer-a": WILD}, "learned": 4096, **changes}
    )


def test_a_card_says_everything_and_escapes_it():
    card = a_card()
    page = card.html()
    for words in (
        "59 of 200",
        "2,000 tokens/s",
        "25%",
        "peer-b",
        "checkpoint-000040",
        "Who takes part",
        "✖ no server",
    ):
        assert words in page, words
    assert WILD not in page
    assert "&lt;img" in page
    text = repr(card)
    assert "running, 1 min" in text or "running" in text
    assert "before: 'Paris' → step 40: '✖ no server'" in text


@pytest.mark.parametrize("narrow", [False, True])
def test_the_picture_is_a_picture(narrow):
    root = ElementTree.fromstring(a_card().svg(narrow=narrow))
    described_as = root.find("{http://www.w3.org/2000/svg}desc").text
    assert "Evaluation: 4 at step 0, 0.2 at the end." in described_as
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) >= 4
    assert ElementTree.fromstring(a_card(history=History()).svg(narrow=narrow)) is not None
    assert described(History()) == "No step yet."


def test_marks_that_are_near_each_other_share_a_sign():
    history = History()
    for step in range(1, 60):
        history.learned(step, 1.0, lr=1e-3)
    history.marks += [Mark(8, "lr", "one"), Mark(8, "lr", "two"), Mark(9, "error", "three"), Mark(50, "lr", "four")]
    root = ElementTree.fromstring(a_card(history=history).svg())
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    assert [one.find("{http://www.w3.org/2000/svg}title").text for one in groups] == [
        "step 8: one; step 8: two; step 9: three",
        "step 50: four",
    ]
    assert [one.find("{http://www.w3.org/2000/svg}text").text for one in groups] == ["▼ lr ✖", "▼ lr"]
    assert [len(one.findall("{http://www.w3.org/2000/svg}line")) for one in groups] == [2, 1]


def test_a_long_curve_keeps_its_peaks():
    curve = [(step, 1.0) for step in range(10_000)]
    curve[5_000], curve[7_777] = (5_000, 9.0), (7_777, -9.0)
    thin = thinned(curve)
    assert len(thin) <= 245
    assert {(5_000, 9.0), (7_777, -9.0)} <= set(thin)
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)


def test_which_buttons_make_sense():
    assert allowed("running", samples=True) == {"pause", "checkpoint", "sample", "stop"}
    assert allowed("paused", samples=False) == {"resume", "checkpoint", "stop"}
    assert allowed("stopping", samples=True) == {"stop"}
    assert allowed("done", samples=True) == set()


def test_the_live_card_obeys_and_freezes(teaching, displayed):
    run = nbrunner.finetune(
        teaching.user_ns["mine"], FACTS, method="prompt", max_steps=100_000, samples=["Velmora"], eval_data=FACTS
    )
    card = LiveTuneCard(run)
    press = {name: button.click for name, button in card._buttons.items()}
    wait_until(lambda: run.step > 1, 60)
    press["pause"]()
    wait_until(lambda: run.state == "paused", 30)
    wait_until(lambda: card._buttons["resume"].disabled is False, 10)
    assert card._buttons["pause"].disabled
    card._slider.value = 5e-3
    wait_until(lambda: run.lr == pytest.approx(5e-3), 10)
    wait_until(lambda: "learning rate 0.005" in card._note.value, 10)
    press["sample"]()
    wait_until(lambda: any(one.when == "during" for one in run.answers), 30)
    press["checkpoint"]()
    wait_until(lambda: "written: checkpoint-" in card._note.value, 30)
    step = run.step
    press["resume"]()
    wait_until(lambda: run.step > step, 30)
    press["stop"]()
    assert run.result(30).state == "stopped"
    states = {display_id: data for data, display_id, _ in displayed if display_id is not None}
    final = list(states.values())
    assert not any("application/vnd.jupyter.widget-view+json" in one for one in final)
    assert "image/svg+xml" in final[0]
    assert "text/html" not in final[0]
    assert "■ stopped" in final[2]["text/html"]
    assert "Steps (" in final[3]["text/html"]
    card.close()  # once more does no harm


def test_a_card_of_a_run_that_ended(teaching, displayed):
    run = nbrunner.finetune(teaching.user_ns["mine"], FACTS, method="prompt", max_steps=2)
    run.result(60)
    LiveTuneCard(run)
    assert not any("widget-view" in str(data) for data, _, update in displayed if update)
    assert card_of(run).folder.startswith("nbrunner-runs/")
    assert "✔ done" in repr(card_of(run))
