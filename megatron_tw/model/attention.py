"""Core attention under context parallelism without Transformer Engine, on CPU and GPU. S = this rank's tokens, N =
all tokens, B = batch, H = query heads, G = key-value heads, D = head size.

Keys and values are gathered over the context-parallel group (context_gather.py), and each of this rank's two zigzag
chunks attends to the keys up to its own end, with PyTorch's scaled_dot_product_attention and a bottom-right causal
mask. In a packed sequence that is done for each document, those of equal length as one batch: as many calls as there
are lengths, which are fewer than sqrt(2 N / multiple) where documents are padded to a multiple.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tw.model.context_gather import GatherKeysValues, gathered_again
from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.packed import PackedSequence


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
        self.gathers_again = False
        """Gather keys and values again in backward (--recompute-cp-gather)."""

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
        if shard.packed is not None:
            out_BHSD = self._attend_within_documents(q_BHSD, k_BGSD, v_BGSD, shard, shard.packed)
        elif shard.size == 1:
            # The values are a view of what the projection made of queries, keys and values, which backward would keep
            # whole.
            v_BGSD = v_BGSD.contiguous() if torch.is_grad_enabled() else v_BGSD
            out_BHSD = self._attend(q_BHSD, k_BGSD, v_BGSD, shard)
        else:
            kv_2BGSD = torch.stack((k_BGSD, v_BGSD))
            kv_2BGND = GatherKeysValues.apply(kv_2BGSD, shard)
            again = gathered_again(kv_2BGND, kv_2BGSD, shard) if self.gathers_again else nullcontext()
            with again:
                out_BHSD = self._attend_to_gathered(q_BHSD, kv_2BGND[0], kv_2BGND[1], shard)
        return out_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend_within_documents(
        self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, shard: SequenceShard, packed: PackedSequence
    ) -> Tensor:
        """As `forward`, of one packed sequence (B = 1)."""
        q_HSD = q_BHSD[0].index_select(1, packed.local_by_length)
        kv_2BGSD = torch.stack((k_BGSD, v_BGSD))
        if shard.size == 1:
            kv_2BGND = kv_2BGSD.index_select(3, packed.local_by_length)
        else:
            kv_2BGND = GatherKeysValues.apply(kv_2BGSD, shard)
        again = shard.size > 1 and self.gathers_again
        outputs, first = [], 0
        with gathered_again(kv_2BGND, kv_2BGSD, shard) if again else nullcontext():
            for count, length in packed.by_length:  # as a batch of `count` sequences
                own = length // shard.size
                q, k, v = (
                    x.narrow(1, first // ranks, count * tokens).unflatten(1, (count, tokens)).transpose(0, 1)
                    for x, tokens, ranks in (
                        (q_HSD, own, shard.size),
                        (kv_2BGND[0, 0], length, 1),
                        (kv_2BGND[1, 0], length, 1),
                    )
                )
                outputs.append(self._attend(q, k, v, shard).transpose(0, 1).flatten(1, 2))
                first += count * length
        return torch.cat(outputs, dim=1).index_select(1, packed.local_in_order)[None]

    def _attend(self, q_BHSD: Tensor, k_BGND: Tensor, v_BGND: Tensor, shard: SequenceShard) -> Tensor:
        """This rank's queries with the keys of the whole sequences."""
        if shard.size > 1:
            return self._attend_to_gathered(q_BHSD, k_BGND, v_BGND, shard)
        return F.scaled_dot_product_attention(
            q_BHSD,
            k_BGND,
            v_BGND,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q_BHSD.shape[1] != k_BGND.shape[1],
        )

    def _attend_to_gathered(self, q_BHSD: Tensor, k_BGND: Tensor, v_BGND: Tensor, shard: SequenceShard) -> Tensor:
        """Each of this rank's two chunks [B, H, C, D] of queries with the keys up to its own end."""
        chunk = q_BHSD.shape[2] // 2
        outputs = []
        for index, q_BHCD in zip((shard.rank, 2 * shard.size - 1 - shard.rank), q_BHSD.chunk(2, dim=2), strict=True):
            seen = (index + 1) * chunk
            outputs.append(
                F.scaled_dot_product_attention(
                    q_BHCD,
                    k_BGND[:, :, :seen],
                    v_BGND[:, :, :seen],
                    attn_mask=bottom_right_causal(chunk, seen),
                    scale=self.softmax_scale,
                    enable_gqa=q_BHSD.shape[1] != k_BGND.shape[1],
                )
            )
        return torch.cat(outputs, dim=2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """No parameters, nothing in a checkpoint."""
        return {}


def bottom_right_causal(queries: int, keys: int) -> Tensor:
    """The bias of `torch.nn.attention.bias.causal_lower_right`: query i of the last `queries` positions sees keys up to
    its own. That function hands its arguments on to `Tensor.__new__`, which takes them for a shape: an fp32 tensor
    [2, queries, keys] on the host that nobody reads, 137 GB for a million tokens. This one holds no data.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant  # imports PyTorch's compiler: not where CP is 1

    bias: Any = torch.Tensor._make_subclass(CausalBias, torch.empty(0))
    CausalBias.__init__(bias, CausalVariant.LOWER_RIGHT, queries, keys)
    return bias
