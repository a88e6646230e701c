"""A comparison in words and figures: tables for the terminal and the page, and what may be concluded from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tw.evaluation.compare import CLEAR, FEW_ROWS, Comparison, Measure, ModelRow

NO_KEY_TOKENS = "No target is a key token, so nothing can be said about long-range prediction."


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells; the first column holds names."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: Literal["nll", "difference", "words"]
    """What the cells are: of NLLs, the lowest of each column is the best."""


def tables(comparison: Comparison) -> list[Table]:
    """NLL, difference to the reference, and NLL by position bucket."""
    n, key = comparison.old_context, comparison.key
    sets = ("model", "all targets", f"within {n}", f"beyond {n}", f"key tokens ({key.count:,})")
    others = [model for model in comparison.models if model.name != comparison.reference]
    buckets = comparison.models[0].buckets
    found = [
        Table(
            title="NLL (nats per target)",
            head=(*sets, "LongPPL"),
            rows=tuple(
                (model.name, *(_figure(measure.nll) for measure in _measures(model)), _figure(model.long_ppl, 2))
                for model in comparison.models
            ),
            kind="nll",
        ),
        Table(
            title="NLL by position of the target (tokens before it)",
            head=("model", *(f"{bucket.first}-{bucket.last}" for bucket in buckets)),
            rows=tuple((model.name, *(_figure(bucket.nll) for bucket in model.buckets)) for model in comparison.models),
            kind="nll",
        ),
    ]
    if others:
        difference = Table(
            title=f"Difference to {comparison.reference} (± standard error over rows)",
            head=sets,
            rows=tuple((model.name, *(str(m.difference or "-") for m in _measures(model))) for model in others),
            kind="difference",
        )
        found.insert(1, difference)
    return found


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the tables."""
    found = [
        f"{comparison.rows:,} rows of {comparison.seq_length:,} tokens, {comparison.targets:,} targets, the same for "
        f"every model. Within and beyond: targets with less, and with at least, {comparison.old_context:,} tokens of "
        "context.",
        f"Key tokens: {comparison.key.describe()}. One fixed set for every model.",
        f"Standard errors are over rows; a difference is called clear beyond {CLEAR:g} of them, in at "
        f"least {FEW_ROWS} rows. Each model is one "
        "training run: how much another seed would change is not in them.",
    ]
    if comparison.key.count and comparison.key.name in {model.name for model in comparison.models}:
        found.append(
            f"{comparison.key.name} itself chose the key tokens, where its own prediction with the long context is "
            "good: their NLL favours it."
        )
    return found


def verdicts(comparison: Comparison) -> list[str]:
    """What came out: one sentence for each model that is not the reference, after one that concerns all."""
    reference = comparison.reference
    found = [] if comparison.key.count else [NO_KEY_TOKENS]
    for model in comparison.models:
        if model.name == reference:
            continue
        sentence = f"{model.name} {_verdict(model.all, reference)} over all targets: NLL {model.all.difference}"
        if model.key.difference is not None:
            sentence += f"; it {_verdict(model.key, reference)} on the key tokens: NLL {model.key.difference}"
        found.append(f"{sentence}.")
    return found


def format_tables(comparison: Comparison) -> str:
    """Everything above as plain text."""
    parts = [format_table(table) for table in tables(comparison)]
    return "\n\n".join([*parts, "\n".join(notes(comparison)), "\n".join(verdicts(comparison))])


def format_table(table: Table) -> str:
    """Aligned columns under the title."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    lines = [
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([table.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _measures(model: ModelRow) -> Sequence[Measure]:
    return (model.all, model.within, model.beyond, model.key)


def _verdict(measure: Measure, reference: str) -> str:
    assert measure.difference is not None
    if measure.difference.rows < FEW_ROWS:
        return f"cannot be told from {reference} (only {measure.difference.rows} rows)"
    if not measure.difference.is_clear:
        return f"shows no clear difference to {reference}"
    return f"is {'better' if measure.difference.mean < 0 else 'worse'} than {reference}"


def _figure(value: float | None, decimals: int = 4) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
