"""Sections made from results.json and ruler_samples.jsonl."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from megatron_tw.config.options import flag
from megatron_tw.evaluation.report import figures
from megatron_tw.evaluation.report.benchmarks import (
    RULER,
    RULER_TASKS,
    RulerTable,
    Score,
    average,
    is_overall,
    needle_map,
    ruler_tables,
)
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.section import Section
from megatron_tw.evaluation.report.verdict import NAMES
from megatron_tw.evaluation.results import Record
from megatron_tw.evaluation.table import Table

LONG_PPL_SETTINGS = ("longppl_evaluator", "longppl_context", "longppl_stride", "data_path", "eval_rows")
"""Options on which it depends what LongPPL is of; other lengths are lines of their own."""


def ruler_section(shown: Shown) -> Section | None:
    """RULER by task and length, a table for each metric."""
    found = ruler_tables(shown.evaluations.records)
    if not any(table.cells for table in found):
        return None
    shown_tables: list[Table] = []
    said: list[str] = []
    for table in found:
        shown_tables += _ruler_tables(table)
        said += [f"{task} was not run: {reason}." for task, reason in table.not_run.items()]
    tasks = {score.tasks for table in found for score in table.averages.values()}
    return Section(
        name="ruler",
        title="RULER",
        lead="Shares of 100. Averages are over the tasks that every model was scored on at that length.",
        drawings=[figures.draw_ruler(table) for table in found if table.averages],
        tables=shown_tables,
        notes=[
            *([f"Averages over {_numbers(tasks)} of {RULER_TASKS} tasks."] if tasks else []),
            *dict.fromkeys(said),
            "Exactness is the share of answers all of whose tokens are the model's first choice in one forward pass: "
            "stricter than RULER's string match on generated text, and not to be compared with it."
            if any(table.metric == "exactness" for table in found)
            else "",
        ],
        figures={
            table.metric: {
                "records": [
                    {"model": model, **dataclasses.asdict(cell)} for (model, _, _), cell in table.cells.items()
                ],
                "averages": [
                    {"model": model, "length": length, **dataclasses.asdict(score)}
                    for (model, length), score in table.averages.items()
                ],
            }
            for table in found
        },
    )


def _ruler_tables(table: RulerTable) -> list[Table]:
    metric = table.metric.replace("_", " ")
    averages = Table(
        title=f"Average {metric} by length",
        head=("model", *(f"{length:,}" for length in table.lengths), "all lengths"),
        rows=tuple(
            (
                model,
                *(_score_cell(table.averages.get((model, length))) for length in table.lengths),
                _score_cell(average(table, model)),
            )
            for model in table.models
        ),
        best="highest",
    )
    columns = [(length, model) for length in table.lengths for model in table.models]
    one = len(table.models) == 1

    def cell(task: str, length: int, model: str) -> str:
        record = table.cells.get((model, task, length))
        return "not run" if record is None or record.value is None else f"{100 * record.value:.1f}"

    rows = [(task, *(cell(task, length, model) for length, model in columns)) for task in table.tasks]
    means = [table.averages.get((model, length)) for length, model in columns]
    counts = "/".join(str(n) for n in sorted({score.tasks for score in means if score is not None}))
    rows.append(
        (f"average of {counts or 0}", *("-" if score is None else f"{100 * score.value:.1f}" for score in means))
    )
    tasks = Table(
        title=f"By task: {metric}",
        head=("task", *(f"{length:,}" if one else model for length, model in columns)),
        groups=() if one else tuple((f"{length:,} tokens", len(table.models)) for length in table.lengths),
        rows=tuple(rows),
        last_is_summary=True,
    )
    return [averages, tasks]


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score.value:.1f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.1f}")


def _numbers(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def needle_section(shown: Shown) -> Section | None:
    """A heat map of depth by length for each model."""
    maps = [needle_map(model, samples) for model, samples in shown.evaluations.samples.items()]
    found = [one for one in maps if one is not None]
    if not found:
        return None
    return Section(
        name="needles",
        title="Needles by depth and length",
        lead="How often the model found a needle, by where it stands in the prompt (0%: at its start) and the length: "
        "from dark blue (never) to yellow (always).",
        drawings=[figures.draw_needles(one, number) for number, one in enumerate(found, start=1)],
        figures={one.model: dataclasses.asdict(one) for one in found},
    )


def benchmark_section(shown: Shown) -> Section | None:
    """LongPPL and the tasks of the harness; those that an overall figure is made from are folded away."""
    records = shown.evaluations.records
    lines: dict[tuple[str, str, str, int | None], dict[str, Record]] = {}
    for model, of_model in records.items():
        for record in of_model:
            if record.suite not in (RULER, "loss"):
                key = (record.suite, record.task, record.metric, record.length)
                lines.setdefault(key, {})[model] = record
    if not lines:
        return None
    with_overall = {suite for suite, task, _, _ in lines if is_overall(task, suite)}
    rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for (suite, task, metric, length), of_models in lines.items():
        overall = is_overall(task, suite)
        name = NAMES.get(suite, suite) + ("" if overall else f": {task}")
        tokens = "" if length is None else f", {length:,} tokens"
        line = (name + tokens, metric.replace("_", " "), *_benchmark_cells(of_models, list(records)))
        rows[suite in with_overall and not overall].append(line)
    missing = {
        f"{NAMES.get(record.suite, record.suite)} {record.task} was not run: {record.not_run}."
        for of_models in lines.values()
        for record in of_models.values()
        if record.not_run
    }
    titles = {False: "Results", True: "The tasks that they are made from"}
    return Section(
        name="benchmarks",
        title="LongPPL and benchmarks",
        lead="Figures with their standard error, and how many samples they are over. Shares are of 100.",
        tables=[
            Table(title=titles[folded], head=("task", "metric", *records), rows=tuple(of_kind), folded=folded)
            for folded, of_kind in rows.items()
            if of_kind
        ],
        notes=[*sorted(missing), *_long_ppl_notes(shown)],
    )


def _long_ppl_notes(shown: Shown) -> list[str]:
    """Why the models' LongPPL does not compare: other settings, or key tokens that each chose for itself."""
    of_models = {
        name: results
        for name, results in shown.evaluations.benchmarks.items()
        if any(record.suite == "longppl" and record.value is not None for record in results.records)
    }
    if len(of_models) < 2:
        return []
    differ = []
    for option in LONG_PPL_SETTINGS:
        values = {name: results.settings.get(option) for name, results in of_models.items()}
        if option == "data_path" and all(name in shown.evaluations.results for name in of_models):
            continue  # compared by their content, and found the same
        if len({json.dumps(value) for value in values.values()}) > 1:
            said = ", ".join(f"{'none' if value is None else value} ({name})" for name, value in values.items())
            differ.append(f"{flag(option)} {said}")
    if differ:
        return [f"LongPPL was not measured alike, so its figures do not compare: {'; '.join(differ)}."]
    if all(results.settings.get("longppl_evaluator", ...) is None for results in of_models.values()):
        return ["LongPPL is over the key tokens that each model chose for itself, so its figures hardly compare."]
    return []


def _benchmark_cells(of_models: Mapping[str, Record], models: Sequence[str]) -> list[str]:
    """A record's figure under each model. What is at most 1 under all of them is a share."""
    values = [record.value for record in of_models.values() if record.value is not None]
    scale, digits = (100, 1) if values and max(values) <= 1 else (1, 2)
    cells = []
    for model in models:
        record = of_models.get(model)
        if record is None or record.value is None:
            cells.append("-" if record is None else "not run")
            continue
        error = "" if record.stderr is None else f" ± {scale * record.stderr:.{digits}f}"
        cells.append(f"{scale * record.value:.{digits}f}{error} ({record.samples:,})")
    return cells
