"""Sections made from the loss of every target: recall of planted answers, loss by position."""

import dataclasses
from collections.abc import Callable

from megatron_tw.evaluation.report import figures
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.recall import Recall, RecallComparison
from megatron_tw.evaluation.report.section import Section
from megatron_tw.evaluation.table import Best, Table, figure, notes, tables


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


def _by_distance(recall: RecallComparison, title: str, cell: Callable[[Recall], str], best: Best) -> Table:
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
    return f"{100 * recall.share:.1f} ({100 * recall.low:.0f}-{100 * recall.high:.0f})"


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
