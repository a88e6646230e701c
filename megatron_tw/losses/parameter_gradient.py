"""Gradient of the output weight or bias, summed over chunks of tokens, and Megatron's bookkeeping of it."""

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


class ParameterGradient:
    """Sums in fp32 or better; straight into Megatron's `main_grad`, where the parameter has one in fp32."""

    def __init__(self, parameter: Tensor, sum_dtype: torch.dtype) -> None:
        self._parameter, self._sum_dtype = parameter, sum_dtype
        # Set by Megatron's DistributedDataParallel. Its FSDP makes main_grad on demand: there, return the gradient.
        main_grad = getattr(parameter, "main_grad", None)
        self._has_main_grad = hasattr(parameter, "grad_added_to_main_grad") and main_grad is not None
        self._sum: Tensor | None = None
        if self._has_main_grad and main_grad.dtype in (torch.float32, torch.float64):  # type: ignore[union-attr]
            self._sum = main_grad

    def entries(self, entries: slice) -> Tensor:
        """The sum so far of some vocabulary entries, to be added to: [entries] or [entries, hidden]."""
        if self._sum is None:
            self._sum = torch.zeros(self._parameter.shape, dtype=self._sum_dtype, device=self._parameter.device)
        return self._sum[entries]

    def finish(self) -> Tensor:
        """The gradient for autograd; with `main_grad` a stand-in for Megatron's hooks, as its own layers return."""
        if not self._has_main_grad:
            return torch.zeros_like(self._parameter) if self._sum is None else self._sum.to(self._parameter.dtype)
        main_grad: Tensor = self._parameter.main_grad  # type: ignore[attr-defined]
        if self._sum is not None and self._sum is not main_grad:
            main_grad.add_(self._sum)
        self._parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Megatron sets zero_out_wgrad on tied embeddings: there the stand-in is added to the embedding's gradient.
        tied = getattr(self._parameter, "zero_out_wgrad", False)
        return torch.zeros_like(self._parameter) if tied else torch.empty_like(self._parameter)
