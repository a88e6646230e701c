"""Phi-1, 1.5 and 2 (`model_type` phi): one LayerNorm before attention and MLP, which stand side by side; part of each
head is rotated; biases everywhere, the output projection's too. No dropout, whatever config.json says."""

from typing import Any

from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import gelu

from megatron_tw.model.families.base import QUANTIZED, Family, Fixed, keys_of
from megatron_tw.model.families.layers import decoder_layer, norm_of
from megatron_tw.model.families.llama import EMBEDDING, HEAD, QKV, QKV_BIAS
from megatron_tw.model.families.table import Parameter
from megatron_tw.model.sequence import SequenceShard


def gelu_new(x: Tensor) -> Tensor:
    """GELU by tanh. (Megatron-Core takes plain F.gelu for either form, as its fusions are on or off.)"""
    return gelu(x, approximate="tanh")


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm(x)), of Megatron-Core's modules."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceShard | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        normed = self.input_layernorm(hidden_states)
        attention, attention_bias = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        mlp = checkpoint(self._mlp, False, normed) if self.recompute_mlp else self._mlp(normed)
        return hidden_states + (attention + attention_bias) + mlp, None

    def _mlp(self, normed: Tensor) -> Tensor:
        """With its bias: a parameter that a checkpointed function returns would become a node of its own graph."""
        mlp, mlp_bias = self.mlp(normed)
        return mlp + mlp_bias


def parallel_layer(family: Family, transformer_engine: bool) -> ModuleSpec:
    """The layer with its norm by itself: Transformer Engine's linear layers with a norm inside would make it twice."""
    spec = decoder_layer(family, transformer_engine)
    spec.module = ParallelLayer
    parts = spec.submodules
    parts.input_layernorm, parts.pre_mlp_layernorm = norm_of(family, transformer_engine), IdentityOp
    parts.sharded_state_dict_keys_map = {}
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return spec


PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    keys=keys_of(epsilon="layer_norm_eps", epsilon_default=1e-5, max_position_embeddings=2048),
    fixed={"hidden_act": Fixed("gelu_new"), "qk_layernorm": Fixed(False), **QUANTIZED},
    tensors=(
        EMBEDDING,
        Parameter(
            ("decoder.layers.*.input_layernorm.weight",),
            "whole",
            {"model.layers.*.input_layernorm.weight": ("hidden",)},
        ),
        Parameter(
            ("decoder.layers.*.input_layernorm.bias",), "whole", {"model.layers.*.input_layernorm.bias": ("hidden",)}
        ),
        QKV,
        QKV_BIAS,
        Parameter(
            ("decoder.layers.*.self_attention.linear_proj.weight",),
            "columns",
            {"model.layers.*.self_attn.dense.weight": ("hidden", "queries")},
        ),
        Parameter(
            ("decoder.layers.*.self_attention.linear_proj.bias",),
            "whole",
            {"model.layers.*.self_attn.dense.bias": ("hidden",)},
        ),
        Parameter(
            ("decoder.layers.*.mlp.linear_fc1.weight",), "rows", {"model.layers.*.mlp.fc1.weight": ("ffn", "hidden")}
        ),
        Parameter(("decoder.layers.*.mlp.linear_fc1.bias",), "rows", {"model.layers.*.mlp.fc1.bias": ("ffn",)}),
        Parameter(
            ("decoder.layers.*.mlp.linear_fc2.weight",), "columns", {"model.layers.*.mlp.fc2.weight": ("hidden", "ffn")}
        ),
        Parameter(("decoder.layers.*.mlp.linear_fc2.bias",), "whole", {"model.layers.*.mlp.fc2.bias": ("hidden",)}),
        Parameter(("decoder.final_layernorm.weight",), "whole", {"model.final_layernorm.weight": ("hidden",)}),
        Parameter(("decoder.final_layernorm.bias",), "whole", {"model.final_layernorm.bias": ("hidden",)}),
        HEAD,
        Parameter(("output_layer.bias",), "vocabulary", {"lm_head.bias": ("vocabulary",)}),
    ),
    megatron={
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": gelu_new,
        "add_bias_linear": True,
    },
    layer=parallel_layer,
    partial_rotary=0.5,
    fused_activation=False,
)
