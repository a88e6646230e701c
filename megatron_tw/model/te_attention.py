"""Transformer Engine's core attention, told per call over which ranks the sequence lies. Imported only where it is
installed."""

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_tw.model.sequence import SequenceShard, thd_params


class ShardedTEAttention(TEDotProductAttention):
    """Sets the context-parallel group that the call's SequenceShard names, whenever it differs from the last call's.

    Megatron-Core's own switch (PackedSeqParams.cp_group) persists into later calls, knows no hierarchical groups, and
    would hand Transformer Engine a maximum length that it multiplies by the group's size again (seen in its
    DotProductAttention.forward); so the group is set here, and the base class gets no packed parameters.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
        packed_seq_params: SequenceShard | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        shard = packed_seq_params
        assert isinstance(shard, SequenceShard), "every forward pass names its SequenceShard"
        if shard.cp_group is not getattr(self, "_active_group", self):
            self._use_group(shard.cp_group)
            self._active_group = shard.cp_group
        if shard.packed is None:
            return super().forward(query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs)
        query, key, value = (x.squeeze(1) for x in (query, key, value))  # [tokens, heads, head size]: THD
        packed = thd_params(shard.packed)
        out = super().forward(query, key, value, attention_mask, *args, packed_seq_params=packed, **kwargs)
        return out.unsqueeze(1)

    def _use_group(self, group: dist.ProcessGroup | None) -> None:
        if group is None:
            self.set_context_parallel_group(None, None, None, "p2p")
            return
        comm_type = self.config.cp_comm_type or "p2p"
        groups: Any = group
        if comm_type == "a2a+p2p":
            if group is parallel_state.get_context_parallel_group():
                groups = parallel_state.get_hierarchical_context_parallel_groups()
            else:
                comm_type = "p2p"  # a sub-group of ranks that share a window: too small for two levels
        self.set_context_parallel_group(
            groups, dist.get_process_group_ranks(group), TEDotProductAttention.cp_stream, comm_type
        )
