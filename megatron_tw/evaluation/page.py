"""One HTML page that needs nothing else: images are embedded, the style is inline, and nothing is fetched."""

import base64
from collections.abc import Mapping
from html import escape

from megatron_tw.evaluation.compare import Comparison
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.evaluation.table import Table, notes, tables, verdicts

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; background: #fff; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.subtitle { color: #5a6472; margin: 0 0 1.5rem; }
.verdict { border-left: 4px solid #0072B2; background: #eef5fa; padding: .7rem 1rem; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1.4rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid #dde1e6; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1c2430; }
table.words th, table.words td { text-align: left; }
table.words td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; }
td.best { font-weight: 700; color: #005a8c; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
pre { background: #f0f2f5; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; } .notes { color: #414b58; font-size: .92rem; }
"""


def render_page(
    comparison: Comparison,
    results: Mapping[str, EvaluationResult],
    *,
    title: str,
    plots: Mapping[str, bytes],
    options: Mapping[str, str],
    commands: str | None,
) -> str:
    """The page.

    Args:
        results: the evaluations, for what was evaluated.
        plots: PNGs by their description.
        options: the resolved options of training runs, by the runs' names.
        commands: what was run, as text.
    """
    best = min(
        (model for model in comparison.models if model.all.nll is not None),
        key=lambda model: model.all.nll or 0.0,
        default=None,
    )
    lines = [*verdicts(comparison)]
    if best is not None:
        lines.insert(0, f"Lowest NLL over all held-out targets: {best.name}, {best.all.nll:.4f} nats.")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="subtitle">{escape(_subtitle(comparison))}</p>',
        "<h2>What came out</h2>",
        *(f'<p class="verdict">{escape(line)}</p>' for line in lines),
        "<h2>Figures</h2>",
        *(_html_table(table) for table in tables(comparison)),
        f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes(comparison))}</ul>',
        "<h2>Plots</h2>",
        *(f'<img alt="{escape(name)}" src="data:image/png;base64,{_base64(png)}">' for name, png in plots.items()),
        "<h2>What was evaluated</h2>",
        _html_table(_evaluated(results)),
    ]
    if commands is not None or options:
        body.append("<h2>How it was made</h2>")
    if commands is not None:
        body.append(f"<details open><summary>Commands</summary><pre>{escape(commands.strip())}</pre></details>")
    body += [
        f"<details><summary>Options of {escape(name)}</summary><pre>{escape(text.strip())}</pre></details>"
        for name, text in options.items()
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _subtitle(comparison: Comparison) -> str:
    names = ", ".join(model.name for model in comparison.models)
    return (
        f"{names}: compared on the same {comparison.targets:,} held-out targets, in rows of "
        f"{comparison.seq_length:,} tokens; the old context is {comparison.old_context:,} tokens."
    )


def _html_table(table: Table) -> str:
    best = _best_cells(table) if table.kind == "nll" else set()
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = ""
    for r, row in enumerate(table.rows):
        cells = (_cell(cell, is_best=(r, c) in best) for c, cell in enumerate(row))
        rows += f"<tr>{''.join(cells)}</tr>"
    return (
        f'<div class="wide"><table class="{table.kind}"><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str, *, is_best: bool) -> str:
    return f'<td class="best">{escape(text)}</td>' if is_best else f"<td>{escape(text)}</td>"


def _best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the lowest figure of each column, ties included."""
    best = set()
    for column in range(1, len(table.head)):
        figures = [(float(row[column]), r) for r, row in enumerate(table.rows) if row[column] != "-"]
        best |= {(r, column) for value, r in figures if value == min(figures)[0]}
    return best


def _evaluated(results: Mapping[str, EvaluationResult]) -> Table:
    return Table(
        title="",
        head=("model", "checkpoint", "layout", "rope base", "short window, stride"),
        rows=tuple(
            (
                name,
                result.header.model,
                result.header.layout,
                f"{result.header.rotary_base:g}",
                "-"
                if result.header.short_window is None
                else f"{result.header.short_window}, {result.header.short_stride}",
            )
            for name, result in results.items()
        ),
        kind="words",
    )


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")
