"""How the rows of a batch lie in tensors and over ranks, and how numbers of single targets get from one to the other.

Shape suffixes: R rows, S positions of a whole row, L those that this rank holds, T targets of a whole row.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.objective.packed import PackedSequence
from megatron_tw.objective.zigzag import unshard, zigzag_positions, zigzag_shard

Slices = Literal["zigzag", "contiguous"]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """The layout of a trainer's tensors. Groups of one rank are as good as None.

    Raises:
        ValueError: an unknown kind of slices.
    """

    batch_first: bool = True
    """Hidden states, labels and NLLs are [batch, seq, ...]; else [seq, batch, ...], as Megatron has them."""
    tp_group: dist.ProcessGroup | None = None
    """The ranks among which the vocabulary is split, in rank order; None: it is not split."""
    sequence_parallel: bool = False
    """Each rank of `tp_group` holds its part of the sequence of the hidden states; labels and NLLs are never split."""
    cp_group: dist.ProcessGroup | None = None
    """The ranks among which the positions of a row are split, in rank order; None: every rank has whole rows."""
    cp_slices: Slices = "zigzag"
    """Which positions rank r of the C ranks in `cp_group` has. `zigzag`: chunks r and 2C-1-r of 2C, as Megatron and
    Transformer Engine have them. `contiguous`: the r-th of C equal parts."""
    packed: PackedSequence | None = None
    """Of a batch of one packed row: its documents, each in zigzag; else None."""

    def __post_init__(self) -> None:
        if self.cp_slices not in get_args(Slices):
            raise ValueError(f"`cp_slices`: expected {' or '.join(get_args(Slices))}, got {self.cp_slices!r}")

    @property
    def cp_size(self) -> int:
        return 1 if self.cp_group is None else self.cp_group.size()

    @property
    def cp_rank(self) -> int:
        return 0 if self.cp_group is None else self.cp_group.rank()

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Positions [L] int64 of a row of `length` that this rank holds, in the order in which it holds them."""
        if self.packed is not None:
            return self.packed.positions()
        if self.cp_slices == "contiguous":
            return self.slice(torch.arange(length, device=device), 0)
        return zigzag_positions(length, rank=self.cp_rank, size=self.cp_size, device=device)

    def slice(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of `whole` along its positions `dim`; `whole` itself where rows are not split.

        Raises:
            ValueError: the positions do not split evenly.
        """
        if self.packed is not None:
            return self.packed.shard(whole, dim)
        if self.cp_slices == "zigzag" or self.cp_size == 1:
            return zigzag_shard(whole, dim, rank=self.cp_rank, size=self.cp_size)
        if whole.shape[dim] % self.cp_size:
            raise ValueError(
                f"a sequence of {whole.shape[dim]} tokens does not split into {self.cp_size} context-parallel slices"
            )
        length = whole.shape[dim] // self.cp_size
        return whole.narrow(dim, self.cp_rank * length, length)

    def gather(self, local_RL: Tensor) -> Tensor:
        """Whole rows [R, S] from all ranks' slices [R, L]: per-token scalars only, over the context-parallel group.

        Every context-parallel rank needs them, because weights are made from whole rows.
        """
        if self.cp_size == 1:
            return local_RL
        shards = [torch.empty_like(local_RL, memory_format=torch.contiguous_format) for _ in range(self.cp_size)]
        dist.all_gather(shards, local_RL.contiguous(), group=self.cp_group)
        if self.packed is not None:
            return self.packed.unshard(shards, 1)
        return unshard(shards, 1) if self.cp_slices == "zigzag" else torch.cat(shards, 1)

    def sum_(self, rows_RT: Tensor) -> Tensor:
        """Sum in place over the context-parallel group: rows in which every rank filled in the targets that it scored,
        zeros elsewhere.

        One row at a time, so that the largest message is one row's NLLs (4 bytes a target).
        """
        if self.cp_size > 1:
            for row_T in rows_RT:
                dist.all_reduce(row_T, group=self.cp_group)
        return rows_RT

    def same_on_tensor_ranks_(self, x: Tensor) -> Tensor:
        """Tensor-parallel rank 0's `x` on all tensor-parallel ranks, in place: a choice made from it is then the same
        everywhere."""
        if self.tp_group is not None and self.tp_group.size() > 1:
            dist.broadcast(x, dist.get_process_group_ranks(self.tp_group)[0], group=self.tp_group)
        return x

    def rows_first(self, x: Tensor) -> Tensor:
        """[batch, seq] from a tensor of this layout: a view."""
        return x if self.batch_first else x.transpose(0, 1)


WHOLE_ROWS = RowLayout()
"""[batch, seq] tensors of whole rows, without tensor parallelism."""
