"""What a Hugging Face config.json says of a model, and the Megatron-Core configuration that follows."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tw.config import (
    ActivationConfig,
    ComputeConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    check_model_shape,
    padded_vocab_size,
)
from megatron_tw.model.families import Family, family_of
from megatron_tw.model.kernels import Parts, kernel_fields
from megatron_tw.model.rotary import (
    Origin,
    multiply_cos_and_sin,
    origin_entry,
    read_origin,
    read_rope,
    rotary_embedding,
    scaling_factor,
    stretch_rope,
)

LARGEST_DEPTH = 10**4
"""Layers; beyond it, a damaged file."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of a model, as plain numbers. `hf_config` keeps config.json whole, for export.

    rope: transformers' `rope_parameters` (rope_type, rope_theta and what the type needs). origin: what the model was
    before its context was stretched. dtype: of the checkpoint's tensors, as config.json names it. source: the file's
    name, for errors.
    """

    family: Family
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
    origin: Origin
    dtype: torch.dtype
    hf_config: dict[str, Any]
    source: str

    @property
    def rotary_base(self) -> float:
        """rope_theta: the base of the rotary frequencies."""
        return float(self.rope["rope_theta"])

    @property
    def rope_in_words(self) -> str:
        """Base, and scaling where there is one."""
        scaling = "" if self.rope["rope_type"] == "default" else f", {self.rope['rope_type']} {self.rope['factor']:g}x"
        return f"rotary base {self.rotary_base:g}{scaling}"

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    def with_rotary_base(self, rotary_base: float | None) -> "Architecture":
        """The same model with another rotary base; None keeps the checkpoint's."""
        return self.with_rope(ModelConfig(rotary_base=rotary_base), None)

    def with_rope(self, model: ModelConfig, length: int | None) -> "Architecture":
        """The same model with the rope that the options ask for, for a context of `length` tokens.

        Raises:
            ValueError: --rope-scaling-type whose factor nobody gives; see `stretch_rope`.
        """
        rope, origin = stretch_rope(self.rope, self.origin, self.rotary_dim, model, length)
        return replace(self, rope=rope, origin=origin)

    def rope_options(self, model: ModelConfig, length: int | None) -> ModelConfig:
        """`model`, by which this architecture came about, with its null options filled in: given again, they come to
        the same."""
        if model.rope_scaling_type in (None, "none"):
            return replace(model, rotary_base=self.origin.rope_theta if model.rope_scaling_type else self.rotary_base)
        factor = scaling_factor(self.origin, model, length)
        return replace(model, rotary_base=self.origin.rope_theta, rope_scaling_factor=factor)

    def check_length(self, tokens: int, option: str) -> None:
        """Refuse sequences that are longer than what a token sees, which no attention here cuts off.

        Raises:
            ValueError: names the option and both lengths.
        """
        span = self.family.attention_span(self.hf_config, self.source)
        if span is not None and tokens > span:
            raise ValueError(
                f"{option}: expected at most {span}, the sliding_window of {self.source}, got {tokens} tokens; with a "
                "null there, every token sees all before it"
            )


