"""RMSNorm's own backward pass is that of its formula, and keeps no more than the input."""

import pytest
import torch
from torch import Tensor

from megatron_tw.model.norm import _RMSNormFunction

EPSILON = 1e-5


def formula(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm computes it, left to autograd."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_formulas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(7, 3, 96), 1 + torch.randn(96), torch.randn(7, 3, 96)
    results = []
    for function in (formula, lambda x, weight: _RMSNormFunction.apply(x, weight, EPSILON)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    (out, *expected), (ours, *gradients) = results
    assert torch.equal(out, ours)
    # The sums are made in another order; in bf16 a result is rounded once more or less.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)


def test_only_the_input_is_kept() -> None:
    x, weight = torch.randn(7, 96, dtype=torch.bfloat16).requires_grad_(), torch.ones(96, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _RMSNormFunction.apply(x, weight, EPSILON)
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [
        (torch.bfloat16, 7 * 96), (torch.bfloat16, 96), (torch.float32, 7)
    ]  # fmt: skip
