"""How one forward pass lays a sequence out over context-parallel ranks, said per call.

The long pass shards a row over the whole context-parallel group; the short-window pass keeps windows on one rank or
on a sub-group. Megatron-Core threads a `PackedSeqParams` from the model through every layer (pipeline stages and
recomputation included) to rotary embedding and core attention, so the layout travels as one, and no module holds
state that a later pass could inherit.
"""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SequenceShard(PackedSeqParams):
    """Sequences of `sequence_length` tokens, laid out in zigzag over `cp_group` (None: whole on this rank).

    rank, size: this rank's place in `cp_group`.
    """

    sequence_length: int = 0
    rank: int = 0
    size: int = 1

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
