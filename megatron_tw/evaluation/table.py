"""A comparison in figures: tables for the terminal and the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tw.evaluation.compare import CLEAR, FEW_ROWS, Comparison, Measure, ModelRow

Best = Literal["lowest", "highest"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells; the first column holds names."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: Best | None = None
    """Which figure of each column is the best, if that can be said of all."""
    words: bool = False
    """Whether the cells are text rather than figures."""
    groups: tuple[tuple[str, int], ...] = ()
    """A head above the head: a title, and how many columns after the first it spans."""
    folded: bool = False
    """Whether it is long and few want it: the page shows it when asked, the terminal does not."""
    last_is_summary: bool = False
    """Whether the last row is made from those above."""

    @property
    def full_head(self) -> tuple[str, ...]:
        """The head in one line: each column with the title of its group."""
        titles = [title for title, span in self.groups for _ in range(span)] or [""] * (len(self.head) - 1)
        named = zip(titles, self.head[1:], strict=True)
        return (self.head[0], *(" ".join(filter(None, (title, cell))) for title, cell in named))


def tables(comparison: Comparison) -> list[Table]:
    """NLL, difference to the reference, and NLL by position bucket."""
    n, key = comparison.old_context, comparison.key
    sets = ["model", "all targets"]
    sets += [] if n is None else [f"within {n:,}", f"beyond {n:,}"]
    sets += [] if key is None else [f"key tokens ({key.count:,})"]
    others = [model for model in comparison.models if model.name != comparison.reference]
    buckets = comparison.models[0].buckets
    found = [
        Table(
            title="NLL (nats per target)",
            head=(*sets, *([] if key is None else ["LongPPL"])),
            rows=tuple(
                (
                    model.name,
                    *(figure(measure.nll) for measure in _measures(model)),
                    *([] if key is None else [figure(model.long_ppl, 2)]),
                )
                for model in comparison.models
            ),
            best="lowest",
        ),
        Table(
            title="NLL by position of the target (tokens before it)",
            head=("model", *(f"{bucket.first:,}-{bucket.last:,}" for bucket in buckets)),
            rows=tuple((model.name, *(figure(bucket.nll) for bucket in model.buckets)) for model in comparison.models),
            best="lowest",
        ),
    ]
    if others:
        difference = Table(
            title=f"Difference to {comparison.reference} (± standard error over rows)",
            head=tuple(sets),
            rows=tuple((model.name, *(str(m.difference or "-") for m in _measures(model))) for model in others),
        )
        found.insert(1, difference)
    return found


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the tables."""
    n, key = comparison.old_context, comparison.key
    parts = "" if n is None else f" Within and beyond: targets with less, and with at least, {n:,} tokens of context."
    found = [
        f"{comparison.rows:,} rows of {comparison.seq_length:,} tokens, {comparison.targets:,} targets, the same for "
        f"every model.{parts}",
        *([] if key is None else [f"Key tokens: {key.describe()}. One fixed set for every model."]),
        f"Standard errors are over rows; a difference is called clear beyond {CLEAR:g} of them, in at "
        f"least {FEW_ROWS} rows. Each model is one "
        "training run: how much another seed would change is not in them.",
    ]
    if key is not None and key.count and key.name in {model.name for model in comparison.models}:
        found.append(
            f"{key.name} itself chose the key tokens, where its own prediction with the long context is "
            "good: their NLL favours it."
        )
    return found


def format_table(table: Table) -> str:
    """Aligned columns under the title."""
    rows = [table.full_head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    lines = [
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([table.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _measures(model: ModelRow) -> Sequence[Measure]:
    return [measure for measure in (model.all, model.within, model.beyond, model.key) if measure is not None]


def figure(value: float | None, decimals: int = 4) -> str:
    """A cell."""
    return "-" if value is None else f"{value:.{decimals}f}"