def read_architecture(directory: str | Path) -> Architecture:
    """Read `directory`/config.json, as transformers 4 or 5 wrote it.

    Raises:
        ValueError: no such file, not JSON, of no known family, with a feature that the model here does not have, or
        with a value of another type or range; the message names the file and the key.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; expected a Hugging Face checkpoint folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    return parse_architecture(raw, str(path))


def parse_architecture(raw: dict[str, Any], source: str) -> Architecture:
    """The same from a parsed config.json; `source` names it in errors."""
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(raw).__name__}")
    family = family_of(raw, source)
    for name, fixed in family.fixed.items():
        fixed.check(name, raw, source)
    values = {key.field: key.read(name, raw, source) for name, key in family.keys.items()}
    if values["num_layers"] > LARGEST_DEPTH:  # of each of which the tensors are listed
        raise ValueError(f"{source}: num_hidden_layers: expected at most {LARGEST_DEPTH}, got {values['num_layers']}")
    heads = values["num_attention_heads"]
    values["num_query_groups"] = groups = values["num_query_groups"] or heads
    if heads % groups:
        raise ValueError(f"{source}: num_key_value_heads: expected a divisor of {heads} attention heads, got {groups}")
    if values["head_dim"] is None:
        values["head_dim"], rest = divmod(values["hidden_size"], heads)
        if rest:
            raise ValueError(
                f"{source}: num_attention_heads: expected a divisor of hidden_size {values['hidden_size']}, got {heads}"
            )
    dtype_name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise ValueError(f"{source}: dtype: expected one of {', '.join(_DTYPES)}, got {dtype_name!r}")
    family.attention_span(raw, source)
    rope = read_rope(raw, family, values["max_position_embeddings"], source)
    architecture = Architecture(
        family=family,
        bos_token_id=_bos_token_id(raw, source),
        rope=rope,
        origin=read_origin(raw, rope, values["max_position_embeddings"], source),
        dtype=_DTYPES[dtype_name],
        hf_config=raw,
        source=source,
        **values,
    )
    if architecture.rotary_dim < 2 or architecture.rotary_dim % 2:
        raise ValueError(
            f"{source}: expected an even number of rotated dimensions in a head of {architecture.head_dim}, got "
            f"{architecture.rotary_dim}"
        )
    return architecture


def _bos_token_id(raw: dict[str, Any], source: str) -> int | None:
    """The id of BOS: the first of them where there are several."""
    bos = raw.get("bos_token_id")
    first = bos[0] if isinstance(bos, list) and bos else bos
    if first is not None and (not isinstance(first, int) or isinstance(first, bool) or first < 0):
        raise ValueError(f"{source}: bos_token_id: expected an id, a list of ids or null, got {bos!r}")
    return first


def export_hf_config(architecture: Architecture, *, max_position_embeddings: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for export: rotary base, scaling, length and dtype as the model now has them, readable by
    transformers 4 and 5; and `extended_from`, which is for a next stage of ours.

    max_position_embeddings: the new context length in tokens; never written smaller than the model's own.
    """
    config = {key: value for key, value in architecture.hf_config.items() if key != "extended_from"}
    rope, length = dict(architecture.rope), max(max_position_embeddings, architecture.max_position_embeddings)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    dtype_name = {value: key for key, value in _DTYPES.items()}[dtype]
    config.update(
        architectures=[architecture.family.architecture],
        max_position_embeddings=length,
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else scaling,
        dtype=dtype_name,
        torch_dtype=dtype_name,
        **origin_entry(rope, architecture.origin, length),
    )
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return config


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    activations: ActivationConfig,
    *,
    on_gpu: bool,
    num_model_chunks: int | None,
    kernels: KernelConfig | None = None,
    parts: Parts | None = None,
) -> TransformerConfig:
    """Megatron-Core's configuration of this model under this run's parallelism and precision.

    kernels, parts: asked for, and here; None: nothing.

    Raises:
        ValueError: heads, layers or groups do not divide as the layout asks, or `kernels` asks for what is not here.
    """
    factor = rotary_embedding(architecture).attention_factor
    check_model_shape(
        parallel,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
    )
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_epsilon,
        **architecture.family.megatron,
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
        # tensor-parallel only while it initializes them, and counts the unmarked ones just once in the gradient norm.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        recompute_granularity=activations.recompute_granularity,
        recompute_method=activations.recompute_method,
        recompute_num_layers=activations.recompute_num_layers,
        recompute_modules=list(activations.recompute_modules) if activations.recompute_modules else None,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **kernel_fields(
            kernels or KernelConfig(),
            parts or Parts(),
            swiglu=bool(architecture.family.megatron["gated_linear_unit"]),
            fused_activation=architecture.family.fused_activation,
            rotary_factor=factor,
        ),
        # An interleaved pipeline sends and receives while it computes; the batched calls of the others do not overlap.
        batch_p2p_comm=on_gpu and num_model_chunks is None,
        overlap_p2p_comm=on_gpu and num_model_chunks is not None,
        deallocate_pipeline_outputs=True,
    )
    multiply_cos_and_sin(config, factor)
    return config


def _leave_unfilled(weight: Tensor) -> Tensor:
    return weight


def megatron_vocab_size(architecture: Architecture, parallel: ParallelConfig, compute: ComputeConfig) -> int:
    """The vocabulary padded as Megatron pads it for this tensor-parallel size."""
    return padded_vocab_size(
        architecture.vocab_size, compute.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
