"""Llama 2, 3, 3.1, 3.2 and what is built like them. (3.2: tied embeddings.)"""

from torch.nn.functional import silu

from megatron_tw.model.families.base import QUANTIZED, Family, Fixed, keys_of
from megatron_tw.model.families.layers import decoder_layer
from megatron_tw.model.families.table import Parameter

EMBEDDING = Parameter(
    ("embedding.word_embeddings.weight",), "vocabulary", {"model.embed_tokens.weight": ("vocabulary", "hidden")}
)
HEAD = Parameter(
    ("output_layer.weight",),
    "vocabulary",
    {"lm_head.weight": ("vocabulary", "hidden")},
    tied="model.embed_tokens.weight",
)
QKV = Parameter(
    ("decoder.layers.*.self_attention.linear_qkv.weight",),
    "qkv",
    {
        "model.layers.*.self_attn.q_proj.weight": ("queries", "hidden"),
        "model.layers.*.self_attn.k_proj.weight": ("keys", "hidden"),
        "model.layers.*.self_attn.v_proj.weight": ("keys", "hidden"),
    },
)
QKV_BIAS = Parameter(
    ("decoder.layers.*.self_attention.linear_qkv.bias",),
    "qkv",
    {
        "model.layers.*.self_attn.q_proj.bias": ("queries",),
        "model.layers.*.self_attn.k_proj.bias": ("keys",),
        "model.layers.*.self_attn.v_proj.bias": ("keys",),
    },
)
"""Of the families that have one; a Llama has none."""
TENSORS = (
    EMBEDDING,
    Parameter(
        (
            "decoder.layers.*.input_layernorm.weight",
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        ),
        "whole",
        {"model.layers.*.input_layernorm.weight": ("hidden",)},
    ),
    QKV,
    Parameter(
        ("decoder.layers.*.self_attention.linear_proj.weight",),
        "columns",
        {"model.layers.*.self_attn.o_proj.weight": ("hidden", "queries")},
    ),
    Parameter(
        ("decoder.layers.*.pre_mlp_layernorm.weight", "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"),
        "whole",
        {"model.layers.*.post_attention_layernorm.weight": ("hidden",)},
    ),
    Parameter(
        ("decoder.layers.*.mlp.linear_fc1.weight",),
        "rows",
        {
            "model.layers.*.mlp.gate_proj.weight": ("ffn", "hidden"),
            "model.layers.*.mlp.up_proj.weight": ("ffn", "hidden"),
        },
    ),
    Parameter(
        ("decoder.layers.*.mlp.linear_fc2.weight",),
        "columns",
        {"model.layers.*.mlp.down_proj.weight": ("hidden", "ffn")},
    ),
    Parameter(("decoder.final_layernorm.weight",), "whole", {"model.norm.weight": ("hidden",)}),
    HEAD,
)
MEGATRON = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": silu,
    "add_bias_linear": False,
}
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=keys_of(epsilon="rms_norm_eps", epsilon_default=1e-6, max_position_embeddings=2048),
    fixed={"hidden_act": Fixed("silu"), "attention_bias": Fixed(False), "mlp_bias": Fixed(False), **QUANTIZED},
    tensors=TENSORS,
    megatron=MEGATRON,
    layer=decoder_layer,
)
