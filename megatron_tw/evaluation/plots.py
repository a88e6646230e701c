"""Plots as PNG bytes. Colours are Okabe and Ito's (told apart with any colour vision); lines differ in marker too."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_tw.evaluation.compare import CLEAR, Comparison
from megatron_tw.evaluation.position import nll_by_position
from megatron_tw.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASE_COLOUR = "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POSITION_BINS = 32
SMOOTHED_SHARE = 0.05
"""Of a training curve's steps, in its running mean."""
TRAINING_CURVES = (
    ("lm_loss", "unweighted loss (nats per target)"),
    ("weighted_loss", "weighted loss (nats per target)"),
    ("valid_lm_loss", "unweighted loss on held-out rows (nats per target)"),
    ("grad_norm", "gradient norm before clipping"),
    ("weight_std", "standard deviation of the weights"),
    ("tokens_per_second", "tokens per second"),
    ("learning_rate", "learning rate"),
)
"""Keys of metrics.jsonl, and what they are."""
FROM_ZERO = {"weight_std", "tokens_per_second", "learning_rate"}
"""Those whose axis begins at 0."""


def plot_nll_by_position(comparison: Comparison, results: Mapping[str, EvaluationResult]) -> bytes:
    """Above, the NLL of every model by position; below, the difference to the reference by bucket with its error."""
    figure = _figure(9, 7.5)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    edges = np.unique(np.linspace(1, comparison.seq_length, POSITION_BINS + 1).astype(int)).tolist()
    for name, style in _styles(comparison).items():
        buckets = nll_by_position(results[name].long_nll, results[name].valid, edges)
        centres = [(bucket.first + bucket.last) / 2 for bucket in buckets]
        above.plot(centres, [np.nan if bucket.nll is None else bucket.nll for bucket in buckets], label=name, **style)
    _mark_old_context(above, comparison)
    above.set(ylabel="NLL (nats per target)", title="NLL by position of the target", xlim=(0, comparison.seq_length))
    above.legend(ncols=len(comparison.models), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    _plot_differences(below, comparison)
    return _png(figure)


def plot_key_tokens(comparison: Comparison) -> bytes:
    """The mean NLL on the key tokens as bars."""
    figure = _figure(1.8 + 1.4 * len(comparison.models), 4.2)
    axes = figure.subplots()
    styles = _styles(comparison)
    for i, model in enumerate(comparison.models):
        if model.key.nll is None:
            continue
        axes.bar(i, model.key.nll, width=0.65, color=styles[model.name]["color"])
        difference = "" if model.key.difference is None else f"\n{model.key.difference}"
        axes.annotate(f"{model.key.nll:.3f}{difference}", (i, model.key.nll), ha="center", va="bottom", fontsize=8.5)
    if not comparison.key.count:
        axes.text(0.5, 0.5, "no target is a key token", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
    axes.set_xticks(range(len(comparison.models)), [model.name for model in comparison.models])
    axes.set_xlim(-0.6, len(comparison.models) - 0.4)
    axes.margins(y=0.18)
    axes.set(
        ylabel="NLL (nats per key token)",
        title=f"NLL on {comparison.key.count:,} key tokens\n(difference to {comparison.reference} ± standard error)",
    )
    axes.grid(visible=False, axis="x")
    return _png(figure)


def plot_training(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """The training curves of the runs, each step faint and a running mean strong.

    Args:
        runs: the steps of metrics.jsonl by the runs' names. What no run recorded has no panel.
    """
    curves = [
        (key, label) for key, label in TRAINING_CURVES if any(key in step for run in runs.values() for step in run)
    ]
    figure = _figure(11, 3 * ((len(curves) + 1) // 2))
    panels = figure.subplots((len(curves) + 1) // 2, 2, squeeze=False).ravel()
    for axes, (key, label) in zip(panels, curves, strict=False):
        for i, (name, steps) in enumerate(runs.items()):
            points = [(step["iteration"], step[key]) for step in steps if step.get(key) is not None]
            if not points:
                continue
            x, y = np.asarray(points, np.float64).T
            colour = COLOURS[i % len(COLOURS)]
            window = 1 if key == "learning_rate" else max(1, round(len(y) * SMOOTHED_SHARE))
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, running_mean(y, window), color=colour, linewidth=1.8, label=name)
        axes.set(xlabel="step", title=label)
        axes.ticklabel_format(axis="y", useOffset=False)
        if key in FROM_ZERO:
            axes.set_ylim(bottom=0)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    panels[0].legend()
    return _png(figure)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _plot_differences(axes: "Axes", comparison: Comparison) -> None:
    shown = [model for model in comparison.models if model.name not in (comparison.reference, comparison.base)]
    styles = _styles(comparison)
    buckets = comparison.models[0].buckets
    for i, model in enumerate(shown):
        shift = (i - (len(shown) - 1) / 2) * 0.16
        points = [(x, d) for x, d in enumerate(model.bucket_differences) if d is not None]
        axes.errorbar(
            [x + shift for x, _ in points],
            [d.mean for _, d in points],
            yerr=[CLEAR * (d.standard_error or 0.0) for _, d in points],
            color=styles[model.name]["color"],
            marker=styles[model.name]["marker"],
            linestyle="none",
            capsize=3,
        )
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(buckets)), [f"{bucket.first}-{bucket.last}" for bucket in buckets])
    axes.set(
        xlabel="position of the target (tokens before it)",
        ylabel="nats per target",
        title=f"Difference to {comparison.reference}, ± {CLEAR:g} standard errors (below 0: better)",
    )


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for model in comparison.models:
        if model.name == comparison.base:
            styles[model.name] = {"color": BASE_COLOUR, "marker": ".", "markersize": 5, "linestyle": "--"}
        else:
            i = len([name for name in styles if name != comparison.base])
            styles[model.name] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 4,
                "linewidth": 1.5,
            }
    return styles


def _mark_old_context(axes: "Axes", comparison: Comparison) -> None:
    axes.axvline(comparison.old_context, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(
        f"old context, {comparison.old_context:,} tokens",
        (comparison.old_context, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        fontsize=9,
    )


def _figure(width: float, height: float) -> "Figure":
    """A figure without pyplot's global state; it is drawn by Agg, so no display is needed."""
    import matplotlib as mpl  # takes a second: only when something is drawn
    from matplotlib.figure import Figure

    mpl.rcParams.update(
        {
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "font.size": 10,
            "legend.frameon": False,
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    save: Callable[..., None] = figure.savefig
    save(buffer, format="png", dpi=130)
    return buffer.getvalue()
