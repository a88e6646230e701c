"""Norms for the layer spec without Transformer Engine. S = tokens, H = what is normalized.

Under sequence parallelism each tensor-parallel rank normalizes its own tokens, so the weights are marked for Megatron's
all-reduce of such gradients (its own torch norms refuse sequence parallelism instead).
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, computed in fp32, in the order of transformers' LlamaRMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNormFunction.apply(x, self.weight, self.epsilon)
        return out


class _RMSNormFunction(torch.autograd.Function):
    """For backward only the input is kept, in its own precision, and one number a token: autograd would keep the input
    in fp32 and its normed values besides."""

    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        wide_SH = x_SH.float()
        inverse_S1 = torch.rsqrt(wide_SH.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x_SH, weight_H, inverse_S1)
        return weight_H * (wide_SH * inverse_S1).to(x_SH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms(x): dw = sum over tokens of g * n, dx = (w * g - n * mean(w * g * n)) / rms(x)."""
        x_SH, weight_H, inverse_S1 = ctx.saved_tensors
        normed_SH = x_SH.float() * inverse_S1
        grad_weight_H = (grad_SH * normed_SH.to(x_SH.dtype)).sum(tuple(range(grad_SH.dim() - 1)))
        grad_normed_SH = (grad_SH * weight_H).float()
        share_S1 = (grad_normed_SH * normed_SH).mean(-1, keepdim=True)
        return (inverse_S1 * (grad_normed_SH - normed_SH * share_S1)).to(x_SH.dtype), grad_weight_H, None


class LayerNorm(torch.nn.LayerNorm):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
