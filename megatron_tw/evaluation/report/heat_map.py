"""A row's text, each token coloured by its weight, as HTML. page.html holds its style and what happens on hover, focus
and the arrow keys.

A long row is cut to where most of the weight is, and to the places where the words of its heaviest tokens stood before.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from megatron_tw.evaluation.key_tokens import key_tokens
from megatron_tw.evaluation.report.text import Row, best_span
from megatron_tw.evaluation.result import EvaluationResult

LEVELS = 9
"""Colours above none."""
SPAN_TOKENS = 400
"""Of the part that is shown for its weight."""
SOURCE_TOKENS = 8
"""Before and after a place where a word stood before; and the lines that these begin and end in."""
LINE_TOKENS = 40
"""A longer line is cut."""
JOINED_TOKENS = 24
"""Parts with no more between them are shown as one."""
TOP_TOKENS = 10
"""In the table."""


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Of one target."""

    position: int
    long_nll: float
    short_nll: float
    weights: tuple[float, ...]
    """By each weighting."""
    key: bool


@dataclass(frozen=True, kw_only=True)
class TopToken:
    """One of the heaviest tokens that are shown."""

    piece: int
    figures: TokenFigures
    before: str
    """The text that leads to it."""
    text: str
    source: int | None
    """Piece where its word stood before."""
    distance: int | None
    """Tokens from there."""
    source_text: str
    """The text there: up to the place, and a bit on."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """What is shown of a row."""

    model: str
    row: int
    """In the dataset."""
    text: Row
    window: int
    """n: targets from here on have a score."""
    gain: float
    weightings: tuple[str, ...]
    figures: tuple[tuple[TokenFigures, ...], ...]
    """Of each piece's tokens; none for the row's first token, which is no target, and for masked ones."""
    sources: Mapping[int, int]
    """Of pieces that are shown: where the word stood before."""
    segments: tuple[tuple[int, int], ...]
    """Pieces first .. stop - 1 that are shown."""
    largest: tuple[float, ...]
    """Weight that is shown, by each weighting."""
    top: tuple[TopToken, ...]


def choose_row(result: EvaluationResult) -> int:
    """Index of the row whose loss the context beyond the window lowers most, in all. (The weights of a row always sum
    to its length, so they do not tell rows apart.)"""
    assert result.short_nll is not None
    gain_RT = np.maximum(result.short_nll.astype(np.float64) - result.long_nll, 0.0)
    return int(gain_RT.sum(axis=1, where=result.valid).argmax())


def heat_map(
    result: EvaluationResult,
    index: int,
    text: Row,
    weights: Mapping[str, npt.NDArray[np.float32]],
    *,
    model: str,
    gain: float,
    max_long_nll: float | None,
) -> HeatMap:
    """The heat map of row `index` of an evaluation with short NLLs.

    weights: [R, T] by the weightings' names; the first decides what is shown of the row.
    """
    assert result.short_nll is not None
    assert result.header.short_window is not None
    long_T, short_T, valid_T = result.long_nll[index], result.short_nll[index], result.valid[index]
    key_T = key_tokens(long_T[None], short_T[None], valid_RT=valid_T[None], gain=gain, max_long_nll=max_long_nll)[0]
    window = result.header.short_window

    def of_token(position: int) -> TokenFigures:
        target = position - 1
        return TokenFigures(
            position=position,
            long_nll=float(long_T[target]),
            short_nll=float(short_T[target]),
            weights=tuple(float(weights_RT[index, target]) for weights_RT in weights.values()),
            key=bool(key_T[target]),
        )

    figures = tuple(
        tuple(of_token(p) for p in range(piece.first, piece.last) if p > 0 and valid_T[p - 1]) for piece in text.pieces
    )
    # Within the first window there is no score: what is weighed there is only what interpolation gives.
    first_weights = next(iter(weights.values()))[index]
    far_T = np.arange(1, len(long_T) + 1) >= window
    start, stop = best_span(np.where(far_T & valid_T, first_weights, 0.0).tolist(), SPAN_TOKENS)
    main = _whole_lines(text, text.piece_of_token[start + 1], text.piece_of_token[stop] + 1, LINE_TOKENS)
    heaviest = sorted(
        (number for number in range(*main) if any(one.position >= window for one in figures[number])),
        key=lambda number: (-max(one.weights[0] for one in figures[number]), number),
    )[:TOP_TOKENS]
    found = {number: text.seen_before(number) for number in heaviest}
    around = [
        _whole_lines(text, max(0, source - SOURCE_TOKENS), min(len(text.pieces), source + SOURCE_TOKENS), LINE_TOKENS)
        for source in found.values()
        if source is not None
    ]
    segments = _joined([main, *around], text)
    shown = [number for segment in segments for number in range(*segment)]
    sources = {number: source for number in shown if (source := text.seen_before(number)) is not None}
    return HeatMap(
        model=model,
        row=int(result.row_index[index]),
        text=text,
        window=window,
        gain=gain,
        weightings=tuple(weights),
        figures=figures,
        sources=sources,
        segments=segments,
        largest=tuple(
            max((one.weights[i] for number in shown for one in figures[number]), default=1.0)
            for i in range(len(weights))
        ),
        top=tuple(_top_token(text, number, figures[number], found[number]) for number in heaviest),
    )


def level(weight: float, largest: float) -> int:
    """Colour of a weight: 0 up to the mean weight 1, then LEVELS steps of equal ratio up to the largest.

    >>> [level(weight, 16.0) for weight in (0.0, 1.0, 1.1, 4.0, 16.0)]
    [0, 0, 1, 5, 9]
    """
    if weight <= 1 or largest <= 1:
        return 0
    return min(LEVELS, max(1, math.ceil(LEVELS * math.log(weight) / math.log(largest) - 1e-9)))


def html(shown: HeatMap) -> str:
    """The heat map with its switch, scale, text and table."""
    switch = "".join(
        f'<label><input type="radio" name="weighting" value="{i}"{" checked" if i == 0 else ""}> {escape(name)}</label>'
        for i, name in enumerate(shown.weightings)
    )
    return (
        '<div class="heat-map" id="heat-map">'
        f'<div class="controls"><fieldset><legend>Coloured by the weight under</legend>{switch}</fieldset>'
        f"{_scales(shown)}"
        '<p class="legend"><span class="token is-key">underlined</span> key token</p></div>'
        f'<div class="tokens" role="group" aria-label="Row {shown.row}, token by token">{_tokens(shown)}</div>'
        '<div class="tip" role="status" aria-live="polite" hidden></div></div>'
        f"{_top_table(shown)}"
    )


def _scales(shown: HeatMap) -> str:
    scales = ""
    for i, largest in enumerate(shown.largest):
        bounds = [largest ** (step / LEVELS) for step in range(1, LEVELS + 1)]
        label = f"weight 1 (the mean) or less, to {largest:.3g}"
        swatches = '<span class="swatch" data-level="0">≤1</span>' + "".join(
            f'<span class="swatch" data-level="{step}">{bound:.2g}</span>'
            for step, bound in enumerate(bounds, start=1)
            if largest > 1
        )
        hidden = "" if i == 0 else " hidden"
        scales += f'<div class="scale" data-weighting="{i}" role="img" aria-label="{label}"{hidden}>{swatches}</div>'
    return scales


def _tokens(shown: HeatMap) -> str:
    parts = []
    end = 0
    first_stop = shown.top[0].piece if shown.top else shown.segments[0][0]
    for first, stop in shown.segments:
        if first > end:
            parts.append(_gap(_tokens_between(shown.text, end, first)))
        for number in range(first, stop):
            text = _visible(shown.text.pieces[number].text)
            if first and number == first:  # it ends the line before, and indents this one
                text = text[text.rfind("\n") + 1 :] if text.strip() == "" else text
            if stop < len(shown.text.pieces) and number == stop - 1:
                text = text.rstrip()
            parts.append(_token(shown, number, text, can_be_tabbed_to=number == first_stop))
        end = stop
    if end < len(shown.text.pieces):
        parts.append(_gap(_tokens_between(shown.text, end, len(shown.text.pieces))))
    return "".join(parts)


def _gap(tokens: int) -> str:
    return f'<span class="gap">{tokens:,} tokens left out</span>'


def _token(shown: HeatMap, number: int, text: str, *, can_be_tabbed_to: bool) -> str:
    figures = shown.figures[number]
    if not figures:
        return f'<span class="no-target" id="t{number}">{escape(text)}</span>'
    levels = [level(max(one.weights[i] for one in figures), largest) for i, largest in enumerate(shown.largest)]
    classes = ["token"]
    classes += ["is-key"] if any(one.key for one in figures) else []
    ends_line = not text.strip() and (text.startswith("\n") or not text)
    classes += ["is-newline"] if ends_line else []
    data = ";".join(
        " ".join([str(one.position), f"{one.long_nll:.3f}", f"{one.short_nll:.3f}", f"{one.key:d}"]
                 + [f"{weight:.3g}" for weight in one.weights])
        for one in figures
    )  # fmt: skip
    source = shown.sources.get(number)
    seen = ""
    if source is not None:
        distance = shown.text.pieces[number].first - shown.text.pieces[source].first
        seen = f' data-source="{source}" data-distance="{distance}"'
    return (
        f'<span class="{" ".join(classes)}" id="t{number}" tabindex="{0 if can_be_tabbed_to else -1}" '
        f'data-level="{levels[0]}" data-levels="{" ".join(map(str, levels))}" data-figures="{data}"{seen}>'
        f"{escape(text)}</span>"
    )


def _visible(text: str) -> str:
    """With pictures of the control characters that a page does not show, or does not allow."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\n\t" else c for c in text)


