"""What `python -m benchmarks` prints, for people and for programs."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import start
from benchmarks.report import Report, Result

KEYS = ["case", "value", "unit", "reference", "ratio", "reach", "met"]


def test_every_benchmark_can_be_named() -> None:
    assert {"decode", "hop", "prefill", "start", "failover", "load"} <= set(command.names())


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
