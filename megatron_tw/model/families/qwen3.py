"""Qwen3: a Llama with norms of queries and keys, and a head size of its own; the small ones have tied embeddings."""

from dataclasses import replace

from megatron_tw.model.families.base import QUANTIZED, Fixed, keys_of
from megatron_tw.model.families.llama import LLAMA, MEGATRON, TENSORS
from megatron_tw.model.families.qwen2 import sliding_window
from megatron_tw.model.families.table import Parameter

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=keys_of(
        epsilon="rms_norm_eps", epsilon_default=1e-6, max_position_embeddings=32768, key_value_heads=32, head_dim=128
    ),
    fixed={"hidden_act": Fixed("silu"), "attention_bias": Fixed(False), **QUANTIZED},
    tensors=(
        *TENSORS,
        Parameter(
            ("decoder.layers.*.self_attention.q_layernorm.weight",),
            "whole",
            {"model.layers.*.self_attn.q_norm.weight": ("head",)},
        ),
        Parameter(
            ("decoder.layers.*.self_attention.k_layernorm.weight",),
            "whole",
            {"model.layers.*.self_attn.k_norm.weight": ("head",)},
        ),
    ),
    megatron={**MEGATRON, "qk_layernorm": True},
    attention_span=sliding_window,
)
