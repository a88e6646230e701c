"""The figures of a report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_tw.evaluation.compare import CLEAR, Comparison, ratio_difference
from megatron_tw.evaluation.position import nll_by_position
from megatron_tw.evaluation.report.benchmarks import DEPTHS, NeedleMap, RulerTable
from megatron_tw.evaluation.report.drawing import (
    INK,
    Drawing,
    finished,
    new_figure,
    series_styles,
    show_models,
)
from megatron_tw.evaluation.report.intervals import Z95
from megatron_tw.evaluation.report.recall import RecallComparison
from megatron_tw.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POSITION_BINS = 24
MAX_NUMBERED = 12
"""Columns of a needle map up to which its cells hold numbers."""
MAX_POINTS = 300
"""Of a curve in a figure."""
SMOOTHED_SHARE = 0.05
"""Of a training curve's steps, in its running mean."""
TRAINING_CURVES = (
    ("lm_loss", "Unweighted loss", "nats per target"),
    ("weighted_loss", "Weighted loss", "nats per target"),
    ("valid_lm_loss", "Unweighted loss on held-out rows", "nats per target"),
    ("grad_norm", "Gradient norm before clipping", ""),
    ("weight_std", "Standard deviation of the weights", ""),
    ("tokens_per_second", "Tokens per second", ""),
    ("learning_rate", "Learning rate", ""),
)
"""Keys of metrics.jsonl, what they are, their unit."""
FROM_ZERO = {"weight_std", "tokens_per_second", "learning_rate"}
"""Those whose axis begins at 0."""


def draw_recall(recall: RecallComparison) -> Drawing:
    """Each model's recall by distance with Wilson's interval."""
    figure, axes = new_figure()
    styles = series_styles([model.name for model in recall.models], None)
    labels = [f"{bucket.first:,}-\n{bucket.last:,}" for bucket in recall.models[0].buckets]
    for i, model in enumerate(recall.models):
        x = np.arange(len(model.buckets)) + (i - (len(recall.models) - 1) / 2) * 0.1
        shares = np.array([bucket.share for bucket in model.buckets], float) * 100
        low = np.array([bucket.low for bucket in model.buckets], float) * 100
        high = np.array([bucket.high for bucket in model.buckets], float) * 100
        error = (np.maximum(shares - low, 0), np.maximum(high - shares, 0))
        axes.errorbar(x, shares, yerr=error, capsize=2, label=model.name, **styles[model.name])
    if recall.old_context is not None:
        far = sum(bucket.last < recall.old_context for bucket in recall.models[0].buckets)
        if 0 < far < len(labels):
            mark_old_context(axes, far - 0.5, recall.old_context)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylim=(-3, 103), xlabel="tokens from the fact to the answer", ylabel="recalled (%)")
    show_models(axes)
    return finished(figure, "recall", "Recall of planted answers by distance, one line a model")


def draw_answer_loss(recall: RecallComparison) -> Drawing:
    """The loss on the answers and on all other text, a bar each."""
    figure, axes = new_figure()
    styles = series_styles([model.name for model in recall.models], None)
    groups = [("answers far back", lambda model: model.far and model.far.nll)] if recall.old_context else []
    groups += [("all answers", lambda model: model.all.nll), ("all other text", lambda model: model.other.nll)]
    width = 0.8 / len(recall.models)
    for i, model in enumerate(recall.models):
        values = [of(model) or np.nan for _, of in groups]
        x = np.arange(len(groups)) + (i - (len(recall.models) - 1) / 2) * width
        axes.bar(x, values, width * 0.9, color=styles[model.name]["color"], label=model.name)
        for place, value in zip(x, values, strict=True):
            if np.isfinite(value):
                axes.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom", fontsize=7, color=INK)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set(ylabel="NLL (nats per target)")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    show_models(axes)
    return finished(figure, "answer_loss", "Loss on the answers and on all other text, a bar for each model")


def draw_position(comparison: Comparison, results: Mapping[str, EvaluationResult]) -> Drawing:
    """Every model's NLL by position, with bands of 95% over rows."""
    figure, axes = new_figure()
    edges = np.unique(np.linspace(1, comparison.seq_length, POSITION_BINS + 1).astype(int)).tolist()
    for name, style in _styles(comparison).items():
        result = results[name]
        buckets = nll_by_position(result.long_nll, result.valid, edges)
        x = [(bucket.first + bucket.last) / 2 for bucket in buckets]
        y = np.array([np.nan if bucket.nll is None else bucket.nll for bucket in buckets])
        error = Z95 * np.array([_row_error(result, bucket.first, bucket.last) for bucket in buckets])
        axes.plot(x, y, label=name, **style)
        axes.fill_between(x, y - error, y + error, color=style["color"], alpha=0.1, linewidth=0)
    if comparison.old_context is not None:
        mark_old_context(axes, comparison.old_context, comparison.old_context)
    axes.set(xlabel="position of the target (tokens before it)", ylabel="NLL (nats per target)")
    axes.set_xlim(0, comparison.seq_length)
    show_models(axes)
    return finished(figure, "nll_by_position", "NLL by position of the target, one line a model")


