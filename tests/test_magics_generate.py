"""``%%generate`` and ``%%chat`` in a shell, with the bundled model in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from IPython.core.error import UsageError

from nbrunner.magics.async_cells import run_awaited, transform
from nbrunner.magics.errors import Interrupted
from nbrunner.magics.state import Notebook

pytest_plugins = ["notebook_fixtures"]

PROMPT = "The capital of France is\n"


def notebook_of(shell) -> Notebook:
    return shell._nbrunner_registered[0]


def test_it_continues_the_text(here, capsys):
    here.run_cell_magic("generate", "-m here -n 6 -o out", PROMPT)
    out = here.user_ns["out"]
    assert out.prompt == "The capital of France is"  # without the line break that ends every cell
    assert 1 <= len(out.tokens) <= 6
    assert out.text
    shown = capsys.readouterr().out
    assert out.text in shown
    assert "tok/s" in shown
    assert out.receipt["versions"]["nbrunner"]
    assert "Generation" in repr(out)
    assert "<details>" in out._repr_html_()


def test_a_hostile_text_is_escaped(here, plain_model):
    here.run_cell_magic("generate", "-m here -n 2 -o out", "<script>alert(1)</script>\n")
    assert "<script>" not in here.user_ns["out"]._repr_html_()


def test_names_are_filled_in_and_raw_leaves_them(here):
    here.user_ns["country"] = "France"
    here.run_cell_magic("generate", "-m here -n 2 -o out", "The capital of {{ country }} is\n")
    assert here.user_ns["out"].prompt == "The capital of France is"
    here.run_cell_magic("generate", "-m here -n 2 -o out --raw", "The {{ country }} is\n")
    assert here.user_ns["out"].prompt == "The {{ country }} is"
    here.run_cell_magic("generate", "-m here -n 2 -o out", 'single {braces} and {"json": 1}\n')
    assert here.user_ns["out"].prompt == 'single {braces} and {"json": 1}'


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("{{ nothing_here }}\n", "nothing_here"),
        ("{{ 1 + }}\n", "template"),
        ("{{ ''.__class__.__mro__ }}\n", "unsafe"),
        ("  \n", "empty"),
    ],
)
def test_mistakes_in_the_cell_are_told_in_one_line(here, cell, words):
    with pytest.raises(UsageError, match=words) as caught:
        here.run_cell_magic("generate", "-m here", cell)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--nope", "nope"),
        ("-n x", "invalid int"),
        ("-n 0", "max_new_tokens"),
        ("-t -1", "temperature"),
        ("--top-p 2", "top_p"),
        ("-o 3x", "variable name"),
        ("-o class", "variable name"),
        ("--beams 2 -t 1", "beams or temperature"),
        ("--new", "-s NAME"),
        ("-m nobody", "%swarm join"),
        ("-s a -m here", "no sessions"),
    ],
)
def test_mistakes_in_the_line_are_told_in_one_line(here, line, words):
    with pytest.raises(UsageError, match=words) as caught:
        here.run_cell_magic("generate", line, PROMPT)
    assert "\n" not in str(caught.value)


def test_a_mistake_shows_no_traceback(here, capsys):
    result = here.run_cell("%%generate -n x\nhello")
    assert not result.success
    output = capsys.readouterr()
    assert "UsageError" in output.err + output.out
    assert "Traceback" not in output.err + output.out


def test_in_the_background_the_variable_holds_a_handle(here):
    here.run_cell_magic("generate", "-m here -n 5 -b -o later", PROMPT)
    later = here.user_ns["later"]
    result = later.result(60)
    assert result.text == later.text
    assert here.user_ns["later"] is later
    here.run_cell_magic("generate", "-m here -n 5 -o now", PROMPT)
    assert result.text == here.user_ns["now"].text


def test_the_configuration_is_used(here):
    here.run_line_magic("config", "NBRunner.max_new_tokens = 3")
    here.run_line_magic("config", "NBRunner.temperature = 2.0")
    here.run_cell_magic("generate", "-m here -o out", "Once upon a time\n")
    sampling = here.user_ns["out"].receipt["sampling"]
    assert (sampling["max_new_tokens"], sampling["temperature"]) == (3, 2.0)
    here.run_cell_magic("generate", "-m here -o out -n 2 -t 0", "Once upon a time\n")
    sampling = here.user_ns["out"].receipt["sampling"]
    assert (sampling["max_new_tokens"], sampling["temperature"]) == (2, 0.0)


@pytest.mark.parametrize(
    ("line", "temperature"),
    [("", 0.0), ("--top-p 0.9", 1.0), ("--top-k 3", 1.0), ("--top-k 3 -t 0", 0.0), ("--top-p 0.9 -t 0.5", 0.5)],
)
def test_narrowing_the_choice_means_sampling(here, line, temperature):
    here.run_cell_magic("generate", f"-m here -n 2 -o out {line}", "Once upon a time\n")
    assert here.user_ns["out"].receipt["sampling"]["temperature"] == temperature


def test_a_chat_remembers_until_reset(here):
    here.run_cell_magic("chat", "-m here -n 4 -o first", "What is the capital of France?\n")
    here.run_cell_magic("chat", "-m here -n 4 -o second", "And of Italy?\n")
    first, second = here.user_ns["first"], here.user_ns["second"]
    assert first.prompt == "What is the capital of France?"
    assert second.prompt_tokens > first.prompt_tokens + len(first.tokens)
    history = here.run_line_magic("chat", "history")
    assert [one["role"] for one in history.messages] == ["user", "assistant", "user", "assistant"]
    assert "And of Italy?" in repr(history)
    assert "And of Italy?" in history._repr_html_()
    here.run_line_magic("chat", "reset")
    here.run_cell_magic("chat", "-m here -n 4 -o third", "What is the capital of France?\n")
    assert here.user_ns["third"].ids == first.ids


def test_conversations_have_names_and_a_system_message(here):
    here.run_cell_magic("chat", "-m here -n 2 -s other --system 'Be brief.'", "Hello\n")
    assert here.run_line_magic("chat", "history").messages == ()
    roles = [one["role"] for one in here.run_line_magic("chat", "history other").messages]
    assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize("line", ["", "forget", "Hello there"])
def test_chat_as_a_line_knows_two_words(here, line):
    with pytest.raises(UsageError, match="history"):
        here.run_line_magic("chat", line)


def test_a_model_without_a_chat_format_says_so(here, plain_model, monkeypatch):
    loaded = notebook_of(here).load("here")
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="%%generate"):
        here.run_cell_magic("chat", "-m here", "Hello\n")


def test_ctrl_c_in_a_terminal_ends_in_one_line_and_keeps_the_text(here, plain_model, monkeypatch, capsys):
    layer = plain_model.model.layers[0]
    forward = layer.forward
    calls = []

    def slow(*args, **kwargs):
        calls.append(time.monotonic())
        time.sleep(0.02)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", slow)
    monkeypatch.setattr(plain_model.generation_config, "eos_token_id", None)
    result = here.run_cell("%%generate -m here -n 500 -o out\nOnce upon a time")
    assert isinstance(result.error_in_exec, Interrupted)
    assert here.user_ns["out"].finish == "interrupted"
    assert 5 < len(here.user_ns["out"].tokens) < 100
    output = capsys.readouterr()
    assert "Interrupted" in output.out + output.err
    assert "Traceback" not in output.out + output.err


def test_nested_asyncio_is_off_until_asked_for():
    code = """
