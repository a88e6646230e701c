"""A picture of memory over a step, as PNG bytes."""

import io
from itertools import groupby
from typing import TYPE_CHECKING, Any

from megatron_tw.planning.plan import Plan, layout_in_words
from megatron_tw.planning.record import CATEGORIES, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#999999", "#DDDDDD")
"""Of the categories, and last of what is not simulated; Okabe and Ito's, told apart with any colour vision."""
ALLOWANCE = "not simulated, set aside"
GIGA = 1e9


def memory_picture(plan: Plan) -> bytes:
    """Memory of each simulated rank, moment by moment, stacked by category; phases shaded, the GPU's limit a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    ranks = plan.simulations
    figure = Figure(figsize=(11, 1.6 + 3.6 * len(ranks)), layout="constrained")
    panels = figure.subplots(len(ranks), 1, squeeze=False).ravel()
    for axes, simulation in zip(panels, ranks, strict=True):
        _draw(axes, simulation, plan)
    sizes = plan.sizes
    model = sizes.architecture.source.removesuffix("/config.json").split("/")[-1]
    figure.suptitle(
        f"Memory of a GPU over a step (simulated): {model}, {sizes.config.data.seq_length:,} tokens, "
        f"{sizes.world_size} x {plan.cluster.gpu.kind.upper()}\n{layout_in_words(sizes)}",
        fontsize=12,
        fontweight="bold",
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    panels[-1].set_xlabel("moments of the step in order (not to scale in time)")
    buffer = io.BytesIO()
    save: Any = figure.savefig
    save(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw(axes: "Axes", simulation: Simulation, plan: Plan) -> None:
    moments = simulation.timeline
    x = range(len(moments))
    layers = [[moment.bytes_by_category.get(name, 0) / GIGA for moment in moments] for name in CATEGORIES]
    layers.append([plan.allowance / GIGA] * len(moments))
    shown = [max(layer) > 0.01 for layer in layers]
    names = [*CATEGORIES, ALLOWANCE]
    axes.stackplot(
        x,
        *[layer for layer, there in zip(layers, shown, strict=True) if there],
        labels=[name for name, there in zip(names, shown, strict=True) if there],
        colors=[colour for colour, there in zip(COLOURS, shown, strict=True) if there],
        linewidth=0,
        step="post",
        zorder=2,
    )
    limit = plan.cluster.gpu.memory_bytes / GIGA
    height = max(limit, max(map(sum, zip(*layers, strict=True)))) * 1.16
    axes.axhline(limit, color="#D55E00", linewidth=1.8, zorder=3)
    axes.annotate(
        f"{plan.cluster.gpu.kind.upper()}: {limit:.1f} GB",
        (len(moments) - 1, limit), xytext=(-4, 4), textcoords="offset points", ha="right", color="#D55E00",
    )  # fmt: skip
    peak = max(range(len(moments)), key=lambda index: moments[index].total)
    needed = moments[peak].total / GIGA + plan.allowance / GIGA
    axes.plot([peak], [needed], marker="v", color="black", markersize=7, clip_on=False, zorder=4)
    axes.annotate(
        f"{needed:.1f} GB", (peak, needed), xytext=(0, 6), textcoords="offset points", ha="center", fontweight="bold"
    )
    start = 0
    for number, (phase, group) in enumerate(groupby(moments, key=lambda moment: moment.phase)):
        stop = start + len(list(group))
        if number % 2:
            axes.axvspan(start, stop, color="black", alpha=0.07, linewidth=0, zorder=0)
        if stop - start >= len(moments) * 0.05:
            axes.text((start + stop) / 2, height * 0.985, phase, ha="center", va="top", fontsize=9, color="#444444")
        start = stop
    axes.set(ylabel="GB", ylim=(0, height), xlim=(0, max(1, len(moments) - 1)))
    axes.set_xticks([])
    axes.set_title(f"rank {simulation.rank}: {simulation.place}", loc="left", fontweight="normal")