def _top_table(shown: HeatMap) -> str:
    head = "".join(
        f'<th scope="col">{escape(cell)}</th>'
        for cell in (
            "token",
            "long NLL",
            "short NLL",
            *(f"weight, {name}" for name in shown.weightings),
            "stood before",
        )
    )
    rows = ""
    for top in shown.top:
        if top.source is None:
            seen = "not in this row"
        else:
            seen = f"{top.distance:,} tokens before: <code>{escape(_one_line(top.source_text))}</code>"
        before, word = escape(_one_line(top.before)), escape(_one_line(top.text))
        cells = [
            f'<a href="#t{top.piece}"><code>{before}<b>{word}</b></code></a>',
            f"{top.figures.long_nll:.2f}",
            f"{top.figures.short_nll:.2f}",
            *(f"{weight:.3g}" for weight in top.figures.weights),
            seen,
        ]
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return (
        '<p class="caption">The heaviest tokens that are shown</p><div class="wide" tabindex="0" role="group" '
        'aria-label="The heaviest tokens"><table class="top-tokens">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _top_token(text: Row, number: int, figures: Sequence[TokenFigures], source: int | None) -> TopToken:
    heaviest = max(figures, key=lambda one: one.weights[0])
    distance = None if source is None else text.pieces[number].first - text.pieces[source].first
    return TopToken(
        piece=number,
        figures=heaviest,
        before=_last_line(text.text[max(0, text.starts[number] - 40) : text.starts[number]]),
        text=text.pieces[number].text,
        source=source,
        distance=distance,
        source_text="" if source is None else _line_at(text, source),
    )


def _last_line(text: str) -> str:
    return (text if "\n" not in text.strip("\n") else text[text.rstrip("\n").rindex("\n") + 1 :]).lstrip()


def _line_at(text: Row, piece: int, reach: int = 30) -> str:
    """The line that holds a piece, up to some characters around it."""
    start = text.starts[piece] + (len(text.pieces[piece].text) - len(text.pieces[piece].text.lstrip()))
    stop = text.starts[piece] + len(text.pieces[piece].text)
    low, high = max(0, start - reach), min(len(text.text), stop + reach)
    low = max(low, text.text.rfind("\n", 0, start) + 1)
    newline = text.text.find("\n", stop)
    return text.text[low : high if newline < 0 else min(high, newline)].strip()


def _one_line(text: str) -> str:
    return _visible(text).replace("\n", "↵").replace("\t", " ")


def _whole_lines(text: Row, first: int, stop: int, reach: int) -> tuple[int, int]:
    """Pieces first .. stop - 1, and up to `reach` more on either side, to where a line begins and ends."""
    for start in range(first, max(0, first - reach) - 1, -1):
        before = text.pieces[start - 1].text if start else "\n"
        if "\n" in before:
            first = start - 1 if before.endswith((" ", "\t")) else start  # with its indentation
            break
    for end in range(stop, min(len(text.pieces), stop + reach) + 1):
        if end == len(text.pieces) or "\n" in text.pieces[end - 1].text:
            stop = end
            break
    return first, stop


def _joined(segments: Iterable[tuple[int, int]], text: Row) -> tuple[tuple[int, int], ...]:
    """In order, those that overlap or nearly touch as one."""
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(segments):
        if joined and _tokens_between(text, joined[-1][1], first) <= JOINED_TOKENS:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((first, stop))
    first, stop = joined[0]
    if _tokens_between(text, 0, first) <= JOINED_TOKENS:
        joined[0] = (0, stop)
    first, stop = joined[-1]
    if _tokens_between(text, stop, len(text.pieces)) <= JOINED_TOKENS:
        joined[-1] = (first, len(text.pieces))
    return tuple(joined)


def _tokens_between(text: Row, first: int, stop: int) -> int:
    """Tokens of pieces first .. stop - 1."""
    return text.pieces[stop - 1].last - text.pieces[first].first if stop > first else 0
