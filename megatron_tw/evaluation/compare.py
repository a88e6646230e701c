"""Models side by side, on the same targets.

The measures of a model are means over the same sets of targets; the difference to a reference model comes with a
standard error, so that noise is not taken for progress.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tw.evaluation.key_tokens import KeyTokens, long_ppl
from megatron_tw.evaluation.position import PositionBucket, beyond, mean_nll, nll_by_position, position_edges
from megatron_tw.evaluation.result import EvaluationHeader, EvaluationResult

CLEAR = 2.0
"""Standard errors from which on a difference is called one, if enough rows tell of it."""
FEW_ROWS = 30
"""With fewer rows a standard error is too uncertain itself to call a difference clear."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean NLL of a model minus that of the reference on the same targets; below 0, the model is better."""

    mean: float
    standard_error: float | None
    """None: a single row holds all the targets."""
    rows: int
    """Rows with a target."""

    @property
    def is_clear(self) -> bool:
        """Whether it is more than CLEAR standard errors away from 0, and FEW_ROWS or more rows tell of it."""
        if self.standard_error is None or self.rows < FEW_ROWS:
            return False
        return abs(self.mean) > CLEAR * self.standard_error

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.mean:+.4f}{error}"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Mean NLL over one set of targets."""

    nll: float | None
    """None: the set is empty."""
    difference: Difference | None
    """To the reference; None: this is the reference, or the set is empty."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of a comparison."""

    name: str
    all: Measure
    within: Measure | None
    """Targets with less than the old context before them; None: no old context is known."""
    beyond: Measure | None
    """Targets with at least the old context before them."""
    key: Measure | None
    """None: no key tokens were chosen."""
    long_ppl: float | None
    buckets: tuple[PositionBucket, ...]
    bucket_differences: tuple[Difference | None, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models on the same rows."""

    models: tuple[ModelRow, ...]
    reference: str
    base: str | None
    """The model before the extension, if it is among them."""
    old_context: int | None
    """None: nothing says what it was."""
    key: KeyTokens | None
    """None: none were chosen."""
    rows: int
    targets: int
    seq_length: int

    def model(self, name: str) -> ModelRow:
        """The row of a model."""
        return next(row for row in self.models if row.name == name)


def compare(
    results: Mapping[str, EvaluationResult],
    key: KeyTokens | None = None,
    *,
    old_context: int | None = None,
    reference: str | None = None,
    base: str | None = None,
) -> Comparison:
    """Compare models on the same targets.

    Args:
        results: the evaluations by the models' names, in the order of the table.
        key: one fixed set for all of them; None: without.
        old_context: n, tokens of the context before the extension (None: the shortest that a model's evaluation
            names and that is shorter than the rows, else the short window of the key tokens or of an evaluation).
        reference: the model that the others are compared to (None: "uniform" if there is one, else the first).
        base: the model before the extension (None: "base" if there is one).

    Raises:
        ValueError: evaluations of different rows, lengths, tokenizers or masks; no such reference.
    """
    if not results:
        raise ValueError("--evaluations: expected at least one NAME=DIR")
    if reference is None:
        reference = "uniform" if "uniform" in results else next(iter(results))
    if base is None and "base" in results:
        base = "base"
    for option, name in (("--reference", reference), ("--base", base)):
        if name is not None and name not in results:
            raise ValueError(f"{option} {name}: expected one of {', '.join(results)}")
    key_name, source = (reference, results[reference]) if key is None else (key.name, key.source)
    for name, result in results.items():
        _check_same_targets(name, result, key_name, source)
    seq_length = source.header.seq_length
    if old_context is None:
        old_context = _old_context([source, *results.values()])
    elif not 1 < old_context < seq_length:
        raise ValueError(f"--old-context: expected 2 to {seq_length - 1} (below the rows' length), got {old_context}")
    models = tuple(
        _measure(name, result, None if name == reference else results[reference], key, old_context)
        for name, result in results.items()
    )
    return Comparison(
        models=models,
        reference=reference,
        base=base,
        old_context=old_context,
        key=key,
        rows=len(source.row_index),
        targets=int(source.valid.sum()),
        seq_length=seq_length,
    )


def _old_context(results: Sequence[EvaluationResult]) -> int | None:
    """The shortest context that an evaluation names, else the first short window, of those shorter than the rows."""
    headers = [result.header for result in results]
    named = sorted(header.old_context for header in headers if header.old_context is not None)
    windows = [header.short_window for header in headers if header.short_window is not None]
    return next((n for n in (*named, *windows) if 1 < n < headers[0].seq_length), None)


def paired_difference(
    nll_RT: npt.NDArray[np.floating], reference_nll_RT: npt.NDArray[np.floating], mask_RT: npt.NDArray[np.bool_]
) -> Difference | None:
    """Mean of nll - reference over the targets of the mask, with its standard error over rows; None: an empty mask.

    Targets of one row are not independent, so rows are the sampling units. With d_r the sum of differences in row r,
    m_r its targets and D = sum d_r / sum m_r, the standard error of that ratio is
    sqrt(R' / (R' - 1) * sum (d_r - D m_r)^2) / sum m_r over the R' rows with a target (Cochran, Sampling Techniques,
    section 6.4). Rows cut from one document resemble each other, so the true error is somewhat larger.
    """
    per_row_R = (nll_RT.astype(np.float64) - reference_nll_RT).sum(axis=1, where=mask_RT)
    return ratio_difference(per_row_R, mask_RT.sum(axis=1))


def ratio_difference(per_row_R: npt.NDArray[np.float64], targets_R: npt.NDArray[np.integer]) -> Difference | None:
    """`paired_difference` from each row's sum of differences and number of targets (or answers, or examples)."""
    targets, rows = int(targets_R.sum()), int((targets_R > 0).sum())
    if not targets:
        return None
    mean = float(per_row_R.sum()) / targets
    if rows == 1:
        return Difference(mean=mean, standard_error=None, rows=rows)
    residual = float(((per_row_R - mean * targets_R) ** 2).sum())
    standard_error = math.sqrt(rows / (rows - 1) * residual) / targets
    return Difference(mean=mean, standard_error=standard_error, rows=rows)


