"""How one forward pass lays a sequence out over context-parallel ranks, said per call.

The long pass shards a row over the whole context-parallel group; the short-window pass keeps windows on one rank or
on a sub-group. Megatron-Core threads a `PackedSeqParams` from the model through every layer (pipeline stages and
recomputation included) to rotary embedding and core attention, so the layout travels as one, and no module holds
state that a later pass could inherit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tw.objective.packed import PackedSequence
from megatron_tw.objective.zigzag import unshard, zigzag_positions, zigzag_shard


def thd_params(packed: PackedSequence) -> PackedSeqParams:
    """What Transformer Engine's THD path is told: lengths of whole documents, over all context-parallel ranks. It
    divides them itself, and takes `cu_seqlens_q_padded` that is `cu_seqlens_q` itself as "no gaps".
    """
    starts, longest = packed.cu_seqlens, max(packed.lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@dataclass
class SequenceShard(PackedSeqParams):
    """Sequences of `sequence_length` tokens, laid out in zigzag over `cp_group` (None: whole on this rank).

    rank, size: this rank's place in `cp_group`. packed: the documents of the one sequence, each in zigzag; attention
    stays inside them, and positions start anew. None: a sequence is one document.
    """

    sequence_length: int = 0
    rank: int = 0
    size: int = 1
    packed: PackedSequence | None = None

    @staticmethod
    def over(group: dist.ProcessGroup | None, sequence_length: int) -> "SequenceShard":
        """The layout of `sequence_length` tokens over `group`."""
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        return SequenceShard(
            qkv_format="sbhd",
            cp_group=group if size > 1 else None,
            local_cp_size=size,
            sequence_length=sequence_length,
            rank=rank,
            size=size,
        )

    @staticmethod
    def of_documents(
        group: dist.ProcessGroup | None, lengths: Sequence[int], device: torch.device | None
    ) -> "SequenceShard":
        """The layout over `group` of one sequence of documents of these lengths, padding included."""
        shard = SequenceShard.over(group, sum(lengths))
        return replace(shard, packed=PackedSequence(lengths, rank=shard.rank, size=shard.size, device=device))

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Which positions of the sequence this rank holds [S], in the order in which it holds them."""
        if self.packed is not None:
            return self.packed.positions()
        return zigzag_positions(self.sequence_length, rank=self.rank, size=self.size, device=device)

    def slice(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of `whole` along `dim`."""
        if self.packed is not None:
            return self.packed.shard(whole, dim)
        return zigzag_shard(whole, dim, rank=self.rank, size=self.size)

    def gathered(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """What attention makes of all ranks' keys and values, in rank order: the sequence; of a packed one, the
        documents in the order of `PackedSequence.by_length`."""
        if self.packed is not None:
            return torch.cat(list(shards), dim).index_select(dim, self.packed.gathered_by_length)
        return unshard(shards, dim)

    def part_of_gathered(self, whole: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's part of what `gathered` made."""
        if self.packed is not None:
            return whole.index_select(dim, self.packed.own_by_length[rank])
        return zigzag_shard(whole, dim, rank=rank, size=self.size)
