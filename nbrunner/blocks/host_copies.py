"""Copies between this machine's memory and a GPU.

A copy to a GPU from ordinary memory first waits until everything that was begun there is done ("API synchronization
behavior" in the reference of the CUDA runtime); one from pinned memory is put behind it, and whoever asked goes on.
On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, and there in ``dtype``."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        moved = tensor.pin_memory().to(device, non_blocking=True)  # torch frees pinned memory once it has been read
    else:
        moved = tensor.to(device)
    return moved if dtype is None else moved.to(dtype)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in this machine's memory. A GPU is waited for once, not once for each."""
    moved, waits = [], set()
    for tensor in tensors:
        if tensor.device.type == "cuda":
            landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            moved.append(landing.copy_(tensor, non_blocking=True))
            waits.add(tensor.device)
        else:
            moved.append(tensor.cpu())
    for device in waits:
        torch.cuda.current_stream(device).synchronize()
    return moved
