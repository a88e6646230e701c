"""Draws lines of a row's text, each token on a colour for its weight: the picture of README.md.

    tools/draw_heat_map.py --evaluation DIR --rows DIR --row R --spans FIRST:STOP ... --output FILE.png

The evaluation has short NLLs (tools/evaluate.py --short-window). A token's weight is its |long NLL - short NLL|, scaled
to mean 1 over the row: dense weights without interpolation. `--spans` are positions in the row: whole lines that hold
them are drawn, with a gap that says how many tokens are left out between. The page of tools/report.py shows more of a
row, with the figures of each token.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import TOKENIZER_DIR
from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.report.text import Row
from megatron_tw.evaluation.report.weights import parse_weighting, weights_of
from megatron_tw.evaluation.result import EvaluationResult

COLOURS = LinearSegmentedColormap.from_list("weight", ["#ffffff", "#fde7c4", "#f9b56b", "#e8703a"])
LARGEST = 40.0
"""Weight with the strongest colour; 1 has none, and steps between are of equal ratio."""
POINTS = 9.0
CHARACTER_WIDTH, LINE_HEIGHT = 0.602 * POINTS / 72, 1.45 * POINTS / 72
"""Inches, of DejaVu Sans Mono."""


@dataclass(frozen=True)
class Piece:
    """Text without a line end, and the weight of its heaviest token."""

    text: str
    weight: float


Line = list[Piece] | int
"""Of the text; a number is a gap of so many tokens."""


def lines_of(text: Row, weight_T: npt.NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> list[Line]:
    """The whole lines that hold the tokens FIRST .. STOP - 1 of each span."""
    lines: list[tuple[int, int, list[Piece]]] = [(0, 0, [])]
    for piece in text.pieces:
        weight = max((float(weight_T[p - 1]) for p in range(piece.first, piece.last) if p > 0), default=0.0)
        for place, part in enumerate(piece.text.split("\n")):
            if place:
                lines.append((piece.last, piece.last, []))
            first, _, parts = lines[-1]
            lines[-1] = (first, piece.last, [*parts, Piece(part, weight)] if part else parts)
    shown: list[Line] = []
    end = None
    for first, stop in spans:
        for start, last, parts in lines:
            if start < stop and last > first and any(part.text.strip() for part in parts):
                if end is not None and start > end + 1:
                    shown.append(start - end)
                shown.append(parts)
                end = last
    return shown


def draw(lines: Sequence[Line], file: Path) -> None:
    """One line under the other, with a scale of the weights at the foot."""
    columns = max(sum(len(piece.text) for piece in line) for line in lines if not isinstance(line, int)) + 2
    width, height = columns * CHARACTER_WIDTH, (len(lines) + 2.2) * LINE_HEIGHT
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, columns - 1), ylim=(len(lines) + 1.9, -0.3))
    axes.axis("off")
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": POINTS, "va": "center"}
    for row, line in enumerate(lines):
        if isinstance(line, int):
            axes.text(0, row + 0.5, f"⋯ {line:,} tokens ⋯", color="#777777", style="italic", **style)
            continue
        column = 0
        for piece in line:
            blank = len(piece.text) - len(piece.text.lstrip(" "))
            if (colour := _colour(piece.weight)) is not None and piece.text.strip():
                axes.add_patch(
                    Rectangle((column + blank, row + 0.06), len(piece.text) - blank, 0.88, color=colour, lw=0)
                )
            axes.text(column, row + 0.5, piece.text, color="#1a1a1a", **style)
            column += len(piece.text)
    foot = len(lines) + 1.1
    axes.text(0, foot, "weight", color="#555555", **style)
    for place, weight in enumerate((1, 2, 5, 10, 20, 40)):
        axes.add_patch(Rectangle((8 + 5 * place, foot - 0.44), 5, 0.88, facecolor=_colour(weight) or "white", lw=0))
        axes.text(10.5 + 5 * place, foot, f"{weight}", color="#1a1a1a", ha="center", **style)
    figure.savefig(file, dpi=150)


def _colour(weight: float) -> tuple[float, float, float, float] | None:
    if weight <= 1:
        return None
    return COLOURS(min(1.0, math.log(weight) / math.log(LARGEST)))


def span(text: str) -> tuple[int, int]:
    first, stop = text.split(":")
    return int(first), int(stop)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--evaluation", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=Path, required=True, metavar="DIR", help="the rows that were evaluated")
    parser.add_argument("--row", type=int, required=True, metavar="R")
    parser.add_argument("--spans", type=span, nargs="+", required=True, metavar="FIRST:STOP", help="tokens of the row")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    result, rows = EvaluationResult.load(options.evaluation), TokenRows(options.rows)
    if rows.header.fingerprint != result.header.data_fingerprint or result.short_nll is None:
        sys.exit("error: expected the rows that were evaluated, with --short-window")
    if result.header.packed:
        sys.exit("error: expected rows of one document, got packed rows")
    (weight_RT,) = weights_of(result, parse_weighting(["dense interpolation=0"])).values()
    text = Row.of([int(token) for token in rows[options.row]], load_tokenizer(options.rows / TOKENIZER_DIR))
    index = result.row_index.tolist().index(options.row)
    draw(lines_of(text, weight_RT[index], options.spans), options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
