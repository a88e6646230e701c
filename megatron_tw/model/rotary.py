"""Rotary position embedding with the frequencies that `transformers` computes, for any scaling that a config.json
names.

Megatron-Core hard-codes the constants of llama3 scaling; here the checkpoint's own `rope_parameters` decide, through
transformers' ROPE_INIT_FUNCTIONS (default, linear, llama3, yarn, longrope), so that logits agree.
"""

from functools import lru_cache

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_tw.model.sequence import SequenceShard
from megatron_tw.parallel.zigzag import zigzag_positions


class ShardedRotaryEmbedding(RotaryEmbedding):
    """Angles [local tokens, 1, 1, head_dim] in fp32 for the tokens that this rank holds of a `SequenceShard`."""

    def __init__(self, inv_freq: Tensor, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.rotary_interleaved = False
        # A plain attribute, not a buffer: it must stay fp32 when the model is cast to bf16, and is in no checkpoint.
        self.inv_freq = inv_freq.to(device=device, dtype=torch.float32)
        self._angles = lru_cache(maxsize=4)(self._compute_angles)

    def get_rotary_seq_len(self, *args, packed_seq_params: SequenceShard | None = None, **kwargs):  # type: ignore[no-untyped-def]
        """Megatron-Core asks for a length and hands it to `forward`; the whole layout goes the same way."""
        shard = packed_seq_params if packed_seq_params is not None else args[-1]
        assert isinstance(shard, SequenceShard), "every forward pass names its SequenceShard"
        return shard

    def forward(self, shard: SequenceShard, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:  # type: ignore[no-untyped-def]
        return self._angles(shard.sequence_length, shard.rank, shard.size)

    def _compute_angles(self, sequence_length: int, rank: int, size: int) -> Tensor:
        positions = zigzag_positions(sequence_length, rank=rank, size=size, device=self.inv_freq.device)
        angles = torch.outer(positions.float(), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
