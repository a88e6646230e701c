"""Layers for Megatron-LM's `--spec` with this project's core attention, which runs short windows on single ranks of the
context-parallel group:

    --spec megatron_tw.integrations.megatron_lm.spec llama_layer

Llama's layer (RMSNorm, gated MLP without biases); names of weights, and checkpoints, are Megatron's own: with
Transformer Engine, where it is installed, as its fused layers have them.
"""

from megatron_tw.model.families.layers import decoder_layer
from megatron_tw.model.families.llama import LLAMA
from megatron_tw.model.gpt import transformer_engine_available

llama_layer = decoder_layer(LLAMA, transformer_engine_available())
