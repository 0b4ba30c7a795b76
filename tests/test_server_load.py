"""In which dtype blocks are served when nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbrunner.server.load import Placement, choose_placement, dtype_hint

CPU = torch.device("cpu")


def saved_in(dtype: torch.dtype | None) -> Any:
    """As much of a checkpoint as is asked."""
    return SimpleNamespace(config=SimpleNamespace(dtype=dtype))


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (None, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_on_a_cpu_the_dtype_is_the_checkpoints_unless_told(
    saved: torch.dtype | None, asked: str, expected: torch.dtype
) -> None:
    for quantize in ("none", "int8", "int4"):
        assert choose_placement(saved_in(saved), "cpu", asked, quantize) == Placement(CPU, expected, quantize)


def test_only_large_blocks_in_float32_that_nobody_asked_for_are_worth_a_word() -> None:
    plain = Placement(CPU, torch.float32)
    assert "3.2 GB" in str(dtype_hint("auto", plain, 3_200_000_000))
    for asked, placement, nbytes in (
        ("float32", plain, 3_200_000_000),
        ("auto", plain, 200_000_000),
        ("auto", Placement(CPU, torch.bfloat16), 3_200_000_000),
        ("auto", Placement(torch.device("cuda:0"), torch.float32), 3_200_000_000),
        ("auto", Placement(CPU, torch.float32, "int8"), 3_200_000_000),
    ):
        assert dtype_hint(asked, placement, nbytes) is None