def draw_differences(comparison: Comparison) -> Drawing | None:
    """The difference to the reference by bucket of positions with its error; None: there is no other model."""
    shown = [model for model in comparison.models if model.name not in (comparison.reference, comparison.base)]
    if not shown:
        return None
    figure, axes = new_figure()
    styles = _styles(comparison)
    buckets = comparison.models[0].buckets
    for i, model in enumerate(shown):
        shift = (i - (len(shown) - 1) / 2) * 0.16
        points = [(x, d) for x, d in enumerate(model.bucket_differences) if d is not None]
        axes.errorbar(
            [x + shift for x, _ in points],
            [d.mean for _, d in points],
            yerr=[CLEAR * (d.standard_error or 0.0) for _, d in points],
            capsize=3,
            label=model.name,
            **{**styles[model.name], "linestyle": "none"},
        )
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(len(buckets)), [f"{bucket.first:,}-\n{bucket.last:,}" for bucket in buckets], fontsize=7.5)
    axes.set(xlabel="position of the target", ylabel=f"nats more than {comparison.reference}")
    show_models(axes)
    return finished(figure, "nll_differences", f"Difference of the NLL to {comparison.reference} by position")


def draw_key_tokens(comparison: Comparison) -> Drawing | None:
    """The mean NLL on the key tokens as bars; None: there are no key tokens."""
    shown = [model for model in comparison.models if model.key is not None and model.key.nll is not None]
    if comparison.key is None or not shown:
        return None
    figure, axes = new_figure()
    styles = _styles(comparison)
    for i, model in enumerate(shown):
        assert model.key is not None
        assert model.key.nll is not None
        axes.bar(i, model.key.nll, width=0.6, color=styles[model.name]["color"])
        difference = "" if model.key.difference is None else f"\n{model.key.difference}"
        axes.annotate(
            f"{model.key.nll:.3f}{difference}", (i, model.key.nll), ha="center", va="bottom", fontsize=7.5, color=INK
        )
    axes.set_xticks(range(len(shown)), [model.name for model in shown])
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.margins(y=0.2)
    axes.set(ylabel="NLL (nats per key token)")
    axes.grid(visible=False, axis="x")
    return finished(figure, "key_tokens", f"NLL on the {comparison.key.count:,} key tokens, a bar for each model")


