"""How figures are made: as SVG for the page and as PNG.

In the SVG every colour of `PALETTE` is a CSS variable, so that a figure follows the page into dark mode; text stays
text; nothing names another resource. Colours are Okabe and Ito's (told apart with any colour vision); lines differ in
marker too.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASE_COLOUR = "#767C85"
INK, GRID = "#1C2431", "#D9DDE3"
PALETTE = {
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
    BASE_COLOUR: "var(--series-base)",
    INK: "var(--ink)",
    GRID: "var(--grid)",
}
MAX_COLUMNS = 5
"""Of a legend."""
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH, HEIGHT = 5.0, 3.4
"""Inches of a panel: on a phone its text is still read, on a desk two stand side by side."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure. name: of its file. described: for people who do not see it."""

    name: str
    described: str
    svg: str
    png: bytes


def series_styles(names: Sequence[str], base: str | None) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each model; `base`, or the model of this name, is grey."""
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == (base or "base"):
            styles[name] = {"color": BASE_COLOUR, "marker": "X", "markersize": 4, "linestyle": "--", "linewidth": 1.4}
        else:
            i = len([other for other in styles if other != (base or "base")])
            styles[name] = {
                "color": SERIES[i % len(SERIES)],
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 4,
                "linewidth": 1.5,
            }
    return styles


def new_figure(*, width: float = WIDTH, height: float = HEIGHT) -> "tuple[Figure, Axes]":
    """A figure without pyplot's global state; no display is needed."""
    import matplotlib as mpl  # takes a second: only when something is drawn
    from matplotlib.figure import Figure

    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "font.size": 9,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "svg.fonttype": "none",
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def show_models(axes: "Axes") -> None:
    """The legend, above the figure: it hides nothing. None for a single line."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = min(len(labels), MAX_COLUMNS)
        axes.figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2
        )


def finished(figure: "Figure", name: str, described: str) -> Drawing:
    import matplotlib as mpl

    save: Callable[..., None] = figure.savefig
    png, svg = io.BytesIO(), io.StringIO()
    save(png, format="png", dpi=150, facecolor="white")
    with mpl.rc_context({"svg.hashsalt": name}):  # ids of one figure are no other's
        save(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(name=name, described=described, svg=inline_svg(svg.getvalue(), name, described), png=png.getvalue())


def inline_svg(text: str, name: str, described: str) -> str:
    """matplotlib's SVG as an element of an HTML page: without names of other resources, in the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|LineCollection|'
                  r'FillBetweenPolyCollection|PolyCollection|QuadMesh)_\d+"', "", text)  # fmt: skip
    for colour, variable in PALETTE.items():
        text = re.sub(re.escape(colour), variable, text, flags=re.IGNORECASE)
    text = re.sub(r"font-family: [^;\"]*;\s*", "", text)  # the page's
    text = re.sub(r"\s*\n\s*", " ", text)
    label = described.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg ", f'<svg class="figure" role="img" aria-label="{label}" data-name="{name}" ', text, count=1)
