"""Published models by name: what their config.json says of their shape. Weights are not needed to plan.

Each is the config.json of the Hugging Face repository that its line names, as far as shape and rope go.
"""

import json
from typing import Any

from megatron_tw.model.architecture import Architecture, parse_architecture

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "bos_token_id": 128000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


def _to_128k(factor: float) -> dict[str, Any]:
    """What Llama 3.1 and 3.2 say of their length and rope."""
    return {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", {**_LLAMA3, **_8B}),
    "llama3-70b": ("meta-llama/Meta-Llama-3-70B", {**_LLAMA3, **_70B}),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", {**_LLAMA3, **_8B, **_to_128k(8.0)}),
    "llama3.1-70b": ("meta-llama/Llama-3.1-70B", {**_LLAMA3, **_70B, **_to_128k(8.0)}),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        {
            **_LLAMA3, **_to_128k(32.0), "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        },
    ),
    "llama3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        {
            **_LLAMA3, **_to_128k(32.0), "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.3",
        {
            **_8B, "model_type": "mistral", "vocab_size": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "sliding_window": None, "bos_token_id": 1, "torch_dtype": "bfloat16",
        },
    ),
    "phi-2": (
        "microsoft/phi-2",
        {
            "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "rope_theta": 10000.0,
            "max_position_embeddings": 2048, "bos_token_id": 50256, "torch_dtype": "float16",
        },
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B",
        {
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 131072, "bos_token_id": 151643,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        },
    ),
    "qwen3-8b": (
        "Qwen/Qwen3-8B",
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960, "bos_token_id": 151643,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        },
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0, "max_position_embeddings": 8192, "bos_token_id": 0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
    ),
}  # fmt: skip
"""Name -> Hugging Face repository, and what its config.json says."""


def named_architecture(name: str) -> Architecture:
    """The architecture of a published model.

    Raises:
        ValueError: none of these.
    """
    if name not in SHAPES:
        raise ValueError(f"--model: expected one of {', '.join(sorted(SHAPES))}, got {name}")
    repository, config = SHAPES[name]
    return parse_architecture(json.loads(json.dumps(config)), f"{repository}/config.json")
