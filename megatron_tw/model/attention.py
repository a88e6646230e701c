"""Core attention under context parallelism without Transformer Engine, on CPU and GPU. S = this rank's tokens, N =
all tokens, B = batch, H = query heads, G = key-value heads, D = head size.

Keys and values are gathered over the context-parallel group (differentiable: the backward pass reduce-scatters), and
each of this rank's two zigzag chunks attends to the keys up to its own end, with PyTorch's
scaled_dot_product_attention and a bottom-right causal mask.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.zigzag import unshard, zigzag_shard


class ContextParallelAttention(MegatronModule):
    """Causal self-attention over a `SequenceShard`: query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H * D]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"only causal self-attention is supported, not {attn_mask_type} {attention_type}-attention"
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceShard | None = None,
        **unused: Any,
    ) -> Tensor:
        shard = packed_seq_params
        assert isinstance(shard, SequenceShard), "every forward pass names its SequenceShard"
        q_BHSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q_BHSD.shape[1] != k_BGSD.shape[1]
        if shard.size == 1:
            out_BHSD = F.scaled_dot_product_attention(
                q_BHSD, k_BGSD, v_BGSD, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
            )
        else:
            k_BGND, v_BGND = _GatherKeysValues.apply(torch.stack((k_BGSD, v_BGSD)), shard.cp_group, shard.rank)
            chunk = q_BHSD.shape[2] // 2
            outputs = []
            for index, q_BHCD in zip(
                (shard.rank, 2 * shard.size - 1 - shard.rank), q_BHSD.chunk(2, dim=2), strict=True
            ):
                seen = (index + 1) * chunk
                outputs.append(
                    F.scaled_dot_product_attention(
                        q_BHCD,
                        k_BGND[:, :, :seen],
                        v_BGND[:, :, :seen],
                        attn_mask=bottom_right_causal(chunk, seen),
                        scale=self.softmax_scale,
                        enable_gqa=grouped,
                    )
                )
            out_BHSD = torch.cat(outputs, dim=2)
        return out_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """No parameters, nothing in a checkpoint."""
        return {}


def bottom_right_causal(queries: int, keys: int) -> CausalBias:
    """The bias of `torch.nn.attention.bias.causal_lower_right`: query i of the last `queries` positions sees keys up to
    its own. That function hands its arguments on to `Tensor.__new__`, which takes them for a shape: an fp32 tensor
    [2, queries, keys] on the host that nobody reads, 137 GB for a million tokens. This one holds no data.
    """
    bias = torch.Tensor._make_subclass(CausalBias, torch.empty(0))
    CausalBias.__init__(bias, CausalVariant.LOWER_RIGHT, queries, keys)
    return bias


class _GatherKeysValues(torch.autograd.Function):
    """[2, B, G, S, D] of every rank -> [2, B, G, N, D] in sequence order; backward: summed over ranks, this rank's
    slice."""

    @staticmethod
    def forward(ctx: Any, kv_local: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
        ctx.group, ctx.rank = group, rank
        shards = [torch.empty_like(kv_local, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(shards, kv_local.contiguous(), group=group)
        return unshard(shards, 3)

    @staticmethod
    def backward(ctx: Any, grad_kv: Tensor) -> tuple[Tensor, None, None]:
        size = ctx.group.size()
        # In fp32: sums of many bf16 terms over ranks would depend on the layout.
        parts = [zigzag_shard(grad_kv, 3, rank=rank, size=size).float().contiguous() for rank in range(size)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine.to(grad_kv.dtype), None, None
