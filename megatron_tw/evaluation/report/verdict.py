"""What came out, in sentences: a difference is called one only beyond its uncertainty."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_tw.evaluation.compare import FEW_ROWS, Comparison, Difference
from megatron_tw.evaluation.report.benchmarks import (
    LONG_SUITES,
    RULER_TASKS,
    SHORT_SUITES,
    RulerTable,
    Score,
    average,
    ruler_difference,
    ruler_tables,
    suite_scores,
)
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.recall import ModelRecall, RecallComparison
from megatron_tw.evaluation.table import NO_KEY_TOKENS, judged

Kind = Literal["better", "worse", "unclear", "fact"]
WORDS = {"better": "better", "worse": "worse", "unclear": "no clear difference", "fact": ""}
NAMES = {"mmlu": "MMLU", "bbh": "BBH", "longbench": "LongBench", "longbench2": "LongBench v2", "ruler": "RULER"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, and which way it goes."""

    kind: Kind
    text: str


def verdicts_of(shown: Shown) -> list[Verdict]:
    """What matters most first: recall, RULER, loss, short-context skill."""
    found: list[Verdict] = []
    if shown.recall is not None:
        found += _of_recall(shown.recall)
    for table in ruler_tables(shown.evaluations.records):
        found += _of_ruler(shown, table)
    if shown.comparison is not None:
        found += _of_loss(shown.comparison)
    for suite in (*LONG_SUITES, *SHORT_SUITES):
        found += _of_suite(shown, suite)
    return found


def _of_recall(recall: RecallComparison) -> list[Verdict]:
    found = []
    reference = next(model for model in recall.models if model.name == recall.reference)
    far = recall.old_context is not None and all(model.far is not None for model in recall.models)
    what = f"of the answers whose fact stands {recall.old_context:,} or more tokens back" if far else "of the answers"
    chosen = {model.name: (model.far if far else model.all) for model in recall.models}
    theirs = chosen[reference.name]
    assert theirs is not None
    if theirs.share is None:
        return []
    for model in recall.models:
        ours = chosen[model.name]
        if model is reference or ours is None or ours.share is None or ours.difference is None:
            continue
        text = (
            f"{model.name} recalls {_percent(ours.share)} {what}, {reference.name} {_percent(theirs.share)}: "
            f"{_points(ours.difference)}{_clarity(ours.difference)}. {_other_text(model, reference.name)}"
        )
        found.append(Verdict(kind=_kind(ours.difference, higher_is_better=True), text=text))
    return found


def _other_text(model: ModelRecall, reference: str) -> str:
    difference = model.other.difference
    if difference is None:
        return ""
    return f"On all other text it {judged(difference, reference)}: NLL {difference}."


def _of_ruler(shown: Shown, table: RulerTable) -> list[Verdict]:
    if len(table.models) < 2:
        return []
    reference = shown.reference_among(table.models)
    theirs = average(table, reference)
    found = []
    for model in table.models:
        ours = average(table, model)
        if model == reference or ours is None or theirs is None:
            continue
        difference = ruler_difference(shown.evaluations.samples, table, model, reference)
        if difference is None:
            samples = sum(record.samples for (name, _, _), record in table.cells.items() if name == model)
            difference = _unpaired(ours, theirs, samples)
        text = (
            f"{model} scores {100 * ours.value:.1f} on RULER ({table.metric.replace('_', ' ')}, average over "
            f"{ours.tasks} of {RULER_TASKS} tasks), {reference} {100 * theirs.value:.1f}: "
            f"{_points(difference)}{_clarity(difference)}."
        )
        found.append(Verdict(kind=_kind(difference, higher_is_better=True), text=text))
    return found


def _of_suite(shown: Shown, suite: str) -> list[Verdict]:
    scores = suite_scores(shown.evaluations.records, suite)
    if len(scores) < 2:
        return []
    reference = shown.reference_among(list(scores))
    found = []
    for model, ours in scores.items():
        if model == reference:
            continue
        theirs = scores[reference]
        difference = _unpaired(ours, theirs, FEW_ROWS)
        text = (
            f"{model} scores {100 * ours.value:.1f} on {NAMES[suite]}, {reference} {100 * theirs.value:.1f}: "
            f"{_points(difference)}{_clarity(difference)}."
        )
        found.append(Verdict(kind=_kind(difference, higher_is_better=True), text=text))
    return found


def _of_loss(comparison: Comparison) -> list[Verdict]:
    reference = comparison.reference
    found = []
    known = [model for model in comparison.models if model.all.nll is not None]
    if len(known) > 1:
        best = min(known, key=lambda model: model.all.nll or 0.0)
        found.append(
            Verdict(kind="fact", text=f"Lowest NLL over all held-out targets: {best.name}, {best.all.nll:.4f} nats.")
        )
    if comparison.key is not None and not comparison.key.count:
        found.append(Verdict(kind="fact", text=NO_KEY_TOKENS))
    for model in comparison.models:
        difference = model.all.difference
        if model.name == reference or difference is None:
            continue
        text = f"{model.name} {judged(difference, reference)} over all targets: NLL {difference}"
        if model.key is not None and model.key.difference is not None:
            text += f"; it {judged(model.key.difference, reference)} on the key tokens: NLL {model.key.difference}"
        found.append(Verdict(kind=_kind(difference, higher_is_better=False), text=f"{text}."))
    return found


def _unpaired(ours: Score, theirs: Score, samples: int) -> Difference:
    error = None
    if ours.stderr is not None and theirs.stderr is not None:
        error = math.hypot(ours.stderr, theirs.stderr)
    return Difference(mean=ours.value - theirs.value, standard_error=error, rows=samples)


def _kind(difference: Difference, *, higher_is_better: bool) -> Kind:
    if not difference.is_clear:
        return "unclear"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def _clarity(difference: Difference) -> str:
    if difference.is_clear:
        return ""
    if difference.standard_error is None:
        return ", of unknown uncertainty: no clear difference"
    few = f" (only {difference.rows} rows or examples)" if difference.rows < FEW_ROWS else ""
    return f", no clear difference{few}"


def _points(difference: Difference) -> str:
    error = "" if difference.standard_error is None else f" ± {100 * difference.standard_error:.1f}"
    return f"{100 * difference.mean:+.1f}{error} points"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
