"""A decoder layer of either of two makes: Megatron-Core's modules with the norms and the core attention of ours, or
Transformer Engine's modules."""

from typing import TYPE_CHECKING

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_tw.model.attention import ContextParallelAttention
from megatron_tw.model.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from megatron_tw.model.families.base import Family

_NORMS: dict[str, type] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def norm_of(family: "Family", transformer_engine: bool) -> type:
    """The norm of a family's layers."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return _NORMS[family.megatron["normalization"]]


def decoder_layer(family: "Family", transformer_engine: bool) -> ModuleSpec:
    """x + attention(norm(x)), then x + mlp(norm(x)); queries and keys normed where the family says `qk_layernorm`."""
    qk_norm = bool(family.megatron.get("qk_layernorm"))
    if transformer_engine:
        from megatron_tw.model.te_attention import ShardedTEAttention

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        spec.submodules.self_attention.submodules.core_attention = ShardedTEAttention
        return spec
    norm = norm_of(family, transformer_engine)
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=family.megatron["normalization"])
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ContextParallelAttention
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec
