"""Qwen2 and Qwen2.5: a Llama with biases of queries, keys and values; the small ones have tied embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_tw.model.families.base import QUANTIZED, Fixed, json_value, keys_of
from megatron_tw.model.families.llama import LLAMA, MEGATRON, QKV_BIAS, TENSORS


def sliding_window(raw: Mapping[str, Any], source: str) -> int | None:
    """Tokens that a token of some layer sees at most. A window counts only with `use_sliding_window`, and only in the
    layers that `layer_types` names, or else from the `max_window_layers`-th on."""
    if not json_value(raw.get("use_sliding_window", False), bool, f"{source}: use_sliding_window"):
        return None
    window = raw.get("sliding_window", 4096)
    if window is None:
        return None
    json_value(window, int, f"{source}: sliding_window", or_null=True)
    layer_types, first = raw.get("layer_types"), raw.get("max_window_layers", 28)
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise ValueError(f"{source}: layer_types: expected a list or null, got {layer_types!r}")
        slides = any(kind != "full_attention" for kind in layer_types)
    else:
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ValueError(f"{source}: max_window_layers: expected an integer of 0 or more, got {first!r}")
        slides = first < raw["num_hidden_layers"]
    return window if slides else None


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=keys_of(epsilon="rms_norm_eps", epsilon_default=1e-6, max_position_embeddings=32768, key_value_heads=32),
    fixed={"hidden_act": Fixed("silu"), **QUANTIZED},
    tensors=(
        *TENSORS,
        QKV_BIAS,
    ),
    megatron={**MEGATRON, "add_qkv_bias": True},
    attention_span=sliding_window,
)
