"""What a report shows, in order. A section whose figures were not evaluated is left out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_tw.evaluation.position import beyond
from megatron_tw.evaluation.report import figures, heat_map
from megatron_tw.evaluation.report.benchmarks import (
    LONG_SUITES,
    OVERALL,
    RULER,
    RULER_TASKS,
    SHORT_SUITES,
    RulerTable,
    Score,
    average,
    needle_map,
    ruler_tables,
    suite_scores,
)
from megatron_tw.evaluation.report.figures import Drawing
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.intervals import of_mean
from megatron_tw.evaluation.report.recall import Recall, RecallComparison
from megatron_tw.evaluation.report.verdict import NAMES
from megatron_tw.evaluation.table import Table, figure, notes, tables

SCORE_POINTS = 200
"""Of a distribution's curve."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Of the page, and of report.json under its name."""

    name: str
    title: str
    lead: str = ""
    """A sentence on how to read it."""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    html: str = ""
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """For report.json."""


def sections_of(shown: Shown) -> list[Section]:
    """All that can be shown."""
    makers: Sequence[Callable[[Shown], Section | None]] = (
        recall_section, loss_section, ruler_section, needle_section, trade_off_section, benchmark_section,
        weight_section, text_section, training_section,
    )  # fmt: skip
    return [section for maker in makers if (section := maker(shown)) is not None]


def recall_section(shown: Shown) -> Section | None:
    """Recall by distance, and the loss on the answers and on all other text."""
    recall = shown.recall
    if recall is None:
        return None
    has_shares = all(model.all.share is not None for model in recall.models)
    drawings = [figures.draw_answer_loss(recall)]
    found = []
    if has_shares:
        drawings.insert(0, figures.draw_recall(recall))
        found.append(_by_distance(recall, "Recall by distance (%, and its interval of 95%)", _share_cell, "highest"))
    found.append(
        _by_distance(recall, "NLL of the answers by distance (nats per token)", lambda one: figure(one.nll), "lowest")
    )
    found.append(
        Table(
            title="NLL on all other text (nats per target)",
            head=("model", "NLL", f"difference to {recall.reference}"),
            rows=tuple((m.name, figure(m.other.nll), str(m.other.difference or "-")) for m in recall.models),
            best=None,
        )
    )
    missing = [model.name for model in recall.models if model.all.share is None]
    return Section(
        name="recall",
        title="Does it recall what stood far above?",
        lead=(
            f"{recall.answers:,} answers stand in the text, each decided by a fact some distance above. One counts as "
            "recalled if each of its tokens is the model's first choice."
        ),
        drawings=drawings,
        tables=found,
        notes=[
            "Bars of recall are Wilson's intervals of 95%; differences have their standard error over rows.",
            *(
                [f"Without first choices in the evaluation, so without recall: {', '.join(missing)}."]
                if missing
                else []
            ),
        ],
        figures=dataclasses.asdict(recall),
    )


def _by_distance(recall: RecallComparison, title: str, cell: Callable[[Recall], str], best: Any) -> Table:
    buckets = recall.models[0].buckets
    return Table(
        title=title,
        head=("model", *(f"{bucket.first:,}-{bucket.last:,} ({bucket.answers:,})" for bucket in buckets), "all"),
        rows=tuple(
            (model.name, *(cell(bucket) for bucket in model.buckets), cell(model.all)) for model in recall.models
        ),
        best=best,
    )


def _share_cell(recall: Recall) -> str:
    if recall.share is None or recall.low is None or recall.high is None:
        return "-"
    return f"{100 * recall.share:.1f} ({100 * recall.low:.0f} to {100 * recall.high:.0f})"


def loss_section(shown: Shown) -> Section | None:
    """NLL by position, on key tokens, and differences."""
    comparison = shown.comparison
    if comparison is None:
        return None
    results = shown.evaluations.results
    several = len(comparison.models) > 1
    drawings = [
        figures.draw_position(comparison, results),
        figures.draw_differences(comparison),
        figures.draw_key_tokens(comparison) if several else None,
    ]
    return Section(
        name="loss",
        title="Loss by position",
        lead="A model that uses its context gets better with position; beyond the old context the extension shows.",
        drawings=[drawing for drawing in drawings if drawing is not None],
        tables=tables(comparison),
        notes=["Bands are 95% over rows, bars of differences two standard errors.", *notes(comparison)],
    )


