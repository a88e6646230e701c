"""NLL by the position of the target, which is the number of tokens before it.

A model trained on rows of n tokens has seen targets at positions 1 .. n - 1: those lie within its old context, position
n and later beyond it. Sums are fp64, over all targets of all rows, and are divided once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_tw.objective.positions import position_edges

__all__ = ["PositionBucket", "beyond", "mean_nll", "nll_by_position", "position_edges"]


@dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """The targets at positions `first` .. `last`, inclusive."""

    first: int
    last: int
    targets: int
    nll: float | None
    """Mean over the targets; None: there are none."""


def mean_nll(nll_RT: npt.NDArray[np.floating], mask_RT: npt.NDArray[np.bool_]) -> float | None:
    """Mean NLL of the targets in the mask, None if there are none."""
    targets = int(mask_RT.sum())
    return float(nll_RT.sum(where=mask_RT, dtype=np.float64)) / targets if targets else None


def nll_by_position(
    nll_RT: npt.NDArray[np.floating],
    mask_RT: npt.NDArray[np.bool_],
    edges: Sequence[int],
    *,
    position_RT: npt.NDArray[np.integer] | None = None,
) -> tuple[PositionBucket, ...]:
    """The mean NLL of each bucket (see `position_edges`). position_RT: of the targets; None: column j is position
    j + 1."""
    assert edges[0] >= 1
    assert edges[-1] <= nll_RT.shape[1] + 1
    assert all(low < high for low, high in pairwise(edges))
    buckets = []
    for low, high in pairwise(edges):
        if position_RT is None:
            columns = slice(low - 1, high - 1)
            mask, some = mask_RT[:, columns], nll_RT[:, columns]
        else:
            mask, some = mask_RT & (position_RT >= low) & (position_RT < high), nll_RT
        nll = mean_nll(some, mask)
        buckets.append(PositionBucket(first=low, last=high - 1, targets=int(mask.sum()), nll=nll))
    return tuple(buckets)


def beyond(mask_RT: npt.NDArray[np.bool_], old_context: int) -> npt.NDArray[np.bool_]:
    """The targets of the mask at position `old_context` or later."""
    position_T = np.arange(1, mask_RT.shape[1] + 1)
    return mask_RT & (position_T >= old_context)
