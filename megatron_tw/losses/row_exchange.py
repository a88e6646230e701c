"""Rows (tokens) of the loss: which to work on, and how they get to the vocabulary shards and back.

Rows are dealt with per sequence-parallel shard, because a rank holds the hidden states of one shard only.

Shape suffixes: G sequence-parallel shards (1 without sequence parallel), L rows of a shard, R those chosen, C those of
a chunk, M = G * C rows of a chunk over all shards, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def choose_rows(chosen_GL: Tensor) -> Tensor:
    """Index [G, R] of the chosen rows of each shard, in order, for the R of the fullest shard.

    Shards with fewer are filled up with rows that are not chosen, each at most once. `chosen_GL` (bool) must be the
    same on all ranks.

    >>> choose_rows(torch.tensor([[False, True, False, True], [False, False, False, True]]))
    tensor([[1, 3],
            [3, 0]])
    """
    num_rows = int(chosen_GL.sum(dim=1).max()) if chosen_GL.numel() else 0
    if num_rows == chosen_GL.shape[1]:
        return torch.arange(num_rows, device=chosen_GL.device).expand(chosen_GL.shape)
    # A stable sort puts the chosen rows first and leaves them in order.
    return chosen_GL.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_rows].contiguous()


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """Collectives over the tensor-parallel group, each of a chunk of rows."""

    tp_group: dist.ProcessGroup | None  # None: the vocabulary is not split
    num_shards: int  # G
    dtype: torch.dtype  # of what is sent

    @property
    def own_shard(self) -> int:
        return 0 if self.tp_group is None or self.num_shards == 1 else self.tp_group.rank()

    def agree(self, chosen_GL: Tensor) -> Tensor:
        """Rows that any rank has chosen: gradients may round to zero on some ranks, and collectives must match."""
        if self.tp_group is None or chosen_GL.numel() == 0:
            return chosen_GL
        any_GL = chosen_GL.to(torch.uint8)
        dist.all_reduce(any_GL, dist.ReduceOp.MAX, group=self.tp_group)
        return any_GL.bool()

    def gather_chunks(self, hidden_LH: Tensor, chunks: list[Tensor]) -> Iterator[Tensor]:
        """For each index [G, C] the rows of all shards, [M, H]. The next chunk's gather is under way meanwhile."""
        if self.num_shards == 1:
            for index_GC in chunks:
                yield hidden_LH.index_select(0, index_GC[0]).to(self.dtype)
            return
        started: tuple[Tensor, dist.Work] | None = None
        for index in [*chunks, None]:
            ready, started = started, None if index is None else self._start_gather(hidden_LH, index)
            if ready is not None:
                rows_MH, work = ready
                work.wait()
                yield rows_MH

    def _start_gather(self, hidden_LH: Tensor, index_GC: Tensor) -> tuple[Tensor, dist.Work]:
        rows_CH = hidden_LH.index_select(0, index_GC[self.own_shard]).to(self.dtype)
        rows_MH = rows_CH.new_empty(self.num_shards * len(rows_CH), rows_CH.shape[1])
        work = dist.all_gather_into_tensor(rows_MH, rows_CH, group=self.tp_group, async_op=True)
        assert work is not None, "this rank is not in its tensor-parallel group"
        return rows_MH, work

    def start_reduce(self, grad_MH: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Sums gradients of a chunk over the vocabulary shards, back to [C, H] of this rank's rows; wait before use."""
        if self.tp_group is None:
            return grad_MH, None
        if self.num_shards == 1:
            return grad_MH, dist.all_reduce(grad_MH, group=self.tp_group, async_op=True)
        grad_CH = grad_MH.new_empty(len(grad_MH) // self.num_shards, grad_MH.shape[1])
        return grad_CH, dist.reduce_scatter_tensor(grad_CH, grad_MH, group=self.tp_group, async_op=True)
