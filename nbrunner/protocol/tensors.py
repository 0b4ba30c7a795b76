"""torch tensors to and from the bytes of a frame, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nbrunner.errors import BadPeerDataError
from nbrunner.protocol.finite import all_finite
from nbrunner.protocol.frames import RawTensor, TensorSpec

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SCALES = ".scales"
"""Behind the name of a tensor in 8 bits: the tensor of its scales."""

_GROUP = 64
"""Numbers that share a scale, at most: two bytes for 64 numbers add 3 %."""


def pack(name: str, tensor: torch.Tensor) -> RawTensor:
    """A tensor as bytes; a contiguous CPU tensor is not copied and must not be changed until it is written."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    tensor = tensor.contiguous()
    spec = TensorSpec(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape))  # type: ignore[arg-type]
    if tensor.numel() == 0:
        return RawTensor(spec, b"")
    return RawTensor(spec, tensor.reshape(-1).view(torch.uint8).numpy().data)


def pack_8bit(name: str, tensor: torch.Tensor) -> list[RawTensor]:
    """A floating-point tensor in 8 bits, with a bfloat16 scale for each group of its last dimension; see `take`.

    Each token is rounded by itself, so that it does not matter with how many others it travels.
    """
    width = tensor.shape[-1]
    size = next(one for one in range(min(_GROUP, width), 0, -1) if width % one == 0)
    groups = tensor.detach().float().reshape(*tensor.shape[:-1], width // size, size)
    scales = (groups.abs().amax(-1).clamp(min=1e-30) / 127).to(torch.bfloat16)
    # by the scale as it is sent: rounded down, it would make 128 of what should be 127
    codes = (groups / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(-2)
    return [pack(name, codes.view(torch.uint8)), pack(name + SCALES, scales)]


def _unpack_8bit(raw: RawTensor, scales: RawTensor, dtype: torch.dtype) -> torch.Tensor:
    shape = raw.spec.shape
    groups = scales.spec.shape[-1] if scales.spec.shape else 0
    if scales.spec.dtype != "bfloat16" or scales.spec.shape[:-1] != shape[:-1] or not groups or shape[-1] % groups:
        raise BadPeerDataError(f"the scales of tensor {raw.spec.name!r} do not fit it")
    factors = unpack(scales).float()
    if not bool((factors >= 0).all()):  # NaN is not, either
        raise BadPeerDataError(f"tensor {raw.spec.name!r} has scales that are negative or NaN")
    codes = unpack(raw).view(torch.int8).reshape(*shape[:-1], groups, shape[-1] // groups)
    numbers: torch.Tensor = (codes.float() * factors[..., None]).flatten(-2).to(dtype)
    return numbers


def unpack(raw: RawTensor) -> torch.Tensor:
    """A tensor that owns its memory (received bytes are read-only, and torch wants to be free to write)."""
    dtype = DTYPES[raw.spec.dtype]
    if raw.spec.nbytes == 0:
        return torch.empty(raw.spec.shape, dtype=dtype)
    memory = torch.frombuffer(bytearray(raw.data), dtype=torch.uint8)
    if dtype == torch.bool and bool(memory.max() > 1):
        raise BadPeerDataError(f"{raw.spec.name}: a bool that is neither 0 nor 1")
    return memory.view(dtype).view(raw.spec.shape)


def take(
    tensors: Mapping[str, RawTensor],
    name: str,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None],
    finite: bool = True,
) -> torch.Tensor:
    """A tensor from a frame, if it is what it has to be.

    One that was sent in 8 bits (`pack_8bit`) comes back in the floating-point dtype that is allowed.

    Parameters
    ----------
    tensors
        As `decode_frame` returns them.
    dtype
        The dtype, or those, allowed.
    shape
        The size of each dimension, None where any is right. A trailing ``-1`` stands for any further dimensions.
    finite
        Refuse NaN and infinity.

    Raises
    ------
    BadPeerDataError
    """
    raw = tensors.get(name)
    if raw is None:
        raise BadPeerDataError(f"tensor {name!r} is missing")
    allowed = [dtype] if isinstance(dtype, torch.dtype) else list(dtype)
    scales = tensors.get(name + SCALES)
    floating = next((one for one in allowed if one.is_floating_point), None)
    if scales is not None and raw.spec.dtype == "uint8" and floating is not None:
        check_shape(name, raw.spec.shape, shape)
        return _finite(name, _unpack_8bit(raw, scales, floating), finite)
    if DTYPES[raw.spec.dtype] not in allowed:
        names = " or ".join(DTYPE_NAMES[one] for one in allowed)
        raise BadPeerDataError(f"tensor {name!r} is {raw.spec.dtype}, it must be {names}")
    check_shape(name, raw.spec.shape, shape)
    return _finite(name, unpack(raw), finite)


def _finite(name: str, tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    if wanted and not all_finite(tensor):
        raise BadPeerDataError(f"tensor {name!r} has NaN or infinity in it")
    return tensor


def check_shape(name: str, actual: Sequence[int], wanted: Sequence[int | None]) -> None:
    """`BadPeerDataError` unless the shape fits (see `take`)."""
    wanted = list(wanted)
    open_ended = bool(wanted) and wanted[-1] == -1
    if open_ended:
        wanted.pop()
    fits = len(actual) >= len(wanted) if open_ended else len(actual) == len(wanted)
    if not fits or any(size is not None and size != got for size, got in zip(wanted, actual, strict=False)):
        text = ", ".join("any" if size is None else str(size) for size in wanted)
        raise BadPeerDataError(
            f"tensor {name!r} has shape {list(actual)}, it must have [{text}{', …' if open_ended else ''}]"
        )