def _measure(
    name: str,
    result: EvaluationResult,
    reference: EvaluationResult | None,
    key: KeyTokens | None,
    old_context: int | None,
) -> ModelRow:
    def difference(mask_RT: npt.NDArray[np.bool_]) -> Difference | None:
        if reference is None:
            return None
        return paired_difference(result.long_nll, reference.long_nll, mask_RT)

    def measure(mask_RT: npt.NDArray[np.bool_]) -> Measure:
        return Measure(nll=mean_nll(result.long_nll, mask_RT), difference=difference(mask_RT))

    beyond_RT = None if old_context is None else beyond(result.valid, old_context)
    edges = position_edges(result.header.seq_length, old_context=old_context)
    buckets = nll_by_position(result.long_nll, result.valid, edges)
    masks = (beyond(result.valid, bucket.first) & ~beyond(result.valid, bucket.last + 1) for bucket in buckets)
    return ModelRow(
        name=name,
        all=measure(result.valid),
        within=None if beyond_RT is None else measure(result.valid & ~beyond_RT),
        beyond=None if beyond_RT is None else measure(beyond_RT),
        key=None if key is None else measure(key.mask),
        long_ppl=None if key is None else long_ppl(result.long_nll, key.mask),
        buckets=buckets,
        bucket_differences=tuple(difference(mask_RT) for mask_RT in masks),
    )


def check_same_rows(
    name: str, header: EvaluationHeader, num_rows: int, key_name: str, key_source: EvaluationResult
) -> None:
    """Raises ValueError, saying what differs, unless an evaluation with this header is of the rows of another."""
    theirs = key_source.header
    for what, ours_value, theirs_value in (
        ("longest document" if header.packed else "--seq-length", header.seq_length, theirs.seq_length),
        ("tokenizer fingerprint", header.tokenizer_fingerprint, theirs.tokenizer_fingerprint),
        ("data fingerprint", header.data_fingerprint, theirs.data_fingerprint),
        ("number of rows", num_rows, len(key_source.row_index)),
    ):
        if ours_value != theirs_value:
            raise ValueError(
                f"{name} and {key_name} were not evaluated on the same targets: {what} {ours_value} and {theirs_value}"
            )


def _check_same_targets(name: str, result: EvaluationResult, key_name: str, key_source: EvaluationResult) -> None:
    """Raises ValueError, saying what differs, unless both are of the same targets."""
    check_same_rows(name, result.header, len(result.row_index), key_name, key_source)
    for what, same in (
        ("the rows chosen", np.array_equal(result.row_index, key_source.row_index)),
        ("the masks of valid targets", np.array_equal(result.valid, key_source.valid)),
    ):
        if not same:
            raise ValueError(f"{name} and {key_name} were not evaluated on the same targets: {what} differ")
