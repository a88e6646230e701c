"""What weighting would make of an evaluation's scores: distributions, and the weights of a row.

The scores are those of the model as its own scorer (long NLL - short NLL), so the weights are those of a training step
at this model. Imports torch; a report without short NLLs does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_tw.evaluation.position import beyond
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.weighting import Scheme, token_weights
from megatron_tw.weighting.schedule import read_numbers
from megatron_tw.weighting.schemes import preset

DEFAULT = ("dense", "sparse")
TOP_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """How a scheme spreads a row's weight over its targets; a uniform one gives 1 to each."""

    name: str
    standard_deviation: float
    largest: float
    zero_share: float
    """Of the targets: those with no weight at all."""
    top_share: float
    """Of the weight: what the hundredth of the targets with the largest weights gets."""
    beyond_share: float | None
    """Of the weight: what targets beyond the old context get; None: no target is."""


def parse_weighting(texts: Sequence[str]) -> dict[str, Scheme]:
    """The schemes that texts `SCHEME NAME=NUMBER ...` name, as a stage of a schedule does, by these texts.

    Raises:
        ValueError: no such scheme or number.
    """
    found: dict[str, Scheme] = {}
    for given in texts:
        name, *pairs = given.split()
        try:
            numbers = read_numbers(pairs)
        except ValueError:
            raise ValueError(f"--weighting {given!r}: expected SCHEME NAME=NUMBER ..., each name once") from None
        try:
            scheme = preset(name, **numbers)
        except ValueError as error:
            raise ValueError(f"--weighting {given!r}: {error}".replace("`", "")) from None
        label = " ".join(given.split())
        if label in found:
            raise ValueError(f"--weighting: expected each scheme once, got {label} twice")
        found[label] = scheme
    return found


def weights_of(result: EvaluationResult, schemes: Mapping[str, Scheme]) -> dict[str, npt.NDArray[np.float32]]:
    """Weights [R, T] of all rows by the schemes' names. Raises ValueError for a scheme that is not for such rows."""
    assert result.short_nll is not None
    found = {}
    for name, scheme in schemes.items():
        if result.header.packed and not scheme.by_document:
            raise ValueError(
                f"--weighting {name!r}: takes whole rows, an evaluation of packed rows has their documents one by one"
            )
        try:
            scheme.check_rows(result.header.seq_length)
        except ValueError as error:
            raise ValueError(f"--weighting {name!r}: {error}".replace("`", "")) from None
        weights_RT = token_weights(
            torch.from_numpy(result.long_nll),
            torch.from_numpy(result.short_nll),
            scheme,
            valid=torch.from_numpy(result.valid),
            row_ids=torch.from_numpy(result.row_index),
        )
        found[name] = weights_RT.numpy()
    return found


def weight_figures(
    name: str, weights_RT: npt.NDArray[np.float32], valid_RT: npt.NDArray[np.bool_], old_context: int | None
) -> WeightFigures:
    """Over the valid targets of all rows; there is at least one."""
    weights = np.sort(weights_RT[valid_RT].astype(np.float64))[::-1]
    total = float(weights.sum())
    far = None if old_context is None else weights_RT.sum(where=beyond(valid_RT, old_context), dtype=np.float64)
    top = max(1, round(len(weights) * TOP_SHARE))
    return WeightFigures(
        name=name,
        standard_deviation=float(weights.std()),
        largest=float(weights[0]),
        zero_share=float((weights == 0).mean()),
        top_share=float(weights[:top].sum()) / total if total else 0.0,
        beyond_share=None if far is None else (float(far) / total if total else 0.0),
    )


def share_above(values: npt.NDArray[np.floating], points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The share of `values` that is larger than each of the points."""
    ordered = np.sort(values)
    return 1.0 - np.searchsorted(ordered, points, side="right") / max(1, len(ordered))