import asyncio
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbrunner")
print(hasattr(asyncio, "_nest_patched"))
shell.run_line_magic("config", "NBRunner.nested_asyncio = True")
print(hasattr(asyncio, "_nest_patched"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


# -- awaited cells -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["%%generate -n 3\nhi\n", "%%chat\nhi\n", "%%generate\t-n 3\n"])
def test_our_cells_are_awaited_in_a_kernel(cell):
    lines = transform(cell.splitlines(keepends=True))
    assert len(lines) == 1
    assert lines[0].startswith("await ")
    compile(lines[0], "cell", "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT


@pytest.mark.parametrize("cell", ["", "x = 1\n", "%%generate?\n", "%%generated\nhi\n", "x\n%%generate\nhi\n"])
def test_other_cells_are_left_alone(cell):
    lines = cell.splitlines(keepends=True)
    assert transform(lines) == lines


def test_an_awaited_cell_leaves_the_loop_free(here):
    beats = []

    async def main():
        async def beat():
            while True:
                beats.append(time.monotonic())
                await asyncio.sleep(0.005)

        task = asyncio.create_task(beat())
        await run_awaited(here, "generate", "-m here -n 40 -o out -t 1 --seed 1", "Once upon a time\n")
        task.cancel()

    asyncio.run(main())
    assert here.user_ns["out"].tokens
    assert len(beats) > 3


# -- loading -----------------------------------------------------------------------------------------------------


def test_load_unload_reload_leave_nothing(ip):
    before = (
        {kind: set(names) for kind, names in ip.magics_manager.magics.items()},
        len(ip.Completer.custom_matchers),
        len(ip.configurables),
        len(ip.input_transformers_cleanup),
    )
    assert {"generate", "chat"} <= before[0]["cell"]
    assert {"swarm", "chat"} <= before[0]["line"]
    ip.run_line_magic("reload_ext", "nbrunner")
    after = (
        {kind: set(names) for kind, names in ip.magics_manager.magics.items()},
        len(ip.Completer.custom_matchers),
        len(ip.configurables),
        len(ip.input_transformers_cleanup),
    )
    assert after == before
    ip.run_line_magic("unload_ext", "nbrunner")
    assert "generate" not in ip.magics_manager.magics["cell"]
    assert "swarm" not in ip.magics_manager.magics["line"]
    assert len(ip.Completer.custom_matchers) == before[1] - 1
    assert not [one for one in ip.configurables if type(one).__name__ == "NBRunner"]


@pytest.mark.parametrize("name", ["magics", "widgets"])
def test_a_second_copy_cannot_be_imported(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"import nbrunner.{name}" in done.stderr


def test_help_names_every_option(ip):
    text = ip.magics_manager.magics["cell"]["generate"].__doc__
    for option in ["--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--beams", "--model"]:
        assert option in text
    for option in ["--session", "--out", "--background", "--raw", "{{ name }}"]:
        assert option in text
    assert "%%generate [-n" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%%generate --te", "--temperature"),
        ("%%generate -n 3 --se", "--session"),
        ("%%generate -m t", "tiny"),
        ("%%generate -m he", "here"),
        ("%%chat --sys", "--system"),
        ("%swarm st", "status"),
        ("%swarm start t", "tiny"),
        ("%swarm start --s", "--servers"),
        ("%chat re", "reset"),
    ],
)
def test_options_models_and_subcommands_are_completed(here, line, expected):
    assert expected in here.complete("", line, len(line))[1]


def test_completion_leaves_prompts_and_other_code_alone(here):
    assert "--temperature" not in here.complete("", "%%time --te", 11)[1]
