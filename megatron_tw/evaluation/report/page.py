"""Sections to one HTML page that needs nothing else: figures, style and script are inline, and nothing is fetched."""

import csv
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.sections import Section
from megatron_tw.evaluation.report.verdict import ERRORS, WORDS, Verdict
from megatron_tw.evaluation.table import Table

FRAME = Path(__file__).with_name("page.html")
_FURTHER = re.compile(r" (\(.*\)|± .*)$")


def render_page(shown: Shown, verdicts: Sequence[Verdict], sections: Sequence[Section]) -> str:
    """The page."""
    body = [
        f"<header><h1>{escape(shown.title)}</h1>",
        f'<p class="subtitle">{escape(_subtitle(shown))}</p>',
        f"<nav>{''.join(_link(section.name, section.title) for section in sections)}{_link('made', 'How it was made')}"
        "</nav></header>",
    ]
    if verdicts:
        body.append(f'<section id="verdict"><h2>What came out</h2>{_verdicts(verdicts)}</section>')
    body += [_section(section) for section in sections]
    body.append(_made(shown))
    frame = FRAME.read_text(encoding="utf-8")
    return frame.replace("{{title}}", escape(shown.title)).replace("{{body}}", "\n".join(body))


def tables_csv(sections: Sequence[Section]) -> str:
    """Every table of the page, a line a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("section", "table", "row", "column", "value"))
    for section in sections:
        for table in section.tables:
            for row in table.rows:
                writer.writerows(
                    (section.name, table.title, row[0], column, cell)
                    for column, cell in zip(table.full_head[1:], row[1:], strict=True)
                )
    return text.getvalue()


def _subtitle(shown: Shown) -> str:
    names = ", ".join(shown.evaluations.folders)
    comparison = shown.comparison
    if comparison is None:
        return names
    old = "" if comparison.old_context is None else f"; the old context is {comparison.old_context:,} tokens"
    return (
        f"{names}: compared on the same {comparison.targets:,} held-out targets, in rows of "
        f"{comparison.seq_length:,} tokens{old}."
    )


def _link(name: str, title: str) -> str:
    return f'<a href="#{escape(name)}">{escape(title)}</a>'


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """The headline, then a group for what each is about, with the reference's figure beside its title."""
    headline = "".join(f"<p>{escape(verdict.text)}</p>" for verdict in verdicts if not verdict.about)
    groups = ""
    for about, group in groupby((verdict for verdict in verdicts if verdict.about), key=lambda verdict: verdict.about):
        of_group = list(group)
        facts = " ".join(verdict.text for verdict in of_group if verdict.kind == "fact")
        judged = "".join(_verdict(verdict) for verdict in of_group if verdict.kind != "fact")
        groups += f"<div><h3>{escape(about)}</h3><p>{escape(facts)}</p>{judged}</div>"
    details = f'<div class="verdicts">{groups}</div><p class="remark">{escape(ERRORS)}</p>' if groups else ""
    return f'<div class="headline">{headline}</div>{details}'


def _verdict(verdict: Verdict) -> str:
    return (
        f'<p class="verdict {verdict.kind}"><span class="badge">{WORDS[verdict.kind]}</span> {escape(verdict.text)}</p>'
    )


def _section(section: Section) -> str:
    lead = f"<p>{escape(section.lead)}</p>" if section.lead else ""
    drawings = "".join(f"<figure>{drawing.svg}</figure>" for drawing in section.drawings)
    said = "".join(f"<li>{escape(note)}</li>" for note in section.notes if note)
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{lead}'
        + (f'<div class="figures">{drawings}</div>' if drawings else "")
        + section.html
        + "".join(map(html_table, section.tables))
        + (f'<ul class="notes">{said}</ul>' if said else "")
        + "</section>"
    )


def html_table(table: Table) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    best = _best_cells(table)
    head = "".join(f'<th scope="col">{_cell(cell)}</th>' for cell in table.head)
    starts = {1 + sum(span for _, span in table.groups[:i]) for i in range(len(table.groups))}
    groups = "".join(f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>' for title, span in table.groups)
    above = f'<tr class="groups"><td></td>{groups}</tr>' if groups else ""
    rows = ""
    for r, row in enumerate(table.rows):
        cells = ""
        for c, cell in enumerate(row[1:], start=1):
            classes = (["best"] if (r, c) in best else []) + (["starts"] if c in starts else [])
            cells += f'<td class="{" ".join(classes)}">{_cell(cell)}</td>' if classes else f"<td>{_cell(cell)}</td>"
        summary = ' class="summary"' if table.last_is_summary and r == len(table.rows) - 1 else ""
        rows += f'<tr{summary}><th scope="row">{escape(row[0])}</th>{cells}</tr>'
    # The title stands outside, so that it does not scroll with the table.
    before, after = f'<p class="caption">{escape(table.title)}</p>', ""
    if table.folded:
        before, after = f"<details><summary>{escape(table.title)}</summary>", "</details>"
    return (
        f'{before}<div class="wide" tabindex="0" role="group" aria-label="{escape(table.title)}">'
        f"<table{' class=words' if table.words else ''}>"
        f"<thead>{above}<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{after}"
    )


def _cell(text: str) -> str:
    """A figure and its interval, error or count are two pieces: a narrow column has them on two lines."""
    return _FURTHER.sub(r" <span>\1</span>", escape(text))


def _best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the best figure of each column, ties included, where there are others."""
    if table.best is None or len(table.rows) < 2:
        return set()
    best = set()
    for column in range(1, len(table.head)):
        figures = {r: float(row[column].split()[0]) for r, row in enumerate(table.rows) if row[column] != "-"}
        if figures:
            limit = (min if table.best == "lowest" else max)(figures.values())
            best |= {(r, column) for r, value in figures.items() if value == limit}
    return best


def _made(shown: Shown) -> str:
    body = html_table(_evaluated(shown))
    if shown.commands is not None:
        body += f"<details open><summary>Commands</summary><pre>{escape(shown.commands.strip())}</pre></details>"
    body += "".join(
        f"<details><summary>Options of {escape(name)}</summary><pre>{escape(text.strip())}</pre></details>"
        for name, text in shown.options.items()
    )
    return f'<section id="made"><h2>How it was made</h2>{body}</section>'


def _evaluated(shown: Shown) -> Table:
    rows = []
    for name in shown.evaluations.folders:
        result, benchmarks = shown.evaluations.results.get(name), shown.evaluations.benchmarks.get(name)
        source = result.header if result is not None else benchmarks
        assert source is not None
        window = "-"
        if result is not None and result.header.short_window is not None:
            window = f"{result.header.short_window}, {result.header.short_stride}"
        rope = "-" if result is None else f"{result.header.rotary_base:g}"
        rows.append((name, source.model, source.layout, rope, window))
    return Table(
        title="What was evaluated",
        head=("model", "checkpoint", "layout", "rope base", "short window, stride"),
        rows=tuple(rows),
        words=True,
    )
