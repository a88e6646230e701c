"""Core attention under context parallelism: what its bias is, and what it holds."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_tw.model.attention import bottom_right_causal


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
