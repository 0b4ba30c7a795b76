"""Split models compute what whole ones do. All families: `make test-all`, or `python -m tests.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT
from parity.__main__ import document, quiet, summary
from parity.chain import local_model
from parity.checks import CHECKS, Inputs, check_family
from parity.families import REPRESENTATIVE, in_this_release, names, tiny_config
from transformers import AutoModelForCausalLM

from nbrunner.blocks.checkpoint import resolve_checkpoint


@pytest.fixture(autouse=True)
def _one_thread_and_no_reports():
    quiet()


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_split_model_equals_the_whole_one(name: str, tmp_path: Path) -> None:
    if not in_this_release(name):
        pytest.skip(f"no {name} in this release of transformers")
    family = check_family(name, 1, tmp_path)
    assert not family.refused
    assert not family.not_run
    wrong = {check: outcome for check, outcome in family.outcomes.items() if not outcome.equal}
    assert not wrong


def test_one_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison itself can fail: otherwise a table full of zeros would say nothing."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    plain.save_pretrained(tmp_path)
    ours = local_model(resolve_checkpoint(tmp_path), 1)
    for model in (plain, ours):
        model.generation_config.eos_token_id = None
    weight = next(p for p in ours.runner.spans[1].model.parameters() if p.ndim == 2)
    weight[0, 0] += 1.0
    prefill = CHECKS[0]
    with torch.no_grad():
        difference = (prefill(plain, Inputs()) - prefill(ours, Inputs())).abs().max()
    assert difference > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("split", [1, 3])
def test_all_families(split: int, tmp_path: Path) -> None:
    results = []
    for name in names():
        folder = tmp_path / name
        folder.mkdir()
        results.append(check_family(name, split, folder))
    different = [result.name for result in results if result.outcomes and not result.equal]
    assert not different
    assert sum(result.equal_in_all for result in results) >= 100, summary(results)
    if split == 1 and transformers.__version__ in (ROOT / "docs" / "architectures.md").read_text():
        written = (ROOT / "docs" / "architectures.md").read_text()
        assert written == document(results, split), "run: python -m tests.parity --write docs/architectures.md"
