"""Recall of planted answers by their distance to the fact, beside the loss on all other text.

    FILE.npz    row [A]        the answer's row in the dataset
                position [A]   index in the row of the answer's first token, 1 or more
                tokens [A]     tokens of the answer
                distance [A]   tokens from the fact's value to the answer

An answer is recalled if each of its tokens is the model's first choice after the text before it (so greedy generation
would begin with it). A = answers; they are integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_tw.data.files import numpy_file
from megatron_tw.evaluation.compare import Difference, Measure, paired_difference, ratio_difference
from megatron_tw.evaluation.position import mean_nll
from megatron_tw.evaluation.report.intervals import wilson
from megatron_tw.evaluation.result import EvaluationResult

ARRAYS = ("row", "position", "tokens", "distance")


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Planted answers; see the file's head."""

    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    distance: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def load(file: Path) -> "Answers":
        """Raises ValueError where the file is missing, or is not what the file's head describes."""
        try:
            arrays = numpy_file(file.read_bytes(), file)
        except OSError as error:
            raise ValueError(f"--answers: {file}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"--answers: {error}") from error
        if not isinstance(arrays, dict) or any(name not in arrays for name in ARRAYS):
            raise ValueError(f"--answers: {file}: expected the arrays {', '.join(ARRAYS)}")
        for name in ARRAYS:
            array = arrays[name]
            if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != len(arrays["row"]):
                raise ValueError(
                    f"--answers: {file}: {name}: expected integers [{len(arrays['row'])}], "
                    f"got {array.dtype} {list(array.shape)}"
                )
        answers = Answers(**{name: arrays[name].astype(np.int64) for name in ARRAYS})
        if not len(answers):
            raise ValueError(f"--answers: {file}: holds no answer")
        for name, least in (("row", 0), ("position", 1), ("tokens", 1), ("distance", 1)):
            if (smallest := int(getattr(answers, name).min())) < least:
                raise ValueError(f"--answers: {file}: {name}: expected {least} or more, got {smallest}")
        return answers

    def within(self, result: EvaluationResult, file: Path) -> "Answers":
        """The answers in the rows that were evaluated, `row` then counting these; those with a masked target are left
        out.

        Raises:
            ValueError: the rows are packed, an answer ends beyond its row, or none is in the rows.
        """
        if result.header.packed:
            raise ValueError(f"--answers: {file}: expected an evaluation of rows of one document, got packed rows")
        if (end := int((self.position + self.tokens).max())) > result.header.seq_length:
            raise ValueError(
                f"--answers: {file}: an answer ends at {end} tokens, but rows have {result.header.seq_length}"
            )
        order = np.argsort(result.row_index)
        place = np.searchsorted(result.row_index, self.row, sorter=order)
        found = order[np.minimum(place, len(order) - 1)]
        there = result.row_index[found] == self.row
        if not there.any():
            raise ValueError(f"--answers: {file}: no answer is in the rows that were evaluated")
        inside = Answers(
            row=found[there], position=self.position[there], tokens=self.tokens[there], distance=self.distance[there]
        )
        counts = inside.recalled(result.valid)
        if not counts.any():
            raise ValueError(f"--answers: {file}: every answer has a target that the rows' loss_mask leaves out")
        return Answers(**{name: getattr(inside, name)[counts] for name in ARRAYS})

    def mask(self, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """[R, T]: the targets that are tokens of answers."""
        mask_RT = np.zeros(shape, bool)
        for row, position, tokens in zip(self.row, self.position, self.tokens, strict=True):
            mask_RT[row, position - 1 : position - 1 + tokens] = True
        return mask_RT

    def recalled(self, top1_RT: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """[A]: whether all tokens of the answer are first choices, or whatever else `top1_RT` says of targets."""
        spans = zip(self.row, self.position - 1, self.tokens, strict=True)
        return np.array([top1_RT[row, first : first + tokens].all() for row, first, tokens in spans])


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Of one model, on the answers with a distance of first .. last."""

    first: int
    last: int
    answers: int
    share: float | None
    """Recalled; None: the evaluation does not say which targets are first choices."""
    low: float | None
    high: float | None
    """Wilson's interval of 95%."""
    difference: Difference | None
    """Of the share, to the reference; above 0: better."""
    nll: float
    """Mean over the answers' tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelRecall:
    """Of one model."""

    name: str
    buckets: tuple[Recall, ...]
    """By distance; all have answers."""
    near: Recall | None
    """Distances below the old context; None: there are none, or no old context is known."""
    far: Recall | None
    """Distances of at least the old context."""
    all: Recall
    other: Measure
    """NLL on the targets that belong to no answer."""


@dataclass(frozen=True, kw_only=True)
class RecallComparison:
    """Several models on the same answers."""

    models: tuple[ModelRecall, ...]
    reference: str
    old_context: int | None
    answers: int


def compare_recall(
    results: Mapping[str, EvaluationResult], answers: Answers, *, reference: str, old_context: int | None
) -> RecallComparison:
    """The models' recall. The answers are those `within` the evaluations, which are of the same rows."""
    edges = distance_edges(answers.distance, old_context)
    whole = (1, edges[-1])
    base = results[reference]
    answer_RT = answers.mask(base.valid.shape)
    models = []
    for name, result in results.items():
        other_RT = result.valid & ~answer_RT

        def of(low: int, high: int, result: EvaluationResult = result, name: str = name) -> Recall | None:
            return _recall(result, None if name == reference else base, answers, low, high)

        every = of(*whole)
        assert every is not None
        models.append(
            ModelRecall(
                name=name,
                buckets=tuple(found for low, high in pairwise(edges) if (found := of(low, high)) is not None),
                near=None if old_context is None else of(1, old_context),
                far=None if old_context is None else of(old_context, max(whole[1], old_context)),
                all=every,
                other=Measure(
                    nll=mean_nll(result.long_nll, other_RT),
                    difference=None
                    if name == reference
                    else paired_difference(result.long_nll, base.long_nll, other_RT),
                ),
            )
        )
    return RecallComparison(models=tuple(models), reference=reference, old_context=old_context, answers=len(answers))


def distance_edges(distance_A: npt.NDArray[np.int64], old_context: int | None) -> tuple[int, ...]:
    """Powers of two around all distances, and the old context where it is among them. A bucket is
    edges[i] .. edges[i + 1] - 1.

    >>> distance_edges(np.array([20, 100, 300]), 96)
    (16, 32, 64, 96, 128, 256, 512)
    """
    low, high = int(distance_A.min()), int(distance_A.max())
    exponents = range(low.bit_length() - 1, high.bit_length() + 1)
    edges = {2**exponent for exponent in exponents}
    if old_context is not None and min(edges) < old_context < max(edges):
        edges.add(old_context)
    return tuple(sorted(edges))


def _recall(
    result: EvaluationResult, reference: EvaluationResult | None, answers: Answers, low: int, high: int
) -> Recall | None:
    """On the answers with low <= distance < high; None: there are none."""
    chosen_A = (answers.distance >= low) & (answers.distance < high)
    count = int(chosen_A.sum())
    if not count:
        return None
    subset = Answers(**{name: getattr(answers, name)[chosen_A] for name in ARRAYS})
    nll = mean_nll(result.long_nll, subset.mask(result.valid.shape))
    assert nll is not None
    hits_A = None if result.top1 is None else subset.recalled(result.top1)
    share = None if hits_A is None else float(hits_A.mean())
    bounds = (None, None) if share is None else wilson(share, count)
    difference = None
    if reference is not None and reference.top1 is not None and hits_A is not None:
        more_A = hits_A.astype(np.float64) - subset.recalled(reference.top1)
        rows = len(result.row_index)
        difference = ratio_difference(
            np.bincount(subset.row, more_A, minlength=rows).astype(np.float64), np.bincount(subset.row, minlength=rows)
        )
    return Recall(
        first=low, last=high - 1, answers=count, share=share, low=bounds[0], high=bounds[1], difference=difference,
        nll=nll,
    )  # fmt: skip
