"""A session over some of a model's blocks: hidden states in, hidden states out, caches in between."""

from __future__ import annotations

from types import TracebackType

import torch

from nbrunner.blocks.adapters import SpanAdapter
from nbrunner.client.inputs import check_hidden, check_mask
from nbrunner.client.runner import BlockRunner, RunnerSession
from nbrunner.errors import SessionError, UserInputError
from nbrunner.protocol.steps import CacheOp


class BlocksSession:
    """Made by ``model.blocks[a:b].inference_session()``; a context manager.

    Parameters
    ----------
    runner
        Runs the blocks.
    start, end
        Which.
    dtype, width
        Of the hidden states.
    adapter
        Of these blocks, for as long as the session lives.

    Examples
    --------
    ::

        with model.blocks[2:5].inference_session() as session:
            out = session.step(hidden)          # [batch, tokens, hidden]
            out = session.step(next_hidden)     # only what is new
            session.position = 3                # back to the first three tokens
    """

    def __init__(
        self,
        runner: BlockRunner,
        start: int,
        end: int,
        *,
        dtype: torch.dtype,
        width: int | None,
        adapter: SpanAdapter | None = None,
    ) -> None:
        self._session: RunnerSession = runner.open_session(None, start, end, adapter)
        self._runner_dtype, self._dtype, self._width = runner.dtype, dtype, width
        self._length = 0
        self._rows = 0
        self._ops: list[CacheOp] = []
        self._mask: torch.Tensor | None = None
        self._closed = False

    @property
    def position(self) -> int:
        """Tokens held. Setting it to less rolls back to exactly so many."""
        return self._length

    @position.setter
    def position(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserInputError(f"position must be a number of tokens, not {value!r}")
        if not 0 <= value <= self._length:
            raise SessionError(
                f"cannot set position to {value}: the session holds {self._length} tokens, give 0 to {self._length}"
            )
        if value < self._length:
            self._ops = [CacheOp("crop", value) if value else CacheOp("reset")]
            self._length = value
            self._mask = None if self._mask is None or not value else self._mask[:, :value]

    @property
    def chain(self) -> list[tuple[str, int, int]]:
        """(PeerID, start, end) of each server; empty before the first step."""
        return list(self._session.chain)

    @torch.no_grad()
    def step(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append tokens. A step that fails leaves the session as it was.

        Parameters
        ----------
        hidden_states
            [batch, tokens, hidden], of the model's dtype: what enters the first block.
        attention_mask
            [batch, tokens] of these tokens, 0 for padding.
        position_ids
            [1 or batch, tokens]; counted on from what is held if left out.

        Returns
        -------
        torch.Tensor
            [batch, tokens, hidden], what leaves the last block. No gradients: for those call the blocks.

        Raises
        ------
        UserInputError
            A tensor of wrong shape or dtype, or with NaN; nothing was sent.
        MissingBlocksError
        SessionError
            The session is closed.
        """
        if self._closed:
            raise SessionError("this session is closed; open another with model.blocks[a:b].inference_session()")
        hidden = check_hidden(hidden_states, self._dtype, self._width)
        batch, tokens = hidden.shape[:2]
        if self._length and batch != self._rows:
            raise UserInputError(f"the session holds {self._rows} rows, the input has {batch}")
        new = check_mask(attention_mask, batch, tokens)
        if position_ids is not None and (
            position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens
        ):
            raise UserInputError(
                f"position_ids have shape {list(position_ids.shape)}; [1 or {batch}, {tokens}] is wanted"
            )
        mask = self._joined_mask(new, batch, tokens)
        result = self._session.step(
            hidden.to("cpu", self._runner_dtype),
            ops=tuple(self._ops),
            mask=mask,
            positions=None if position_ids is None else position_ids.cpu(),
        )
        self._ops, self._mask, self._rows = [], mask, batch
        self._length += tokens
        return result.hidden.to(hidden_states)

    def close(self) -> None:
        """Free the caches on the servers."""
        self._closed = True
        self._session.close()

    def __enter__(self) -> BlocksSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _joined_mask(self, new: torch.Tensor | None, batch: int, tokens: int) -> torch.Tensor | None:
        if new is None and self._mask is None:
            return None
        old = torch.ones(batch, self._length, dtype=torch.bool) if self._mask is None else self._mask
        new = torch.ones(batch, tokens, dtype=torch.bool) if new is None else new.cpu()
        return torch.cat([old, new], dim=1)
