"""Moving weights into huge pages changes where they are, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nbrunner.blocks import huge_pages
from nbrunner.blocks.huge_pages import onto_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")


class Tied(nn.Module):
    """Two layers of 4 MB, a third that is the first again, and one whose weight is a part of another's memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(1024, 1024)
        self.b = nn.Linear(1024, 1024, dtype=torch.bfloat16)
        self.same = nn.Linear(1024, 1024, bias=False)
        self.same.weight = nn.Parameter(self.a.weight.data)
        self.part = nn.Parameter(self.a.weight.data[512:])


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_available", lambda: True)
    monkeypatch.setattr(huge_pages, "_free_bytes", lambda: 1 << 40)


@pytest.mark.usefixtures("plenty")
def test_values_stay() -> None:
    module = Tied()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    addresses = {name: value.data_ptr() for name, value in module.named_parameters()}
    moved = onto_huge_pages(module)
    assert moved >= sum(value.numel() * value.element_size() for value in before.values())
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name]), name
        assert value.data_ptr() != addresses[name]
        assert value.data_ptr() % 64 == 0


@pytest.mark.usefixtures("plenty")
def test_rows_of_4_kb_are_laid_apart_and_others_are_not() -> None:
    """Such rows fall into the same lines of a cache. In bfloat16 little would be gained."""
    module = nn.Module()
    module.pages = nn.Linear(1024, 512)
    module.narrow = nn.Linear(1000, 512)
    module.short = nn.Linear(2048, 512, dtype=torch.bfloat16)
    module.scale = nn.Parameter(torch.tensor(2.0))
    rows = torch.randn(3, 1024)
    expected = module.pages(rows)
    onto_huge_pages(module)
    assert module.pages.weight.stride() == (1040, 1)
    assert module.narrow.weight.is_contiguous()
    assert module.short.weight.is_contiguous()
    assert module.scale.item() == 2.0
    torch.testing.assert_close(module.pages(rows), expected)


@pytest.mark.usefixtures("plenty")
def test_memory_lives_as_long_as_a_weight() -> None:
    module = Tied()
    expected = module.b.weight.detach().clone()
    onto_huge_pages(module)
    kept = module.b.weight
    del module
    torch.zeros(64, 1024, 1024)  # would land in the arena, had it been given back
    assert torch.equal(kept, expected)


def test_nothing_is_moved_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Tied()
    monkeypatch.setattr(huge_pages, "_free_bytes", lambda: 1 << 20)
    address = module.a.weight.data_ptr()
    assert onto_huge_pages(module) == 0
    assert module.a.weight.data_ptr() == address


@pytest.mark.usefixtures("plenty")
def test_small_modules_stay() -> None:
    assert onto_huge_pages(nn.Linear(8, 8)) == 0


@pytest.mark.usefixtures("plenty")
def test_the_kernel_is_asked_for_private_huge_pages() -> None:
    """Shared memory, as `mmap` makes it by default, gets none unless the machine's owner has said so."""
    module = Tied()
    onto_huge_pages(module)
    flags = _flags_of_mapping(module.a.weight.data_ptr())
    assert "hg" in flags
    assert "sh" not in flags


def _flags_of_mapping(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(one, 16) for one in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    return []
