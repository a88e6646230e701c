"""The passes over a tile of logits as one Triton kernel each; documented in logit_tiles.py, which imports this lazily.

One program for a row of the tile. Everything is computed in fp32, whatever the tile's dtype. Triton is optional, so the
first call imports it, as the global `tl` that its compiler looks up.

Shape suffixes: M tokens, B vocabulary entries of the tile.
"""

# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations  # of `tl`, which is imported late

import functools
from typing import Any

import torch
from torch import Tensor

COLUMNS = 2048  # of a row, in registers at a time
NUM_WARPS = 8


def add_statistics_(
    tile_MB: Tensor, label_M: Tensor, target_M: Tensor, max_M: Tensor, sum_M: Tensor, *, keep: bool
) -> None:
    num_rows, width = _check(tile_MB, label_M, target_M, max_M, sum_M)
    statistics_kernel, _ = _kernels()
    statistics_kernel[(num_rows,)](
        tile_MB, label_M, target_M, max_M, sum_M, width, KEEP=keep, BLOCK=_block(width), num_warps=NUM_WARPS
    )


def logit_gradient_(
    tile_MB: Tensor,
    label_M: Tensor,
    target_M: Tensor,
    lse_M: Tensor,
    softmax_scale_M: Tensor,
    label_scale_M: Tensor,
    shift_M: Tensor | None,
) -> None:
    vectors = (label_M, target_M, lse_M, softmax_scale_M, label_scale_M)
    num_rows, width = _check(tile_MB, *vectors)
    _, gradient_kernel = _kernels()
    gradient_kernel[(num_rows,)](
        tile_MB,
        *vectors,
        lse_M if shift_M is None else shift_M,
        width,
        HAS_SHIFT=shift_M is not None,
        BLOCK=_block(width),
        num_warps=NUM_WARPS,
    )


def _statistics_kernel(
    tile_ptr, label_ptr, target_ptr, max_ptr, sum_ptr, width, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * width
    label, target = tl.load(label_ptr + row), tl.load(target_ptr + row)
    maximum, total = tl.load(max_ptr + row), tl.load(sum_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        logits = tl.where(columns == label, target, logits)
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(logits - new_maximum), axis=0)
        maximum = new_maximum
    tl.store(max_ptr + row, maximum)
    tl.store(sum_ptr + row, total)
    if KEEP:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
            logits = tl.where(columns == label, target, logits)
            tl.store(row_ptr + columns, tl.exp(logits - maximum), mask=columns < width)


def _gradient_kernel(
    tile_ptr,
    label_ptr,
    target_ptr,
    lse_ptr,
    softmax_scale_ptr,
    label_scale_ptr,
    shift_ptr,
    width,
    HAS_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * width
    label, target, lse = tl.load(label_ptr + row), tl.load(target_ptr + row), tl.load(lse_ptr + row)
    softmax_scale, label_scale = tl.load(softmax_scale_ptr + row), tl.load(label_scale_ptr + row)
    at_label = tl.exp(target - lse) * softmax_scale - label_scale
    shift = tl.load(shift_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_SHIFT:  # noqa: SIM108 (a constant: only one of the two is compiled)
            gradient = values * (tl.exp(shift - lse) * softmax_scale)
        else:
            gradient = tl.exp(values - lse) * softmax_scale
        tl.store(row_ptr + columns, tl.where(columns == label, at_label, gradient), mask=columns < width)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Both kernels, compiled by Triton when first launched for a dtype."""
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_statistics_kernel), triton.jit(_gradient_kernel)


def _block(width: int) -> int:
    """Columns in registers at a time: a power of two, as Triton wants it."""
    return min(COLUMNS, 1 << (width - 1).bit_length())


def _check(tile_MB: Tensor, *vectors: Tensor) -> torch.Size:
    assert tile_MB.is_contiguous()
    assert all(vector_M.is_contiguous() and vector_M.shape == tile_MB.shape[:1] for vector_M in vectors)
    return tile_MB.shape
