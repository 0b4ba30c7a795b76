"""What travels in requests without a session: rows in groups that fit a frame, and the tensors of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
import torch

from nbrunner.blocks.edits import Edits
from nbrunner.client.measuring import answer_bytes, most_rows
from nbrunner.client.runner import Carry, Segment
from nbrunner.errors import SessionError, UserInputError
from nbrunner.protocol.edits import EditOp
from nbrunner.protocol.finite import all_finite
from nbrunner.protocol.frames import RawTensor
from nbrunner.protocol.limits import MAX_FRAME_BYTES, Limits
from nbrunner.protocol.measure import Measure
from nbrunner.protocol.tensors import pack, take

CARRY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """`UserInputError` for NaN and infinity: a server would refuse them, and be right."""
    if not all_finite(tensor):
        raise UserInputError(f"{what} have NaN or infinity in them; nothing was sent")


def row_groups(
    part: Segment, limits: Limits, *, copies_in: int = 1, copies_out: int = 1, extra_bytes: int = 0
) -> list[slice]:
    """The rows of a batch in groups that fit a server's limits, request and answer.

    Parameters
    ----------
    copies_in, copies_out
        How many tensors like the hidden states travel there and back.
    extra_bytes
        Of a row, besides.

    Raises
    ------
    UserInputError
        Not even one row fits.
    """
    rows, tokens = part.hidden.shape[:2]
    row_bytes = part.hidden[0].numel() * part.hidden.element_size()
    carry_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in part.carry.values())
    # positions of 8 bytes and a mask of 1 a token go along
    most_bytes = (
        max(row_bytes * copies_in, row_bytes * copies_out) + copies_in * carry_bytes + 9 * tokens + extra_bytes
    )
    frame = min(limits.frame_bytes, MAX_FRAME_BYTES)
    most = min(limits.batch, limits.part_tokens // tokens, frame // most_bytes)
    if most < 1:
        raise UserInputError(
            f"sequences of {tokens} tokens are more than a server takes in one piece "
            f"({limits.part_tokens} tokens, {frame >> 20} MB): cut the text, or use a session, which goes in parts"
        )
    return [slice(at, min(at + most, rows)) for at in range(0, rows, most)]


def measured_groups(part: Segment, limits: Limits, asked: Measure | None) -> list[slice]:
    """Rows as `row_groups`, with room for what is measured of them; empty if nothing is."""
    if not asked:
        return []
    narrow = msgspec.structs.replace(limits, batch=min(limits.batch, most_rows(asked, part.hidden)))
    # the final states travel with the request, the measurements with the answer
    extra = max(answer_bytes(asked, part.hidden), part.hidden[0].numel() * part.hidden.element_size())
    return row_groups(part, narrow, extra_bytes=extra)


def most_captured(hidden: torch.Tensor, limits: Limits) -> int:
    """How many blocks fit one request: the captured states of all of them come back in one frame."""
    row_bytes = hidden[0].numel() * hidden.element_size() + 9 * hidden.shape[1]
    return max(1, min(limits.frame_bytes, MAX_FRAME_BYTES) // row_bytes - 1)


def input_tensors(
    part: Segment, rows: slice, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> list[RawTensor]:
    """What enters a part, for these rows."""
    tensors = [pack("hidden", part.hidden[rows])]
    if mask is not None:
        tensors.append(pack("mask", mask[rows]))
    if positions is not None:
        tensors.append(pack("positions", positions if positions.shape[0] == 1 else positions[rows]))
    return tensors + [pack(f"carry.{index}", tensor[rows]) for index, tensor in part.carry.items()]


def gradient_tensors(rows: slice, grad: torch.Tensor, grad_carry: Carry) -> list[RawTensor]:
    """Gradients of what left a part, for these rows."""
    return [
        pack("grad", grad[rows]),
        *(pack(f"grad_carry.{index}", tensor[rows]) for index, tensor in grad_carry.items()),
    ]


def edit_tensors(
    edits: Edits | None, part: Segment, rows: slice, *, measured: bool = False
) -> tuple[list[EditOp], list[RawTensor]]:
    """The edits of these rows at these blocks; rows are numbered in the request, not in the batch.

    Those of the state after the last block are only of use where it is measured.
    """
    if not edits:
        return [], []
    ours = [op for op in edits.ops if op.row is None or rows.start <= op.row < rows.stop]
    moved = [op if op.row is None else msgspec.structs.replace(op, row=op.row - rows.start) for op in ours]
    return Edits(tuple(moved), edits.vectors).packed(part.start, part.end + measured)


def take_carry(answer: Mapping[str, RawTensor], prefix: str, like: Collection[int]) -> dict[int, torch.Tensor]:
    """Extra outputs, or their gradients, for hidden states of a shape."""
    rows, tokens, *_ = like
    return {
        int(name.removeprefix(prefix)): take(answer, name, dtype=CARRY_DTYPES, shape=[rows, tokens, -1])
        for name in answer
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    }


def join_carries(carries: Sequence[Mapping[int, torch.Tensor]]) -> Carry:
    """Those of all groups of rows."""
    names = carries[0].keys()
    if any(one.keys() != names for one in carries):
        raise SessionError("parts of one batch came back with different extra outputs")
    return {name: torch.cat([one[name] for one in carries]) for name in names}