def ruler_section(shown: Shown) -> Section | None:
    """RULER by task and length, a table for each metric."""
    found = ruler_tables(shown.evaluations.records)
    if not any(table.cells for table in found):
        return None
    shown_tables: list[Table] = []
    said: list[str] = []
    for table in found:
        shown_tables += _ruler_tables(table)
        said += [f"{task} was not run: {reason}." for task, reason in table.not_run.items()]
    tasks = {score.tasks for table in found for score in table.averages.values()}
    return Section(
        name="ruler",
        title="RULER",
        lead="Shares of 100. Averages are over the tasks that every model was scored on at that length.",
        drawings=[figures.draw_ruler(table) for table in found if table.averages],
        tables=shown_tables,
        notes=[
            *([f"Averages over {_numbers(tasks)} of {RULER_TASKS} tasks."] if tasks else []),
            *dict.fromkeys(said),
            "Exactness is the share of answers all of whose tokens are the model's first choice in one forward pass: "
            "stricter than RULER's string match on generated text, and not to be compared with it."
            if any(table.metric == "exactness" for table in found)
            else "",
        ],
        figures={
            table.metric: {
                "records": [
                    {"model": model, **dataclasses.asdict(cell)} for (model, _, _), cell in table.cells.items()
                ],
                "averages": [
                    {"model": model, "length": length, **dataclasses.asdict(score)}
                    for (model, length), score in table.averages.items()
                ],
            }
            for table in found
        },
    )


def _ruler_tables(table: RulerTable) -> list[Table]:
    metric = table.metric.replace("_", " ")
    averages = Table(
        title=f"Average {metric} by length",
        head=("model", *(f"{length:,}" for length in table.lengths), "all lengths"),
        rows=tuple(
            (
                model,
                *(_score_cell(table.averages.get((model, length))) for length in table.lengths),
                _score_cell(average(table, model)),
            )
            for model in table.models
        ),
        best="highest",
    )
    columns = [(length, model) for length in table.lengths for model in table.models]
    one = len(table.models) == 1

    def cell(task: str, length: int, model: str) -> str:
        record = table.cells.get((model, task, length))
        return "not run" if record is None or record.value is None else f"{100 * record.value:.1f}"

    rows = [(task, *(cell(task, length, model) for length, model in columns)) for task in table.tasks]
    means = [table.averages.get((model, length)) for length, model in columns]
    counts = "/".join(str(n) for n in sorted({score.tasks for score in means if score is not None}))
    rows.append(
        (f"average of {counts or 0}", *("-" if score is None else f"{100 * score.value:.1f}" for score in means))
    )
    tasks = Table(
        title=f"By task: {metric}",
        head=("task", *(f"{length:,}" if one else f"{length:,} {model}" for length, model in columns)),
        rows=tuple(rows),
        last_is_summary=True,
    )
    return [averages, tasks]


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score.value:.1f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.1f}")


