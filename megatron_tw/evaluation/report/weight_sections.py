"""Sections made from scores: their distribution, that of the weights, and a row's text by its weights."""

import dataclasses

import numpy as np

from megatron_tw.evaluation.position import beyond
from megatron_tw.evaluation.report import figures, heat_map
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.section import Section
from megatron_tw.evaluation.table import Table

SCORE_POINTS = 200
"""Of a distribution's curve."""


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