def draw_ruler(table: RulerTable) -> Drawing:
    """Each model's average over the tasks, by length."""
    figure, axes = new_figure()
    styles = series_styles(table.models, None)
    for model in table.models:
        scores = [
            (length, table.averages[model, length]) for length in table.lengths if (model, length) in table.averages
        ]
        axes.errorbar(
            [length for length, _ in scores],
            [100 * score.value for _, score in scores],
            yerr=[100 * Z95 * (score.stderr or 0.0) for _, score in scores],
            capsize=2,
            label=model,
            **styles[model],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(table.lengths, [f"{length:,}" for length in table.lengths])
    axes.minorticks_off()
    axes.set(ylim=(-3, 103), xlabel="tokens of the prompt", ylabel=f"average {table.metric.replace('_', ' ')} (%)")
    show_models(axes)
    return finished(figure, f"ruler_{table.metric}", "RULER average by length, one line a model")


def draw_needles(needles: NeedleMap, number: int) -> Drawing:
    """Depth by length: the share of needles found, as colour and number."""
    import matplotlib as mpl

    figure, axes = new_figure(height=3.6)
    grid = np.array([[np.nan if share is None else share for share in row] for row in needles.shares])
    colours = mpl.colormaps["cividis"]
    axes.grid(visible=False)
    for row, of_row in enumerate(grid):
        for column, share in enumerate(of_row):
            if np.isfinite(share):
                colour = mpl.colors.to_hex(colours(share))
                axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color=colour, lw=0)
                ink = "#ffffff" if share < 0.55 else "#000000"
                if len(needles.lengths) <= MAX_NUMBERED:
                    place = (column + 0.5, row + 0.5)
                    axes.annotate(f"{100 * share:.0f}", place, ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(np.arange(len(needles.lengths)) + 0.5, [f"{length:,}" for length in needles.lengths])
    axes.set_yticks(range(0, DEPTHS + 1, 2), [f"{100 * depth // DEPTHS}%" for depth in range(0, DEPTHS + 1, 2)])
    axes.set(xlim=(0, len(needles.lengths)), ylim=(DEPTHS, 0))
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the needle", title=f"{needles.model}: found (%)")
    return finished(figure, f"needles_{number}", f"Needles that {needles.model} found, by depth and length")


Point = tuple[float, float, float | None, float | None]
"""x, y and their standard errors."""


def draw_trade_off(
    points: Mapping[str, Point], long_label: str, short_label: str, *, lower_is_better: tuple[bool, bool]
) -> Drawing:
    """Long-context measure above the short-context one, a point a model; up and right is better."""
    figure, axes = new_figure()
    styles = series_styles(list(points), None)
    for name, (x, y, x_error, y_error) in points.items():
        style = {**styles[name], "markersize": 8, "linestyle": "none", "linewidth": 1}
        axes.errorbar(
            x, y, xerr=None if x_error is None else Z95 * x_error, yerr=None if y_error is None else Z95 * y_error,
            capsize=2, label=name, **style,
        )  # fmt: skip
    for axis, lower in zip((axes.xaxis, axes.yaxis), lower_is_better, strict=True):
        if lower:
            axis.set_inverted(True)
    axes.margins(0.25)
    axes.annotate("better \u2197", (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", color=INK)
    axes.set(xlabel=short_label, ylabel=long_label)
    show_models(axes)
    return finished(figure, "trade_off", "Long-context score against short-context score, a point a model")


def draw_shares(
    curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]], name: str, xlabel: str
) -> Drawing:
    """The share of targets above a value, one line each."""
    figure, axes = new_figure()
    styles = series_styles(list(curves), None)
    for curve, (x, y) in curves.items():
        axes.plot(x, np.where(y > 0, 100 * y, np.nan), label=curve, color=styles[curve]["color"], linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=xlabel, ylabel="targets above it (%)")
    show_models(axes)
    return finished(figure, name, f"Share of targets above a value: {xlabel}")


def draw_training(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Drawing]:
    """The training curves of the runs, each step faint and a running mean strong. What no run recorded has none.

    Args:
        runs: the steps of metrics.jsonl by the runs' names.
    """
    drawings = []
    for key, title, unit in TRAINING_CURVES:
        if not any(key in step for run in runs.values() for step in run):
            continue
        figure, axes = new_figure(height=2.8)
        styles = series_styles(list(runs), None)
        for name, steps in runs.items():
            points = [(step["iteration"], step[key]) for step in steps if step.get(key) is not None]
            if not points:
                continue
            x, y = np.asarray(points, np.float64).T
            colour = styles[name]["color"]
            window = 1 if key == "learning_rate" else max(1, round(len(y) * SMOOTHED_SHARE))
            kept = slice(None, None, -(-len(y) // MAX_POINTS))
            if window > 1:
                axes.plot(x[kept], y[kept], color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x[kept], running_mean(y, window)[kept], color=colour, linewidth=1.6, label=name)
        axes.set(xlabel="step", title=title, ylabel=unit)
        axes.ticklabel_format(axis="y", useOffset=False)
        if key in FROM_ZERO:
            axes.set_ylim(bottom=0)
        show_models(axes)
        drawings.append(finished(figure, f"training_{key}", f"{title} by step, one line a run"))
    return drawings


def running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Mean of each value and the up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    return series_styles([model.name for model in comparison.models], comparison.base)


def _row_error(result: EvaluationResult, first: int, last: int) -> float:
    """Standard error over rows of the mean NLL at positions first .. last; 0 where a single row tells of it."""
    columns = slice(first - 1, last)
    valid_RC = result.valid[:, columns]
    sums_R = result.long_nll[:, columns].sum(axis=1, where=valid_RC, dtype=np.float64)
    found = ratio_difference(sums_R, valid_RC.sum(axis=1))
    return 0.0 if found is None else found.standard_error or 0.0


def mark_old_context(axes: "Axes", place: float, old_context: int) -> None:
    """A line at a place on the x axis."""
    axes.axvline(place, color=INK, linestyle=":", linewidth=1)
    axes.annotate(
        f"old context, {old_context:,}",
        (place, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 5),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )
