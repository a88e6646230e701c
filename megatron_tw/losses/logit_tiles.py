"""What is done to the logits of one tile (some tokens x some vocabulary entries): plain PyTorch, on any device.

The reference for, and the fallback of, the fused kernels in triton_tiles.py, which have the same two functions.

Shape suffixes: M tokens, B vocabulary entries of the tile.
"""

import functools
import importlib.util
import subprocess
import warnings
from typing import Protocol

import torch
from torch import Tensor


class TileOperations(Protocol):
    """The two passes over a tile, in place. Tensors of M numbers are fp32 or better, `label_M` is int64."""

    def add_statistics_(
        self, tile_MB: Tensor, label_M: Tensor, target_M: Tensor, max_M: Tensor, sum_M: Tensor, *, keep: bool
    ) -> None:
        """Takes a tile of logits into the running maximum and sum of exp(logit - maximum).

        Args:
            tile_MB: logits; overwritten, with `keep` by their exp(logit - max_M), as the maximum then is.
            label_M: column of each token's label in this tile; outside 0 to B - 1: it is not here.
            target_M: exact logit of the label, which replaces the one in the tile.
            max_M: maximum of the tiles so far (-inf: none); updated.
            sum_M: sum of exp(logit - max_M) of the tiles so far; updated.
        """
        ...

    def logit_gradient_(
        self,
        tile_MB: Tensor,
        label_M: Tensor,
        target_M: Tensor,
        lse_M: Tensor,
        softmax_scale_M: Tensor,
        label_scale_M: Tensor,
        shift_M: Tensor | None,
    ) -> None:
        """Turns a tile into softmax_scale * softmax - label_scale * one_hot(label).

        Args:
            tile_MB: logits, or with `shift_M` their exp(logit - shift_M), as `add_statistics_` kept them.
            label_M, target_M: as there.
            lse_M: log-sum-exp of the whole row; +inf for a row that has no gradient.
        """
        ...


def tile_operations(device: torch.device, sum_dtype: torch.dtype) -> TileOperations:
    """The fused kernels on a GPU with Triton (they compute in fp32), else this module."""
    if device.type == "cuda" and sum_dtype == torch.float32 and kernels_compile(device):
        from megatron_tw.losses import triton_tiles

        return triton_tiles
    return PLAIN


@functools.cache
def kernels_compile(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for `device`, which takes a C compiler and Python's headers: tried once,
    on a tile of two logits. Where it is installed and does not compile, one warning says why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from megatron_tw.losses import triton_tiles

        tile_MB, target_M = torch.zeros(1, 2, device=device), torch.zeros(1, device=device)
        label_M, max_M = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), -torch.inf, device=device)
        sum_M = torch.zeros(1, device=device)
        triton_tiles.add_statistics_(tile_MB, label_M, target_M, max_M, sum_M, keep=False)
    except _CANNOT_COMPILE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton's kernels cannot be compiled here ({reason}): loss and layers go without; a C compiler and "
            "Python's headers (python3-dev) may be missing",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


_CANNOT_COMPILE = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
"""What Triton raises without a compiler (RuntimeError), with one that fails, as it does without headers
(CalledProcessError), and with libraries that are not there."""


class _PlainTiles:
    def add_statistics_(
        self, tile_MB: Tensor, label_M: Tensor, target_M: Tensor, max_M: Tensor, sum_M: Tensor, *, keep: bool
    ) -> None:
        work_MB = tile_MB.to(sum_M.dtype)  # the tile itself, unless it is in low precision
        _set_label_(work_MB, label_M, target_M)
        new_max_M = torch.maximum(max_M, work_MB.amax(dim=1))
        work_MB.sub_(new_max_M[:, None]).exp_()
        sum_M.mul_((max_M - new_max_M).exp_()).add_(work_MB.sum(dim=1))
        max_M.copy_(new_max_M)
        if keep and work_MB is not tile_MB:
            tile_MB.copy_(work_MB)

    def logit_gradient_(
        self,
        tile_MB: Tensor,
        label_M: Tensor,
        target_M: Tensor,
        lse_M: Tensor,
        softmax_scale_M: Tensor,
        label_scale_M: Tensor,
        shift_M: Tensor | None,
    ) -> None:
        work_MB = tile_MB.to(lse_M.dtype)
        if shift_M is None:
            work_MB.sub_(lse_M[:, None]).exp_().mul_(softmax_scale_M[:, None])
        else:
            work_MB.mul_(((shift_M - lse_M).exp_() * softmax_scale_M)[:, None])
        _set_label_(work_MB, label_M, (target_M - lse_M).exp_() * softmax_scale_M - label_scale_M)
        if work_MB is not tile_MB:
            tile_MB.copy_(work_MB)


PLAIN = _PlainTiles()


def _set_label_(tile_MB: Tensor, label_M: Tensor, value_M: Tensor) -> None:
    """Writes a value for each token into its label's column, where that is in this tile."""
    here_M = (label_M >= 0) & (label_M < tile_MB.shape[1])
    column_M1 = torch.where(here_M, label_M, 0)[:, None]
    tile_MB.scatter_(1, column_M1, torch.where(here_M[:, None], value_M[:, None], tile_MB.gather(1, column_M1)))
