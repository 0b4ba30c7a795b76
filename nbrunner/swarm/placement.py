"""Which blocks a new server should take. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from nbrunner.errors import UserInputError
from nbrunner.protocol.records import ServerRecord


def choose_span(records: Iterable[ServerRecord], num_blocks: int, count: int) -> tuple[int, int]:
    """The worst-served ``count`` neighbouring blocks.

    Blocks are compared by how many servers hold them and then by how fast those are together; ranges by their
    worst block, then by their second worst, and so on, so that one block that nobody serves outweighs any number
    that are served slowly. Among equals the first range wins.

    Parameters
    ----------
    records
        Of the other servers of the model; those that leave do not count.
    num_blocks
        Of the whole model.
    count
        How many blocks the new server can hold; all are taken if it is as many as there are.

    Returns
    -------
    (int, int)
        ``[start, end)``.
    """
    if num_blocks < 1 or count < 1:
        raise UserInputError(f"cannot choose {count} of {num_blocks} blocks")
    count = min(count, num_blocks)
    holders = [0] * num_blocks
    speed = [0.0] * num_blocks
    for record in records:
        if record.state not in ("online", "joining"):
            continue
        for block in range(min(record.start, num_blocks), min(record.end, num_blocks)):
            holders[block] += 1
            speed[block] += record.prefill_tokens_per_second * (record.end - record.start)
    served = list(zip(holders, speed, strict=True))
    start = min(range(num_blocks - count + 1), key=lambda first: (sorted(served[first : first + count]), first))
    return start, start + count
