"""What came out, in sentences: a difference is called one only beyond its uncertainty.

Each measure has a reference model and a difference of every other one to it. The headline puts together one measure of
long context and one of what it costs, which are the first that were evaluated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tw.evaluation.compare import CLEAR, FEW_ROWS, Comparison, Difference, Measure
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
from megatron_tw.evaluation.report.recall import RecallComparison

Kind = Literal["better", "worse", "unclear", "fact"]
NO_KEY_TOKENS = "No target is a key token, so nothing can be said about long-range prediction."
WORDS = {"better": "better", "worse": "worse", "unclear": "no clear difference", "fact": ""}
NAMES = {"mmlu": "MMLU", "bbh": "BBH", "longbench": "LongBench", "longbench2": "LongBench v2", "ruler": "RULER",
         "longppl": "LongPPL"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, what it is about, and which way it goes."""

    about: str
    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measure of all models, and the sentences on it. Differences are to the reference, by the others' names."""

    about: str
    phrase: str
    """What follows "better than uniform", in the headline."""
    reference: str
    fact: str
    """Of the reference."""
    differences: Mapping[str, Difference]
    higher_is_better: bool
    values: Mapping[str, str]
    """Each other model's figure, in words; "": the difference says it."""
    unit: Literal["points", "nats"]

    def kind(self, model: str) -> Kind:
        difference = self.differences[model]
        if not difference.is_clear:
            return "unclear"
        return "better" if (difference.mean > 0) == self.higher_is_better else "worse"

    def verdicts(self) -> list[Verdict]:
        """A sentence for each model with a clear difference, and one for all others."""
        found = [Verdict(about=self.about, kind="fact", text=self.fact)] if self.fact else []
        unclear = [model for model in self.differences if self.kind(model) == "unclear"]
        found += [
            Verdict(about=self.about, kind=self.kind(model), text=f"{self._figures(model)}.")
            for model in self.differences
            if model not in unclear
        ]
        if unclear:
            few = max(self.differences[model].rows for model in unclear) < FEW_ROWS
            rows = f" (only {self.differences[unclear[0]].rows} rows or examples)" if few else ""
            text = f"{'; '.join(map(self._figures, unclear))}{rows}."
            found.append(Verdict(about=self.about, kind="unclear", text=text))
        return found

    def _figures(self, model: str) -> str:
        difference = self.differences[model]
        scale, digits = (100, 1) if self.unit == "points" else (1, 4)
        error = "" if difference.standard_error is None else f" ± {scale * difference.standard_error:.{digits}f}"
        more = f"{scale * difference.mean:+.{digits}f}{error} {self.unit}"
        value = self.values.get(model, "")
        return f"{model} {value} ({more})" if value else f"{model} {more}"


def verdicts_of(shown: Shown) -> list[Verdict]:
    """The headline, then what matters most first: recall, RULER, loss, short-context skill."""
    long, cost = long_findings(shown), cost_findings(shown)
    found = [Verdict(about="", kind="fact", text=text) for text in headline(shown, long, cost)]
    if shown.comparison is not None and shown.comparison.key is not None and not shown.comparison.key.count:
        found.append(Verdict(about="", kind="fact", text=NO_KEY_TOKENS))
    for finding in (*long, *cost):
        found += finding.verdicts()
    return found


def headline(shown: Shown, long: Sequence[Finding], cost: Sequence[Finding]) -> list[str]:
    """A sentence on all models that are alike in both measures; for a single model, how much it needs its context."""
    if not long:
        return _alone(shown)
    first = long[0]
    price = next((finding for finding in cost if finding.reference == first.reference), None)
    alike: dict[tuple[Kind, Kind | None], list[str]] = {}
    for model in first.differences:
        if model != shown.base or len(first.differences) == 1:
            paid = price.kind(model) if price is not None and model in price.differences else None
            alike.setdefault((first.kind(model), paid), []).append(model)
    found = []
    for (kind, paid), models in alike.items():
        verb = "is" if len(models) == 1 else "are"
        said = {"better": f"{verb} better than", "worse": f"{verb} worse than"}
        text = f"{_listed(models)} {said.get(kind, 'cannot clearly be told from')} {first.reference} {first.phrase}"
        if price is not None and paid is not None:
            also = {"better": f"also {verb} better" if kind == "better" else f"{verb} better", "worse": f"{verb} worse"}
            joint = "and" if (kind, paid) in (("better", "better"), ("worse", "worse")) else "but"
            text += (
                f"; {price.phrase} there is no clear difference"
                if paid == "unclear"
                else f", {joint} {also[paid]} {price.phrase}"
            )
        found.append(f"{text}.")
    return found


def long_findings(shown: Shown) -> list[Finding]:
    """Measures of long context, the most telling first."""
    found = []
    if shown.recall is not None:
        found += _of_recall(shown.recall)
    for table in ruler_tables(shown.evaluations.records):
        found += _of_ruler(shown, table)
    found += [finding for suite in LONG_SUITES for finding in _of_suite(shown, suite)]
    comparison = shown.comparison
    if comparison is not None:
        if comparison.key is not None and comparison.key.count:
            measures = {model.name: model.key for model in comparison.models}
            found += _of_loss(comparison, measures, "Loss on key tokens", "on the key tokens")
        n = comparison.old_context
        if n is not None:
            measures = {model.name: model.beyond for model in comparison.models}
            found += _of_loss(comparison, measures, f"Loss beyond {n:,} tokens", f"in the loss beyond {n:,} tokens")
        else:
            measures = {model.name: model.all for model in comparison.models}
            found += _of_loss(comparison, measures, "Loss", "in the loss over all targets")
    return found