def _numbers(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def needle_section(shown: Shown) -> Section | None:
    """A heat map of depth by length for each model."""
    maps = [needle_map(model, samples) for model, samples in shown.evaluations.samples.items()]
    found = [one for one in maps if one is not None]
    if not found:
        return None
    return Section(
        name="needles",
        title="Needles by depth and length",
        lead="How often the model found a needle, by where it stands in the prompt (0%: at its start) and the length.",
        drawings=[figures.draw_needles(one, number) for number, one in enumerate(found, start=1)],
        figures={one.model: dataclasses.asdict(one) for one in found},
    )


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
    points = {name: (*_xy(short, long, name),) for name in names}
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
    return None if recall.low is None or recall.high is None else 100 * (recall.high - recall.low) / 2 / figures.Z95


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


def benchmark_section(shown: Shown) -> Section | None:
    """LongPPL and the tasks of the harness."""
    records = shown.evaluations.records
    known = [
        (r.suite, r.task, r.metric, r.length) for of in records.values() for r in of if r.suite not in (RULER, "loss")
    ]
    if not known:
        return None
    columns = list(dict.fromkeys(known))
    rows = []
    said = []
    for suite, task, metric, length in columns:
        cells = []
        for of_model in records.values():
            record = next(
                (r for r in of_model if (r.suite, r.task, r.metric, r.length) == (suite, task, metric, length)), None
            )
            if record is None or record.value is None:
                cells.append("-" if record is None else "not run")
                if record is not None:
                    said.append(f"{NAMES.get(suite, suite)} {task} was not run: {record.not_run or 'no samples'}.")
            else:
                scale = 1.0 if record.metric in ("longppl", "nll", "ppl") or record.value > 1 else 100.0
                error = "" if record.stderr is None else f" ± {scale * record.stderr:.1f}"
                cells.append(f"{scale * record.value:.{1 if scale > 1 else 2}f}{error} ({record.samples:,})")
        name = NAMES.get(suite, suite)
        what = name if task in (*OVERALL, suite) else f"{name}: {task}"
        rows.append((what + ("" if length is None else f", {length:,} tokens"), metric, *cells))
    return Section(
        name="benchmarks",
        title="LongPPL and benchmarks",
        lead="Figures with their standard error, and how many samples they are over. Shares are of 100.",
        tables=[Table(title="Results", head=("task", "metric", *records), rows=tuple(rows))],
        notes=list(dict.fromkeys(said)),
    )


def weight_section(shown: Shown) -> Section | None:
    """Distributions of |long - short| and of the weights that it makes."""
    scored = {name: result for name, result in shown.evaluations.results.items() if result.short_nll is not None}
    if not scored or shown.weighed is None:
        return None
    from megatron_tw.evaluation.report.weights import share_above, weight_figures, weights_of

    curves = {}
    for name, result in scored.items():
        assert result.short_nll is not None
        assert result.header.short_window is not None
        far_RT = beyond(result.valid, result.header.short_window)
        scores = np.abs(result.long_nll[far_RT].astype(np.float64) - result.short_nll[far_RT])
        points = np.linspace(0, max(float(scores.max(initial=0.0)), 1e-3), SCORE_POINTS)
        curves[name] = (points, share_above(scores, points))
    result = scored[shown.weighed]
    weights = weights_of(result, shown.schemes)
    of_weights = {}
    for name, weights_RT in weights.items():
        values = weights_RT[result.valid]
        points = np.linspace(0, max(float(values.max(initial=0.0)), 1e-3), SCORE_POINTS)
        of_weights[name] = (points, share_above(values, points))
    old_context = result.header.short_window
    rows = [weight_figures(name, weights_RT, result.valid, old_context) for name, weights_RT in weights.items()]
    return Section(
        name="weights",
        title="Scores and weights",
        lead=(
            "The score of a target is its NLL with the whole row less its NLL in a short window. Most are near 0; "
            "a weighting scheme turns the rest into weights, whose mean in a row is 1 under most."
        ),
        drawings=[
            figures.draw_shares(curves, "scores", "|long NLL - short NLL|, beyond the window (nats)"),
            figures.draw_shares(of_weights, "weights", f"weight, from the scores of {shown.weighed}"),
        ],
        tables=[
            Table(
                title=f"Weights from the scores of {shown.weighed}",
                head=("scheme", "standard deviation", "largest", "targets without weight", "weight on the top 1%",
                      f"weight beyond {old_context:,}"),
                rows=tuple(
                    (
                        row.name,
                        f"{row.standard_deviation:.2f}",
                        f"{row.largest:.1f}",
                        f"{row.zero_share:.1%}",
                        f"{row.top_share:.1%}",
                        "-" if row.beyond_share is None else f"{row.beyond_share:.1%}",
                    )
                    for row in rows
                ),
            )
        ],
        figures={row.name: dataclasses.asdict(row) for row in rows},
    )  # fmt: skip


def text_section(shown: Shown) -> Section | None:
    """The text heat map."""
    if shown.text is None or shown.row is None or shown.weighed is None:
        return None
    from megatron_tw.evaluation.report.weights import weights_of

    result = shown.evaluations.results[shown.weighed]
    weights = weights_of(result, shown.schemes)
    found = heat_map.heat_map(
        result, shown.row, shown.text, weights, model=shown.weighed, gain=shown.gain, max_long_nll=shown.max_long_nll
    )
    return Section(
        name="text",
        title="Which tokens need the long context?",
        lead=(
            f"Row {found.row} of the held-out text under {found.model}. Point at a token, tap it, or reach the text "
            "with the tab key and move with the arrow keys; Enter goes to where the word stood before."
        ),
        html=heat_map.html(found),
        notes=[
            f"Long NLL: with the whole row as context. Short NLL: with at most {found.window:,} tokens of it; up to "
            "there both are the same. Key tokens are those whose NLL the long context lowers by more than "
            f"{found.gain:g} nats.",
        ],
        figures={
            "model": found.model,
            "row": found.row,
            "weightings": found.weightings,
            "top_tokens": [
                {
                    **dataclasses.asdict(top.figures),
                    "text": top.text,
                    "before": top.before,
                    "stood_before": None if top.distance is None else {"tokens": top.distance, "text": top.source_text},
                }
                for top in found.top
            ],
        },
    )


def training_section(shown: Shown) -> Section | None:
    """Curves of the training runs."""
    if not shown.metrics:
        return None
    return Section(name="training", title="Training", drawings=figures.draw_training(shown.metrics))
