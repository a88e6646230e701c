"""Gradient of the output weight, summed over chunks of tokens, and Megatron's bookkeeping of it.

Shape suffixes: V true vocabulary entries of this rank, H hidden size, M tokens, B vocabulary entries of a tile.
"""

import functools

import torch
from torch import Tensor


def add_product_(sum_XY: Tensor, left_XK: Tensor, right_KY: Tensor) -> None:
    """sum += left @ right, for a sum in fp32 or better and factors in the sum's dtype or a lower one.

    On a GPU the factors stay in low precision and the GEMM writes fp32; elsewhere they are converted.
    """
    if left_XK.dtype == sum_XY.dtype:
        sum_XY.addmm_(left_XK, right_KY)
    elif left_XK.is_cuda and _gemm_adds_to_fp32(left_XK.dtype):
        torch.addmm(sum_XY, left_XK, right_KY, out_dtype=torch.float32, out=sum_XY)
    elif left_XK.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 on
        sum_XY.add_(torch.mm(left_XK, right_KY, out_dtype=torch.float32))
    else:
        sum_XY.addmm_(left_XK.to(sum_XY.dtype), right_KY.to(sum_XY.dtype))


@functools.cache
def _gemm_adds_to_fp32(dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of low precision to an fp32 sum in one GEMM; some refuse an fp32 sum."""
    factor, total = torch.ones(16, 16, dtype=dtype, device="cuda"), torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # TypeError: no such argument
        return False
    return bool((total == 17).all())


class WeightGradient:
    """Sums in fp32 or better; straight into Megatron's `main_grad`, where the weight has one in fp32."""

    def __init__(self, weight: Tensor, sum_dtype: torch.dtype) -> None:
        self._weight, self._sum_dtype = weight, sum_dtype
        # Set by Megatron's DistributedDataParallel. Its FSDP makes main_grad on demand: there, return the gradient.
        main_grad = getattr(weight, "main_grad", None)
        self._has_main_grad = hasattr(weight, "grad_added_to_main_grad") and main_grad is not None
        self._sum_VH: Tensor | None = None
        if self._has_main_grad and main_grad.dtype in (torch.float32, torch.float64):  # type: ignore[union-attr]
            self._sum_VH = main_grad

    def add(self, entries: slice, grad_MB: Tensor, hidden_MH: Tensor) -> None:
        """Adds the gradient of some vocabulary entries from the gradient of their logits."""
        if self._sum_VH is None:
            self._sum_VH = torch.zeros(self._weight.shape, dtype=self._sum_dtype, device=grad_MB.device)
        add_product_(self._sum_VH[entries], grad_MB.T, hidden_MH)

    def finish(self) -> Tensor:
        """The gradient for autograd; with `main_grad` a stand-in for Megatron's hooks, as its own layers return."""
        if not self._has_main_grad:
            return torch.zeros_like(self._weight) if self._sum_VH is None else self._sum_VH.to(self._weight.dtype)
        main_grad: Tensor = self._weight.main_grad  # type: ignore[attr-defined]
        if self._sum_VH is not None and self._sum_VH is not main_grad:
            main_grad.add_(self._sum_VH)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Megatron sets zero_out_wgrad on tied embeddings: there the stand-in is added to the embedding's gradient.
        tied = getattr(self._weight, "zero_out_wgrad", False)
        return torch.zeros_like(self._weight) if tied else torch.empty_like(self._weight)
