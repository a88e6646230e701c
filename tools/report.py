"""Compares evaluated models: prints the tables and writes one self-contained HTML page, its figures, JSON and CSV."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tw.config import user_errors
from megatron_tw.config.arguments import ToolParser, by_name, named_path, path, text
from megatron_tw.data.files import check_new_folder, new_folder
from megatron_tw.evaluation.compare import Comparison
from megatron_tw.evaluation.key_tokens import GAIN, KeyTokens, choose_key_tokens
from megatron_tw.evaluation.report.inputs import (
    Evaluations,
    Shown,
    choose_reference,
    compare_losses,
    read_recall,
    read_row,
    row_number,
)
from megatron_tw.evaluation.report.page import render_page, tables_csv
from megatron_tw.evaluation.report.sections import Section, sections_of
from megatron_tw.evaluation.report.verdict import WORDS, Verdict, verdicts_of
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.evaluation.table import format_table, notes
from megatron_tw.evaluation.training import read_metrics, read_options, read_text

EPILOG = """\
example:
  tools/report.py --evaluations base=eval/base uniform=eval/uniform sparse=eval/sparse \\
      --runs uniform=runs/uniform sparse=runs/sparse --key-tokens uniform --rows rows/heldout --output report

Sections for which nothing was evaluated are left out.
"""


def build_parser() -> ToolParser:
    parser = ToolParser("tools/report.py", __doc__ or "", EPILOG)
    models = parser.add_argument_group("Models", "What is compared.")
    models.add_argument(
        "--evaluations",
        nargs="+",
        required=True,
        type=named_path,
        metavar="NAME=DIR",
        help="folders that tools/evaluate.py wrote, in the order of the tables",
    )
    models.add_argument(
        "--runs",
        nargs="+",
        default=[],
        type=named_path,
        metavar="NAME=DIR",
        help="--save folders of training runs, for their curves and options",
    )
    models.add_argument(
        "--reference", type=text, metavar="NAME", help="model that others are compared to [uniform, else the first]"
    )
    models.add_argument("--base", type=text, metavar="NAME", help="model before the extension [base, if it is there]")
    models.add_argument(
        "--old-context",
        type=int,
        metavar="n",
        help="tokens of the context before the extension [the shortest that a model had]",
    )
    models.add_argument(
        "--answers",
        type=path,
        metavar="FILE",
        help="npz file of answers planted in the rows, for recall by distance: row, position, tokens, distance",
    )
    key = parser.add_argument_group("Key tokens", "Targets that the long context helps.")
    key.add_argument(
        "--key-tokens",
        type=text,
        metavar="NAME|DIR",
        help="the evaluation that chooses them, with a short NLL: one of the names, or another folder [none chosen]",
    )
    key.add_argument(
        "--gain",
        type=float,
        default=GAIN,
        metavar="NATS",
        help="by which the long context lowers a key token's NLL, at least [%(default)g]",
    )
    key.add_argument(
        "--max-long-nll",
        type=float,
        metavar="NATS",
        help="key tokens must have a long NLL below it (LongPPL: 2) [no such condition]",
    )
    weights = parser.add_argument_group("Weights", "What weighting would make of a model's scores.")
    weights.add_argument(
        "--weighting",
        nargs="+",
        default=["dense", "sparse"],
        type=text,
        metavar="'SCHEME NAME=NUMBER ...'",
        help="schemes whose weights are shown, as in --weighting-schedule [dense sparse]",
    )
    weights.add_argument(
        "--weights-of",
        type=text,
        metavar="NAME",
        help="model whose scores they are made from, with a short NLL [the one of --key-tokens, else the first]",
    )
    weights.add_argument(
        "--rows",
        type=path,
        metavar="DIR",
        help="the evaluated rows with their tokenizer: shows a row's text, each token coloured by its weight",
    )
    weights.add_argument(
        "--heat-map-row",
        type=int,
        metavar="ROW",
        help="row whose text is shown [the one whose loss the context beyond the window lowers most]",
    )
    page = parser.add_argument_group("Page", "What is written.")
    page.add_argument("--output", type=path, required=True, metavar="DIR", help="new or empty folder")
    page.add_argument("--title", type=text, default="Context extension: comparison of models", help="of the page")
    page.add_argument("--commands", type=path, metavar="FILE", help="text file to show: the commands that were run")
    return parser


def choose(options: argparse.Namespace, results: dict[str, EvaluationResult]) -> KeyTokens | None:
    """The key tokens by one of the evaluations that are compared, or by the evaluation in another folder."""
    if options.key_tokens is None:
        return None
    result = results.get(options.key_tokens) or EvaluationResult.load(options.key_tokens)
    return choose_key_tokens(result, options.key_tokens, gain=options.gain, max_long_nll=options.max_long_nll)


def weighed_model(options: argparse.Namespace, results: dict[str, EvaluationResult]) -> str | None:
    """The model whose scores are weighed; None: no evaluation has scores.

    Raises:
        ValueError: the model that was asked for has none.
    """
    scored = [name for name, result in results.items() if result.short_nll is not None]
    if options.weights_of is not None and options.weights_of not in scored:
        raise ValueError(
            f"--weights-of {options.weights_of}: expected a model whose evaluation has a short NLL: "
            f"{', '.join(scored) or 'none has'}"
        )
    chosen = options.weights_of or (options.key_tokens if options.key_tokens in scored else None)
    return chosen or (scored[0] if scored else None)


def read(options: argparse.Namespace) -> Shown:
    """Read, check and compare. Raises ValueError for what does not fit, before anything is written."""
    check_new_folder(options.output)
    evaluations = Evaluations.read(by_name("--evaluations", options.evaluations))
    results = dict(evaluations.results)
    runs = by_name("--runs", options.runs)
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    reference = choose_reference(evaluations, options.reference, options.base)
    base = options.base or ("base" if "base" in evaluations.folders else None)
    comparison = compare_losses(
        evaluations,
        choose(options, results),
        reference=reference,
        base=base,
        old_context=options.old_context,
    )
    weighed = weighed_model(options, results)
    if options.heat_map_row is not None and options.rows is None:
        raise ValueError("--heat-map-row: needs --rows, the text that is to be shown")
    if options.rows is not None and weighed is None:
        raise ValueError(f"--rows {options.rows}: no evaluation has a short NLL, so no token has a weight")
    row = text_row = None
    schemes = {}
    if weighed is not None:
        from megatron_tw.evaluation.report.weights import parse_weighting  # imports torch

        schemes = parse_weighting(options.weighting)
    if options.rows is not None and weighed is not None:
        row = choose_heat_map_row(results[weighed], options.heat_map_row)
        text_row = read_row(options.rows, results[weighed], row)
    return Shown(
        title=options.title,
        evaluations=evaluations,
        reference=reference,
        base=base,
        comparison=comparison,
        recall=read_recall(options.answers, evaluations, comparison),
        schemes=schemes,
        weighed=weighed,
        row=row,
        text=text_row,
        gain=options.gain,
        max_long_nll=options.max_long_nll,
        metrics=metrics,
        options={name: found for name, folder in runs.items() if (found := read_options(folder)) is not None},
        commands=read_text("--commands", options.commands) if options.commands else None,
    )


def choose_heat_map_row(result: EvaluationResult, row: int | None) -> int:
    """Index in the evaluation of the row whose text is shown."""
    from megatron_tw.evaluation.report.heat_map import choose_row

    return choose_row(result) if row is None else row_number(result, row)


def report_json(shown: Shown, verdicts: Sequence[Verdict], sections: Sequence[Section]) -> dict[str, Any]:
    """Every figure of the report."""
    return {
        "title": shown.title,
        "models": [{"name": name} for name in shown.evaluations.folders],
        **({} if shown.comparison is None else loss_json(shown.comparison)),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "records": {
            name: [dataclasses.asdict(record) for record in records]
            for name, records in shown.evaluations.records.items()
        },
        **{section.name: section.figures for section in sections if section.figures},
    }


def loss_json(comparison: Comparison) -> dict[str, Any]:
    """The figures of the loss; `models` then holds those of each."""
    key = comparison.key
    return {
        "reference": comparison.reference,
        "base": comparison.base,
        "old_context": comparison.old_context,
        "seq_length": comparison.seq_length,
        "rows": comparison.rows,
        "targets": comparison.targets,
        "key_tokens": None
        if key is None
        else {"source": key.name, "count": key.count, "gain": key.gain, "max_long_nll": key.max_long_nll},
        "models": [dataclasses.asdict(model) for model in comparison.models],
    }


def write(folder: Path, shown: Shown, verdicts: Sequence[Verdict], sections: Sequence[Section]) -> None:
    """The page, its figures as PNGs, and the figures as JSON and CSV."""
    page = render_page(shown, verdicts, sections)
    with new_folder(folder) as temporary:
        for section in sections:
            for drawing in section.drawings:
                (temporary / f"{drawing.name}.png").write_bytes(drawing.png)
        content = report_json(shown, verdicts, sections)
        (temporary / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (temporary / "report.csv").write_text(tables_csv(sections), encoding="utf-8")
        (temporary / "report.html").write_text(page, encoding="utf-8")


def as_text(shown: Shown, verdicts: Sequence[Verdict], sections: Sequence[Section]) -> str:
    """The tables and what came out, for a terminal."""
    parts = [format_table(table) for section in sections for table in section.tables if not table.folded]
    parts += ["\n".join(notes(shown.comparison))] if shown.comparison is not None else []
    said = [f"{verdict.about}: {verdict.text}".removeprefix(": ") + _word(verdict) for verdict in verdicts]
    parts += ["\n".join(said)] if said else []
    return "\n\n".join(parts)


def _word(verdict: Verdict) -> str:
    return f" ({WORDS[verdict.kind]})" if WORDS[verdict.kind] else ""


def main(argv: Sequence[str]) -> None:
    """Parse, compare, write, print. A user's mistake is one line on stderr and exit status 2."""
    with user_errors():
        options = build_parser().parse(argv)
        shown = read(options)
        sections, verdicts = sections_of(shown), verdicts_of(shown)
        write(options.output, shown, verdicts, sections)
        print(as_text(shown, verdicts, sections))
        print(f"\nwritten to {options.output}: report.html, report.json, report.csv and the figures")


if __name__ == "__main__":
    main(sys.argv[1:])
