"""What a Hugging Face config.json says of a model of the Llama family, and the Megatron-Core configuration that
follows."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tw.config import ActivationConfig, ComputeConfig, ParallelConfig, check_model_shape, padded_vocab_size

SUPPORTED_MODEL_TYPES = ("llama",)
_SCALED_FROM_A_LENGTH = ("yarn", "longrope", "llama3")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of a model, as plain numbers. `hf_config` keeps config.json whole, for export.

    rope: transformers' `rope_parameters` (rope_type, rope_theta and what the type needs).
    dtype: of the checkpoint's tensors, as config.json names it.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    tied_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    rope: dict[str, Any]
    dtype: torch.dtype
    hf_config: dict[str, Any]

    @property
    def rotary_base(self) -> float:
        """rope_theta: the base of the rotary frequencies."""
        return float(self.rope["rope_theta"])

    def with_rotary_base(self, rotary_base: float | None) -> "Architecture":
        """The same model with another rotary base; None keeps the checkpoint's."""
        return self if rotary_base is None else replace(self, rope={**self.rope, "rope_theta": float(rotary_base)})


def read_architecture(directory: str | Path) -> Architecture:
    """Read `directory`/config.json, as transformers 4 or 5 wrote it.

    Raises:
        ValueError: no such file, not JSON, not of the Llama family, or with a feature (bias, another activation) that
        the
            Megatron-Core model here does not have; the message names the file and the key.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    return parse_architecture(raw, str(path))


def parse_architecture(raw: dict[str, Any], source: str) -> Architecture:
    """The same from a parsed config.json; `source` names it in errors."""
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{source}: model_type: expected one of {SUPPORTED_MODEL_TYPES}, got {raw.get('model_type')!r}"
        )
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, expected) != expected:
            raise ValueError(f"{source}: {key}: expected {expected!r}, got {raw[key]!r}")
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if key not in raw]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")
    dtype_name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype_name not in _DTYPES:
        raise ValueError(f"{source}: dtype: expected one of {tuple(_DTYPES)}, got {dtype_name!r}")
    heads = raw["num_attention_heads"]
    bos = raw.get("bos_token_id")
    return Architecture(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        bos_token_id=bos[0] if isinstance(bos, list) else bos,
        rope=_rope_parameters(raw, source),
        dtype=_DTYPES[dtype_name],
        hf_config=raw,
    )


def _rope_parameters(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """transformers 5's `rope_parameters`, or transformers 4's `rope_theta` and `rope_scaling` in that form."""
    if raw.get("rope_parameters"):
        rope = dict(raw["rope_parameters"])
    else:
        rope = dict(raw.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] in _SCALED_FROM_A_LENGTH:  # else transformers takes the model's, which an extension changes
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 2048))
    return rope


def export_hf_config(architecture: Architecture, *, max_position_embeddings: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for export: rotary base, scaling, length and dtype as the model now has them, readable by
    transformers 4 and 5.

    max_position_embeddings: the new context length in tokens; never written smaller than the model's own.
    """
    config = dict(architecture.hf_config)
    rope = dict(architecture.rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    dtype_name = {value: key for key, value in _DTYPES.items()}[dtype]
    config.update(
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=max(max_position_embeddings, architecture.max_position_embeddings),
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else scaling,
        dtype=dtype_name,
        torch_dtype=dtype_name,
    )
    return config


@dataclass(frozen=True)
class Rotary:
    """Inverse frequencies [head_dim / 2] fp32, and the factor on queries and keys (yarn's; 1 for most)."""

    inv_freq: Tensor
    attention_factor: float


def rotary_embedding(architecture: Architecture) -> Rotary:
    """What transformers computes for this rope.

    Raises:
        ValueError: a rope type that transformers does not know, or whose frequencies depend on each input's length.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = architecture.rope["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
        return Rotary(1.0 / (architecture.rotary_base**exponents), 1.0)
    supported = sorted(set(ROPE_INIT_FUNCTIONS) - {"dynamic", "longrope", "proportional"})
    if rope_type not in supported:
        raise ValueError(f"config.json: rope_type: expected default or one of {supported}, got {rope_type!r}")
    hf = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        rope_parameters=dict(architecture.rope),
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"))
    return Rotary(inv_freq, float(attention_factor))


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    activations: ActivationConfig,
    *,
    on_gpu: bool,
    num_model_chunks: int | None,
) -> TransformerConfig:
    """Megatron-Core's configuration of this model under this run's parallelism and precision.

    Raises:
        ValueError: heads, layers or groups do not divide as the layout asks.
    """
    check_model_shape(
        parallel,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
    )
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        # Queries and keys are both multiplied by the rope's factor; on their products that is a scale.
        softmax_scale=rotary_embedding(architecture).attention_factor ** 2 / architecture.head_dim**0.5,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.uses_sequence_parallel,
        cp_comm_type=parallel.cp_comm_type,
        bf16=compute.bf16,
        params_dtype=torch.bfloat16 if compute.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if compute.bf16 else torch.float32,
        calculate_per_token_loss=True,
        # Every weight is read from a checkpoint. Not perform_initialization=False: Megatron-Core marks weights as
        # tensor-parallel
        # only while it initializes them, and counts the unmarked ones just once in the gradient norm.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        recompute_granularity=activations.recompute_granularity,
        recompute_method=activations.recompute_method,
        recompute_num_layers=activations.recompute_num_layers,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=on_gpu,
        deallocate_pipeline_outputs=True,
    )


def _leave_unfilled(weight: Tensor) -> Tensor:
    return weight


def megatron_vocab_size(architecture: Architecture, parallel: ParallelConfig, compute: ComputeConfig) -> int:
    """The vocabulary padded as Megatron pads it for this tensor-parallel size."""
    return padded_vocab_size(
        architecture.vocab_size, compute.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