def cost_findings(shown: Shown) -> list[Finding]:
    """Measures of what long context may cost."""
    found = [finding for suite in SHORT_SUITES for finding in _of_suite(shown, suite)]
    recall, comparison = shown.recall, shown.comparison
    if recall is not None and comparison is not None:
        measures = {model.name: model.other for model in recall.models}
        found += _of_loss(comparison, measures, "Loss on all other text", "in the loss on all other text")
    if comparison is not None and comparison.old_context is not None:
        n = comparison.old_context
        within = {model.name: model.within for model in comparison.models}
        found += _of_loss(comparison, within, f"Loss within {n:,} tokens", f"in the loss within {n:,} tokens")
    return found


def _of_recall(recall: RecallComparison) -> list[Finding]:
    is_far = recall.old_context is not None and all(model.far is not None for model in recall.models)
    chosen = {model.name: (model.far if is_far else model.all) for model in recall.models}
    theirs = chosen[recall.reference]
    if theirs is None or theirs.share is None:
        return []
    others = {name: one for name, one in chosen.items() if one is not None and one.difference is not None}
    what = f"what stands {recall.old_context:,} or more tokens back" if is_far else "planted answers"
    return [
        Finding(
            about=f"Recall of {what}",
            phrase=f"at recalling {what}",
            reference=recall.reference,
            fact=f"{recall.reference} recalls {_percent(theirs.share)} of {theirs.answers:,} such answers.",
            differences={name: one.difference for name, one in others.items() if one.difference is not None},
            higher_is_better=True,
            values={name: _percent(one.share) for name, one in others.items() if one.share is not None},
            unit="points",
        )
    ]


def _of_ruler(shown: Shown, table: RulerTable) -> list[Finding]:
    scores = {model: score for model in table.models if (score := average(table, model)) is not None}
    if not scores:
        return []
    reference = shown.reference_among(list(scores))
    theirs = scores[reference]
    differences = {}
    for model, ours in scores.items():
        if model != reference:
            paired = None
            if shown.evaluations.same_examples(model, reference):
                paired = ruler_difference(shown.evaluations.samples, table, model, reference)
            differences[model] = paired or _unpaired(ours, theirs, ours.samples)
    if not differences:
        return []
    metric = table.metric.replace("_", " ")
    return [
        Finding(
            about=f"RULER ({metric}, average over {theirs.tasks} of {RULER_TASKS} tasks)",
            phrase="on RULER",
            reference=reference,
            fact=f"{reference} scores {100 * theirs.value:.1f}.",
            differences=differences,
            higher_is_better=True,
            values={model: f"{100 * scores[model].value:.1f}" for model in differences},
            unit="points",
        )
    ]


def _of_suite(shown: Shown, suite: str) -> list[Finding]:
    scores = suite_scores(shown.evaluations.records, suite)
    if len(scores) < 2:
        return []
    reference = shown.reference_among(list(scores))
    theirs = scores.pop(reference)
    return [
        Finding(
            about=NAMES[suite],
            phrase=f"on {NAMES[suite]}",
            reference=reference,
            fact=f"{reference} scores {100 * theirs.value:.1f}.",
            differences={model: _unpaired(ours, theirs, max(ours.samples, 1)) for model, ours in scores.items()},
            higher_is_better=True,
            values={model: f"{100 * ours.value:.1f}" for model, ours in scores.items()},
            unit="points",
        )
    ]


def _of_loss(comparison: Comparison, measures: Mapping[str, Measure | None], about: str, phrase: str) -> list[Finding]:
    differences = {
        name: one.difference for name, one in measures.items() if one is not None and one.difference is not None
    }
    theirs = measures[comparison.reference]
    if not differences or theirs is None or theirs.nll is None:
        return []
    return [
        Finding(
            about=about,
            phrase=phrase,
            reference=comparison.reference,
            fact=f"{comparison.reference} has {theirs.nll:.4f} nats per target.",
            differences=differences,
            higher_is_better=False,
            values={},
            unit="nats",
        )
    ]


def _alone(shown: Shown) -> list[str]:
    """How many targets a single model needs more than a window for."""
    result = shown.evaluations.results.get(shown.weighed or "")
    if result is None or result.short_nll is None:
        return []
    helped = (result.short_nll - result.long_nll > shown.gain) & result.valid
    return [
        f"For {int(helped.sum()):,} of {int(result.valid.sum()):,} tokens ({helped.sum() / result.valid.sum():.1%}) "
        f"{shown.weighed} needs more than the {result.header.short_window:,} tokens of the short window: with the "
        f"whole row its NLL is lower by more than {shown.gain:g} nats."
    ]


def _unpaired(ours: Score, theirs: Score, samples: int) -> Difference:
    error = None
    if ours.stderr is not None and theirs.stderr is not None:
        error = math.hypot(ours.stderr, theirs.stderr)
    return Difference(mean=ours.value - theirs.value, standard_error=error, rows=samples)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


ERRORS = (
    f"± is one standard error; beyond {CLEAR:g} of them, and from {FEW_ROWS} rows or examples on, a difference is "
    "called one."
)
