"""Table and plots of long_range_recall.py."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

Measured = dict[int, dict[str, list[dict[str, Any]]]]
"""The measurements of each seed and scheme (and of "base"), in the order of the steps."""

COLUMNS = {"recall": "recall", "key_nll": "key NLL", "short_nll": "short NLL", "lm_loss": "all NLL", "weight": "weight"}
COMPARED = ("recall", "key_nll", "short_nll")
COLOURS = {"dense": "#D55E00", "sparse": "#009E73", "longce": "#CC79A7", "exact": "#E69F00", "uniform": "#000000"}


def format_table(measured: Measured, *, context: int, run: str) -> str:
    """Three tables of a line a scheme, mean and standard deviation over the seeds after the last step: the
    measurements, their differences to uniform's of the same seed, and recall by distance.

    context: n, tokens. run: what was done, in words.
    """
    ends = {"before": [of_seed["uniform"][0] for of_seed in measured.values()]}
    ends |= {name: [of_seed[name][-1] for of_seed in measured.values()] for name in _schemes(measured)}
    base_recall = [of_seed["base"][-1]["recall"] for of_seed in measured.values()]
    octaves = sorted(ends["before"][0]["recall_by_octave"])
    values = {name: [[one[key] for one in end if key in one] for key in COLUMNS] for name, end in ends.items()}
    differences = {
        name: [[one[key] - uniform[key] for one, uniform in zip(end, ends["uniform"], strict=True)] for key in COMPARED]
        for name, end in ends.items()
        if name not in ("before", "uniform")
    }
    by_distance = {
        name: [[one["recall_by_octave"][octave] for one in end] for octave in octaves] for name, end in ends.items()
    }
    return "\n".join(
        [
            f"base: recall {_spread(base_recall)} in rows of {context} tokens; {run}; "
            f"mean ± standard deviation over {len(measured)} seeds",
            "",
            *_table("scheme", COLUMNS.values(), values),
            "",
            *_table("less uniform of the same seed", [COLUMNS[key] for key in COMPARED], differences),
            "",
            *_table(
                "recall by distance",
                [f"{context * 2**o} to {context * 2 ** (o + 1)} tokens" for o in octaves],
                by_distance,
            ),
        ]
    )


def _schemes(measured: Measured) -> list[str]:
    return [name for name in next(iter(measured.values())) if name != "base"]


def _table(corner: str, columns: Any, lines: dict[str, list[list[float]]]) -> list[str]:
    head = [corner, *columns]
    rows = [[name, *(_spread(values) for values in cells)] for name, cells in lines.items()]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def plot(measured: Measured, file: Path, *, context: int) -> None:
    """Over the steps, above recall, key NLL and short NLL; below their differences to uniform of the same seed. Lines
    are means over the seeds, bands go from the lowest seed to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    above, below = figure.subplots(2, len(COMPARED), sharex=True)
    units = (f"share of facts more than {context} tokens back", "nats per asked value", "nats per target of short rows")
    for column, (key, unit) in enumerate(zip(COMPARED, units, strict=True)):
        for name in sorted(_schemes(measured), key=list(COLOURS).index):
            values_SP = np.array([[point[key] for point in of_seed[name]] for of_seed in measured.values()])
            uniform_SP = np.array([[point[key] for point in of_seed["uniform"]] for of_seed in measured.values()])
            steps = [point["iteration"] for point in next(iter(measured.values()))[name]]
            style = {"color": COLOURS[name], "linestyle": "--" if name == "uniform" else "-", "marker": "o"}
            for axes, curves_SP in ((above[column], values_SP), (below[column], values_SP - uniform_SP)):
                axes.plot(steps, curves_SP.mean(0), label=name, markersize=3, **style)
                axes.fill_between(
                    steps, curves_SP.min(0), curves_SP.max(0), color=COLOURS[name], alpha=0.12, linewidth=0
                )
                axes.grid(alpha=0.3)
        above[column].set(title=COLUMNS[key], ylabel=unit)
        below[column].set(title=f"{COLUMNS[key]}, less uniform of the same seed", xlabel="step")
    above[0].legend()
    figure.savefig(file, dpi=110)


def plot_gain(measured: Measured, file: Path, *, context: int) -> None:
    """After the last step, against uniform of the same seed: recall of far facts, and how much lower their NLL is. A
    dot a seed, a bar for the mean: the picture of README.md."""
    from matplotlib.figure import Figure

    schemes = [name for name in _schemes(measured) if name != "uniform"]
    figure = Figure(figsize=(10, 3.6), layout="constrained", facecolor="white")
    panels = (
        ("recall", 100.0, f"Recall of facts more than {context} tokens back", "percentage points more than uniform"),
        ("key_nll", -1.0, "Lower loss on these tokens", "nats less than uniform"),
    )
    for axes, (key, sign, title, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for place, name in enumerate(schemes):
            gains = [sign * (of_seed[name][-1][key] - of_seed["uniform"][-1][key]) for of_seed in measured.values()]
            colour = COLOURS[name]
            axes.bar(place, mean(gains), width=0.6, color=colour, alpha=0.35)
            axes.scatter(
                place + np.linspace(-0.15, 0.15, len(gains)), gains, s=30, color=colour, edgecolors="white", zorder=3
            )
            axes.annotate(
                f"{mean(gains):.2f}" if sign < 0 else f"{mean(gains):+.1f}",
                (place, max(*gains, 0.0)),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )
        axes.axhline(0, color="black", linewidth=1)
        axes.set(title=title, ylabel=unit, xticks=range(len(schemes)), xticklabels=schemes)
        axes.margins(y=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
