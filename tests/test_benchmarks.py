"""What `python -m benchmarks` prints, for people and for programs."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import concurrent, start
from benchmarks.children import child
from benchmarks.report import Report, Result

KEYS = ["case", "value", "unit", "reference", "ratio", "reach", "met"]


def test_every_benchmark_can_be_named() -> None:
    assert set(command.names()) == {
        "cache",
        "concurrent",
        "decode",
        "failover",
        "fairness",
        "gpu",
        "hop",
        "load",
        "memory",
        "patch",
        "prefill",
        "quant",
        "start",
        "train",
        "wan",
    }


@pytest.mark.parametrize(
    ("facts", "met"),
    [
        ({"value": 3.0}, None),
        ({"value": 3.0, "reach": 4, "at_most": True}, True),
        ({"value": 5.0, "reach": 4, "at_most": True}, False),
        ({"value": 3.0, "reference": 4.0, "ratio": 0.75, "reach": 0.92}, False),
        ({"value": 3.0, "reference": 3.0, "ratio": 1.0, "reach": 0.92}, True),
    ],
)
def test_met(facts: dict[str, float], met: bool | None) -> None:
    row = Result("case", unit="s", **facts).to_json()
    assert list(row) == KEYS
    assert row["met"] is met


def test_json_is_all_that_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy() -> Report:
        print("a library greets you")
        return Report("start", [Result("case", 1.0, "s")], {"rounds": 5})

    monkeypatch.setattr(start, "run", noisy)
    monkeypatch.setattr("sys.argv", ["benchmarks", "start", "--json"])
    assert command.main() == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    told = json.loads(line)
    assert list(told) == ["name", "conditions", "results"]
    assert told["conditions"]["rounds"] == 5
    assert list(told["results"][0]) == KEYS
    assert "a library greets you" in said.err
    monkeypatch.setattr("sys.argv", ["benchmarks", "start"])
    assert command.main() == 0
    assert "rounds: 5" in capsys.readouterr().out


def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "nosuch"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "decode" in capsys.readouterr().err


def test_the_page_keeps_what_was_not_run_and_says_what_was_missed() -> None:
    from benchmarks.page import page

    fast = Report("decode", [Result("mid", 3.0, "tokens/s", 3.2, 0.94, reach=0.92)], {"threads": 1})
    slow = Report("hop", [Result("tiny8", 2.0, "ms", reach=1.5, at_most=True)], {"threads": 1})
    first = page([fast.to_json(), slow.to_json()])
    assert "| mid | 3 tokens/s | 3.2 tokens/s | 0.94 | ≥ 0.92 | yes |" in first
    assert "| tiny8 | 2 ms |  |  | ≤ 1.5 | **no** |" in first
    assert "all overhead" in first
    quick = Report("hop", [Result("tiny8", 1.25, "ms", reach=1.5, at_most=True)], {"threads": 1})
    second = page([quick.to_json()], first)
    assert second.count("## `") == 2
    assert "0.94" in second
    assert "| tiny8 | 1.25 ms |  |  | ≤ 1.5 | yes |" in second
    assert "all overhead" not in second
    assert page([], second) == second


def test_an_option_goes_to_its_benchmark_and_to_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*, processes: bool = False) -> Report:
        return Report("concurrent", [Result(f"processes {processes}", 1.0, "s")])

    monkeypatch.setattr(concurrent, "run", run)
    for options in ([], ["--processes"]):
        monkeypatch.setattr("sys.argv", ["benchmarks", "concurrent", *options, "--json"])
        assert command.main() == 0
        assert f"processes {bool(options)}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmarks", "decode", "--processes"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2


def test_tokens_count_while_every_session_decodes() -> None:
    # the first mark is the prompt's, the second the prefill's token
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    assert concurrent.rate([early, late]) == pytest.approx((2 + 4) / 2.0)


def test_a_process_that_ends_too_early_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="ended"), child("benchmarks.no_such_module"):
        pass
