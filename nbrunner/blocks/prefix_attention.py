"""Attention of single tokens over keys that lie in several places, without putting them together first.

torch's attention on CPUs also returns the logarithm of the sum that it divided by, with which results over parts of
the keys are weighted and added up (the online softmax of FlashAttention, https://arxiv.org/abs/2205.14135). With
512 tokens, 384 of them in a prefix (16 heads, 8 for keys, float32), a layer takes 126 µs in this way, 102 over one
buffer, and 732 if the keys are copied together. The operator is not public, so it is tried before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LONG_TOKENS = 256
"""Tokens × rows of a prefix from which on a session by itself gains. Below, copying costs less than 30 µs a layer,
and running the step as those of several sessions are run costs half a millisecond."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class KeysInPieces:
    """Keys and values of one session in one layer.

    Attributes
    ----------
    parts
        In order: keys and values ``[rows, heads, tokens, width]``, and whether all rows have the same.
    """

    parts: Sequence[tuple[Tensor, Tensor, bool]]

    def whole(self) -> tuple[Tensor, Tensor]:
        """In one buffer each."""
        return torch.cat([keys for keys, _, _ in self.parts], 2), torch.cat(
            [values for _, values, _ in self.parts], 2
        )

    def attend(self, query: Tensor, scale: float | None) -> Tensor:
        """What one token of each row sees of all of them.

        Parameters
        ----------
        query
            ``[rows, heads, 1, width]``.

        Returns
        -------
        Tensor
            ``[rows, 1, heads, width]``.
        """
        outputs, sums = [], []
        for keys, values, same in self.parts:
            if same and query.shape[0] > 1:
                # rows that have the same keys are so many queries of one row, and the keys are read once
                output, logsum = _attend(query.permute(2, 1, 0, 3), keys[:1], values[:1], scale)
                output, logsum = output.permute(2, 1, 0, 3), logsum.permute(2, 1, 0)
            else:
                output, logsum = _attend(query, keys, values, scale)
            outputs.append(output)
            sums.append(logsum)
        weights = torch.stack(sums).softmax(0).unsqueeze(-1)
        return (torch.stack(outputs) * weights).sum(0).to(query.dtype).transpose(1, 2)


def can_attend_in_pieces(device: torch.device, dtype: torch.dtype, implementation: str) -> bool:
    """Whether `KeysInPieces.attend` does what a model's own attention does, only faster."""
    return device.type == "cpu" and implementation == "sdpa" and dtype in _DTYPES and _works(dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsum = operator(query, keys, values, 0.0, False, scale=scale)
    return output, logsum


@cache
def _works(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(3, heads, tokens, 8, generator=generator).to(dtype)
        for heads, tokens in ((4, 1), (2, 9), (2, 9))
    )
    keys[:, :, :5], values[:, :, :5] = keys[:1, :, :5].clone(), values[:1, :, :5].clone()
    parts = [
        (keys[:, :, :5], values[:, :, :5], True),
        (keys[:, :, 5:7], values[:, :, 5:7], False),
        (keys[:, :, 7:], values[:, :, 7:], False),
    ]
    try:
        found = KeysInPieces(parts).attend(query, 0.3)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        return False
    right = scaled_dot_product_attention(query, keys, values, scale=0.3, enable_gqa=True).transpose(1, 2)
    limit = 1e-5 if dtype in (torch.float32, torch.float64) else 0.03
    return found.shape == right.shape and bool((found.float() - right.float()).abs().max() < limit)
