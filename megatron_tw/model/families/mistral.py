"""Mistral 7B and what is built like it: a Llama, in which a token may see no more than a sliding window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_tw.model.families.base import QUANTIZED, Fixed, json_value, keys_of
from megatron_tw.model.families.llama import LLAMA


def sliding_window(raw: Mapping[str, Any], source: str) -> int | None:
    """Tokens that a token sees at most: 4096 to transformers where the key is missing, all where it is null."""
    window = raw.get("sliding_window", 4096)
    return None if window is None else json_value(window, int, f"{source}: sliding_window", or_null=True)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=keys_of(epsilon="rms_norm_eps", epsilon_default=1e-6, max_position_embeddings=131072, key_value_heads=8),
    fixed={
        "hidden_act": Fixed("silu"),
        "layer_types": Fixed(None, "all layers see the same window here"),
        **QUANTIZED,
    },
    attention_span=sliding_window,
)
