"""Compares evaluated models: prints the tables, writes plots, report.json and one self-contained HTML page."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from megatron_tw.config import user_errors
from megatron_tw.config.arguments import ToolParser, by_name, named_path, path, text
from megatron_tw.data.files import new_folder
from megatron_tw.evaluation.compare import Comparison, compare
from megatron_tw.evaluation.key_tokens import GAIN, KeyTokens, choose_key_tokens
from megatron_tw.evaluation.page import render_page
from megatron_tw.evaluation.plots import plot_key_tokens, plot_nll_by_position, plot_training
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.evaluation.table import format_tables, verdicts
from megatron_tw.evaluation.training import read_metrics, read_options, read_text

EPILOG = """\
example:
  tools/report.py --evaluations base=eval/base uniform=eval/uniform sparse=eval/sparse \\
      --runs uniform=runs/uniform sparse=runs/sparse --key-tokens uniform --output report
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
    key = parser.add_argument_group("Key tokens", "Targets that the long context helps.")
    key.add_argument(
        "--key-tokens",
        required=True,
        type=text,
        metavar="NAME|DIR",
        help="the evaluation that chooses them, with a short NLL: one of the names, or another folder",
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
    page = parser.add_argument_group("Page", "What is written.")
    page.add_argument("--output", type=path, required=True, metavar="DIR", help="new or empty folder")
    page.add_argument("--title", type=text, default="Context extension: comparison of models", help="of the page")
    page.add_argument("--commands", type=path, metavar="FILE", help="text file to show: the commands that were run")
    return parser


def choose(
    argument: str, results: dict[str, EvaluationResult], *, gain: float, max_long_nll: float | None
) -> KeyTokens:
    """The key tokens by one of the evaluations that are compared, or by the evaluation in another folder."""
    result = results.get(argument) or EvaluationResult.load(argument)
    return choose_key_tokens(result, argument, gain=gain, max_long_nll=max_long_nll)


def report_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure of the comparison."""
    return {
        "reference": comparison.reference,
        "base": comparison.base,
        "old_context": comparison.old_context,
        "seq_length": comparison.seq_length,
        "rows": comparison.rows,
        "targets": comparison.targets,
        "key_tokens": {
            "source": comparison.key.name,
            "count": comparison.key.count,
            "gain": comparison.key.gain,
            "max_long_nll": comparison.key.max_long_nll,
        },
        "models": [dataclasses.asdict(model) for model in comparison.models],
        "verdicts": verdicts(comparison),
    }


def write_report(options: argparse.Namespace) -> Comparison:
    """Read, compare, draw, write. Raises ValueError for what does not fit, before anything is written."""
    evaluations = by_name("--evaluations", options.evaluations)
    runs = by_name("--runs", options.runs)
    results = {name: EvaluationResult.load(folder) for name, folder in evaluations.items()}
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    commands = read_text("--commands", options.commands) if options.commands else None
    key = choose(options.key_tokens, results, gain=options.gain, max_long_nll=options.max_long_nll)
    comparison = compare(results, key, old_context=options.old_context, reference=options.reference, base=options.base)
    plots = {
        "nll_by_position.png": plot_nll_by_position(comparison, results),
        "key_tokens.png": plot_key_tokens(comparison),
    }
    if metrics:
        plots["training.png"] = plot_training(metrics)
    page = render_page(
        comparison,
        results,
        title=options.title,
        plots=plots,
        options={name: text for name, folder in runs.items() if (text := read_options(folder)) is not None},
        commands=commands,
    )
    with new_folder(options.output) as folder:
        for name, png in plots.items():
            (folder / name).write_bytes(png)
        (folder / "report.json").write_text(json.dumps(report_json(comparison), indent=2) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page, encoding="utf-8")
    return comparison


def main(argv: Sequence[str]) -> None:
    """Parse, compare, write, print. A user's mistake is one line on stderr and exit status 2."""
    with user_errors():
        options = build_parser().parse(argv)
        comparison = write_report(options)
        print(format_tables(comparison))
        print(f"\nwritten to {options.output}: report.html, report.json and the plots")


if __name__ == "__main__":
    main(sys.argv[1:])
