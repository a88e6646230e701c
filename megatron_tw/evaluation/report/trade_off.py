"""Long-context against short-context figures, by what was evaluated."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tw.evaluation.report import figures
from megatron_tw.evaluation.report.benchmarks import (
    LONG_SUITES,
    SHORT_SUITES,
    Score,
    average,
    ruler_tables,
    suite_scores,
)
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.intervals import Z95, of_mean
from megatron_tw.evaluation.report.recall import Recall
from megatron_tw.evaluation.report.section import Section
from megatron_tw.evaluation.report.verdict import NAMES


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A measure of the trade-off."""

    label: str
    lower_is_better: bool
    values: Mapping[str, tuple[float, float | None]]
    """By model: value and standard error."""


def trade_off_section(shown: Shown) -> Section | None:
    """The long-context measure against the short-context one (the figure of arXiv 2503.09202)."""
    long, short = _long_axis(shown), _short_axis(shown)
    if long is None or short is None:
        return None
    names = [name for name in long.values if name in short.values]
    if len(names) < 2:
        return None
    points = {name: _xy(short, long, name) for name in names}
    drawing = figures.draw_trade_off(
        points, long.label, short.label, lower_is_better=(short.lower_is_better, long.lower_is_better)
    )
    return Section(
        name="trade_off",
        title="What does long context cost in short context?",
        lead="Up is better in long context, right is better in short context.",
        drawings=[drawing],
        notes=["Bars are 95%."],
        figures={"long": dataclasses.asdict(long), "short": dataclasses.asdict(short)},
    )


def _xy(x: Axis, y: Axis, name: str) -> tuple[float, float, float | None, float | None]:
    return x.values[name][0], y.values[name][0], x.values[name][1], y.values[name][1]


def _long_axis(shown: Shown) -> Axis | None:
    """RULER, else LongBench, else recall far back, else the loss beyond the old context."""
    for table in ruler_tables(shown.evaluations.records):
        scores = {model: score for model in table.models if (score := average(table, model)) is not None}
        if len(scores) > 1:
            return _percent_axis(f"RULER, average {table.metric.replace('_', ' ')} (%)", scores)
    for suite in LONG_SUITES:
        if len(scores := suite_scores(shown.evaluations.records, suite)) > 1:
            return _percent_axis(f"{NAMES[suite]} (%)", scores)
    recall, comparison = shown.recall, shown.comparison
    if recall is not None and all(model.far is not None and model.far.share is not None for model in recall.models):
        shares = {
            model.name: (100 * model.far.share, _half(model.far))
            for model in recall.models
            if model.far is not None and model.far.share is not None
        }
        return Axis(label="recalled far back (%)", lower_is_better=False, values=shares)
    if comparison is None or comparison.old_context is None:
        return None
    values = {m.name: (m.beyond.nll, None) for m in comparison.models if m.beyond is not None and m.beyond.nll}
    return Axis(label=f"NLL beyond {comparison.old_context:,} tokens", lower_is_better=True, values=values)


def _half(recall: Recall) -> float | None:
    """A standard error of the width of Wilson's interval."""
    return None if recall.low is None or recall.high is None else 100 * (recall.high - recall.low) / 2 / Z95


def _short_axis(shown: Shown) -> Axis | None:
    """The mean of the short-context suites that all have, else the loss within the old context or on other text."""
    records = shown.evaluations.records
    suites = {suite: scores for suite in SHORT_SUITES if len(scores := suite_scores(records, suite)) > 1}
    if suites:
        names = [name for name in shown.evaluations.folders if all(name in scores for scores in suites.values())]
        scores = {
            name: Score(
                value=sum(of[name].value for of in suites.values()) / len(suites),
                stderr=of_mean([of[name].stderr for of in suites.values()]),
                tasks=len(suites),
            )
            for name in names
        }
        return _percent_axis(f"{' and '.join(NAMES[suite] for suite in suites)} (%)", scores)
    recall, comparison = shown.recall, shown.comparison
    if recall is not None:
        values = {model.name: (model.other.nll, None) for model in recall.models if model.other.nll is not None}
        return Axis(label="NLL on all other text", lower_is_better=True, values=values)
    if comparison is None or comparison.old_context is None:
        return None
    values = {m.name: (m.within.nll, None) for m in comparison.models if m.within is not None and m.within.nll}
    return Axis(label=f"NLL within {comparison.old_context:,} tokens", lower_is_better=True, values=values)


def _percent_axis(label: str, scores: Mapping[str, Score]) -> Axis:
    values = {
        name: (100 * score.value, None if score.stderr is None else 100 * score.stderr)
        for name, score in scores.items()
    }
    return Axis(label=label, lower_is_better=False, values=values)
