"""Core attention under context parallelism: what its bias is, and what it holds; what Transformer Engine's is told."""

import importlib
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from megatron_tw.model.attention import ContextParallelAttention, bottom_right_causal
from megatron_tw.model.sequence import SequenceShard


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 12)])
def test_the_bias_holds_no_data_and_gives_the_same_output(queries, keys):
    bias = bottom_right_causal(queries, keys)
    assert bias.untyped_storage().nbytes() == 0
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (queries, keys, keys))
    ours = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, keys)))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_million_tokens_take_no_memory():
    bottom_right_causal(1 << 20, 1 << 24)  # 2 x 2^44 fp32 numbers as PyTorch makes it


LENGTHS = [16, 32, 16]
HEADS, GROUPS, SIZE = 4, 2, 8


class TransformerEnginesAttention(torch.nn.Module):
    """Stands in for Megatron-Core's class over Transformer Engine's: notes what it is told, and attends inside the
    sequences that `cu_seqlens` names, as the THD format says: [tokens, heads, head size] -> [tokens, all heads]."""

    cp_stream = "stream"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(cp_comm_type=None)
        self.groups: list[tuple[Any, ...]] = []
        self.told: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []

    def set_context_parallel_group(self, *told: Any) -> None:
        self.groups.append(told)

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, attn_mask_type=None):
        self.told.append(packed_seq_params)
        self.shapes += [tuple(query.shape), tuple(key.shape), tuple(value.shape)]
        assert attn_mask_type == "causal"
        if packed_seq_params is None or packed_seq_params.cu_seqlens_q[-1] != len(query):
            return query.flatten(-2)
        outputs = []
        for start, end in pairwise(packed_seq_params.cu_seqlens_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


@pytest.fixture
def sharded_te_attention(monkeypatch):
    """Our subclass, over the stand-in."""
    theirs: Any = ModuleType("megatron.core.extensions.transformer_engine")
    theirs.TEDotProductAttention = TransformerEnginesAttention
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    monkeypatch.delitem(sys.modules, "megatron_tw.model.te_attention", raising=False)
    module = importlib.import_module("megatron_tw.model.te_attention")
    monkeypatch.setattr(module, "dist", SimpleNamespace(get_process_group_ranks=lambda group: group.ranks))
    yield module.ShardedTEAttention()
    del sys.modules["megatron_tw.model.te_attention"]  # it stands on the stand-in


def test_packed_rows_reach_transformer_engine_as_thd(sharded_te_attention):
    """On one rank the same output as our attention's."""
    tokens = sum(LENGTHS)
    q, k, v = (torch.randn(tokens, 1, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    shard = SequenceShard.of_documents(None, LENGTHS, None)
    out = sharded_te_attention(q, k, v, None, packed_seq_params=shard, attn_mask_type="causal")
    assert sharded_te_attention.shapes == [(tokens, HEADS, SIZE), (tokens, GROUPS, SIZE), (tokens, GROUPS, SIZE)]
    (told,) = sharded_te_attention.told
    assert type(told) is PackedSeqParams  # not our subclass
    assert told.qkv_format == "thd"
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        assert getattr(told, name).tolist() == [0, 16, 48, 64]
    assert (told.max_seqlen_q, told.max_seqlen_kv) == (32, 32)
    assert told.cp_group is None
    assert sharded_te_attention.groups == [(None, None, None, "p2p")]
    config: Any = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    ours = ContextParallelAttention(config, 1, AttnMaskType.causal, "self")
    torch.testing.assert_close(out, ours(q, k, v, None, packed_seq_params=shard))


def test_the_group_is_set_whenever_it_changes(sharded_te_attention):
    """Two ranks' packed row, the windows on one rank, and the row again."""
    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 2, ranks=[4, 6])
    q, k, v = (torch.randn(sum(LENGTHS) // 2, 1, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    packed, alone = SequenceShard.of_documents(group, LENGTHS, None), SequenceShard.over(None, sum(LENGTHS) // 2)
    for shard in (packed, packed, alone, packed):
        out = sharded_te_attention(q, k, v, None, packed_seq_params=shard, attn_mask_type="causal")
        assert out.shape == (sum(LENGTHS) // 2, 1, HEADS * SIZE)
    assert sharded_te_attention.groups == [
        (group, [4, 6], "stream", "p2p"), (None, None, None, "p2p"), (group, [4, 6], "stream", "p2p")
    ]  # fmt: skip
    told = sharded_te_attention.told
    assert [params is None for params in told] == [False, False, True, False]
    assert told[0].cu_seqlens_q.tolist() == [0, 16, 48, 64]  # of whole documents, over both ranks
    assert told[0].cp_group is None
