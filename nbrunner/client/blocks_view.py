"""A model's blocks as modules: call them on hidden states, differentiate through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import overload

import torch
from torch import nn

from nbrunner.blocks.lora import Learned
from nbrunner.client.autograd import run_blocks
from nbrunner.client.blocks_session import BlocksSession
from nbrunner.client.inputs import check_hidden, check_mask
from nbrunner.client.runner import BlockRunner
from nbrunner.errors import UserInputError


class RemoteBlocks(nn.Module):
    """Blocks ``[start, end)`` of a model, run by servers; without caches, or with those of a session.

    A sequence and a module at once: ``len(model.blocks)``, ``model.blocks[3]``, ``model.blocks[2:5](hidden)``.
    Gradients flow through it to its input and to the adapters that are active in the model; the servers' weights
    stay as they are.

    Attributes
    ----------
    start, end : int
        The blocks.
    dtype : torch.dtype
        Of the hidden states.
    width : int or None
        Their last dimension.
    """

    def __init__(
        self,
        runner: BlockRunner,
        start: int,
        end: int,
        *,
        dtype: torch.dtype,
        width: int | None,
        learned: Callable[[], Learned | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._runner = runner
        self._learned = learned
        self.start, self.end = start, end
        self.dtype, self.width = dtype, width

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states in at block ``start``, hidden states out after block ``end - 1``.

        Parameters
        ----------
        hidden_states
            [batch, tokens, hidden], of the model's dtype.
        attention_mask
            [batch, tokens], 0 for padding.
        position_ids
            [1 or batch, tokens]; the architecture's own default if left out.

        Raises
        ------
        UserInputError
            A tensor of wrong shape or dtype, or with NaN; nothing was sent.
        MissingBlocksError
        """
        hidden = check_hidden(hidden_states, self.dtype, self.width)
        batch, tokens = hidden.shape[:2]
        mask = check_mask(attention_mask, batch, tokens)
        if position_ids is not None and (
            position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens
        ):
            raise UserInputError(
                f"position_ids have shape {list(position_ids.shape)}; [1 or {batch}, {tokens}] is wanted"
            )
        positions = None if position_ids is None else position_ids.cpu()
        output, _ = run_blocks(
            self._runner,
            hidden,
            self.start,
            self.end,
            mask=mask,
            positions=positions,
            learned=self._learned(),
        )
        return output

    def inference_session(self) -> BlocksSession:
        """A session over these blocks, whose caches outlive a call."""
        learned = self._learned()
        some = None if learned is None else learned.within(self.start, self.end)
        return BlocksSession(
            self._runner,
            self.start,
            self.end,
            dtype=self.dtype,
            width=self.width,
            adapter=None if some is None else some.copied(),
        )

    def runs_on(self, runner: BlockRunner) -> bool:
        """Whether these are blocks of that runner's model."""
        return self._runner is runner

    def __len__(self) -> int:
        return self.end - self.start

    @overload
    def __getitem__(self, index: int) -> RemoteBlocks: ...
    @overload
    def __getitem__(self, index: slice) -> RemoteBlocks: ...
    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step != 1:
                raise UserInputError("blocks run one after the other: a slice of them cannot have a step")
            if start >= end:
                raise UserInputError(
                    f"[{index.start}:{index.stop}] is empty: there are blocks 0 to {len(self) - 1}"
                )
        else:
            start = index + len(self) if index < 0 else index
            if not 0 <= start < len(self):
                raise IndexError(f"block {index} does not exist: there are {len(self)}")
            end = start + 1
        return RemoteBlocks(
            self._runner,
            self.start + start,
            self.start + end,
            dtype=self.dtype,
            width=self.width,
            learned=self._learned,
        )

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"<RemoteBlocks [{self.start}, {self.end}) of hidden {self.width}, {self.dtype}>"
