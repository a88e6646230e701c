"""Benchmark results of several models side by side: RULER by task and length, needles by depth, averages, trade-off.

Averages are over the tasks that every model has a value of, so that a model is not better for having skipped one; how
many they are is said.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_tw.evaluation.compare import Difference, ratio_difference
from megatron_tw.evaluation.report.intervals import of_mean
from megatron_tw.evaluation.results import Record

SAMPLES_FILE = "ruler_samples.jsonl"
RULER = "ruler"
RULER_TASKS = 13
SHORT_SUITES = ("mmlu", "bbh")
LONG_SUITES = ("longbench", "longbench2")
OVERALL = ("all", "average")
DEPTHS = 10
"""Bins of the needle heat map."""


def is_overall(task: str, suite: str = RULER) -> bool:
    """Whether a record's task is made from the suite's others."""
    return task in (*OVERALL, suite) or task.startswith("average of ")


Records = Mapping[str, Sequence[Record]]
"""By the models' names."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A scored example of RULER."""

    task: str
    length: int
    index: int
    depths: tuple[float, ...]
    """Where its needles stand, as shares of the prompt."""
    scores: tuple[float, ...]
    """Of each needle, or one for all."""
    metric: str = ""

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


def read_samples(file: Path) -> list[Sample]:
    """The lines of ruler_samples.jsonl.

    Raises:
        ValueError: a line that is no sample, or no text; names the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from error
    samples = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            content = json.loads(line)
            sample = Sample(
                task=str(content["task"]),
                length=int(content["length"]),
                index=int(content["index"]),
                depths=tuple(float(depth) for depth in content.get("depths") or ()),
                scores=tuple(float(score) for score in content["scores"]),
                metric=str(content.get("metric", "")),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: expected a sample with task, length, index, scores") from error
        if not sample.scores or not all(0 <= one <= 1 for one in (*sample.scores, *sample.depths)):
            raise ValueError(f"{file}, line {number}: expected scores and depths of 0 to 1, got {line[:80]}")
        samples.append(sample)
    return samples


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over tasks, as a share of 1."""

    value: float
    stderr: float | None
    tasks: int
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class RulerTable:
    """One metric's scores of all models."""

    metric: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    cells: Mapping[tuple[str, str, int], Record]
    """By model, task, length; those that were run."""
    common: Mapping[int, tuple[str, ...]]
    """By length, the tasks that every model has there; without lengths that have none."""
    averages: Mapping[tuple[str, int], Score]
    """By model and length, over the common tasks."""
    not_run: Mapping[str, str]
    """Why a task has no value in some model."""


def ruler_tables(records: Records) -> list[RulerTable]:
    """A table for each metric, in the order in which they come."""
    found = [record for of_model in records.values() for record in of_model if record.suite == RULER]
    found = [record for record in found if not is_overall(record.task) and record.length is not None]
    return [_ruler_table(records, metric) for metric in dict.fromkeys(record.metric for record in found)]


def _ruler_table(records: Records, metric: str) -> RulerTable:
    cells: dict[tuple[str, str, int], Record] = {}
    not_run: dict[str, str] = {}
    for model, of_model in records.items():
        for record in of_model:
            if record.suite != RULER or record.metric != metric or is_overall(record.task):
                continue
            if record.value is not None and record.length is not None:
                cells[model, record.task, record.length] = record
            else:
                not_run[record.task] = record.not_run or "no samples"
    models = tuple(dict.fromkeys(model for model, _, _ in cells))
    tasks = tuple(dict.fromkeys([*(task for _, task, _ in cells), *not_run]))
    lengths = tuple(sorted({length for _, _, length in cells}))
    everywhere = {
        length: tuple(task for task in tasks if all((model, task, length) in cells for model in models))
        for length in lengths
    }
    common = {length: of_length for length, of_length in everywhere.items() if of_length}
    return RulerTable(
        metric=metric,
        models=models,
        tasks=tasks,
        lengths=lengths,
        cells=cells,
        common=common,
        averages={
            (model, length): _mean([cells[model, task, length] for task in of_length])
            for length, of_length in common.items()
            for model in models
        },
        not_run=not_run,
    )


def ruler_difference(
    samples: Mapping[str, Sequence[Sample]], table: RulerTable, model: str, reference: str
) -> Difference | None:
    """Of the two models' `average`, on the same examples: the mean over the common tasks of a length, then over the
    lengths, with its standard error over examples within tasks; None where a model's examples are not there."""
    ours, theirs = (
        {(s.task, s.length, s.index): s.score for s in samples.get(name, ())} for name in (model, reference)
    )
    by_task: dict[tuple[str, int], list[float]] = defaultdict(list)
    for key in ours.keys() & theirs.keys():
        by_task[key[:2]].append(ours[key] - theirs[key])
    of_lengths = []
    for length, tasks in table.common.items():
        of_tasks = [np.array(by_task[task, length]) for task in tasks]
        parts = [ratio_difference(more, np.ones(len(more), np.int64)) for more in of_tasks]
        known = [part for part in parts if part is not None]
        if len(known) < len(tasks):
            return None  # else it were of other tasks than the averages
        of_lengths.append(_mean_difference(known))
    return _mean_difference(of_lengths) if of_lengths else None


def _mean_difference(parts: Sequence[Difference]) -> Difference:
    """The plain mean of independent differences."""
    return Difference(
        mean=sum(part.mean for part in parts) / len(parts),
        standard_error=of_mean([part.standard_error for part in parts]),
        rows=sum(part.rows for part in parts),
    )


def average(table: RulerTable, model: str) -> Score | None:
    """The mean of a model's averages over the lengths; None: it has none."""
    scores = [table.averages[model, length] for length in table.lengths if (model, length) in table.averages]
    if not scores:
        return None
    return Score(
        value=sum(score.value for score in scores) / len(scores),
        stderr=of_mean([score.stderr for score in scores]),
        tasks=min(score.tasks for score in scores),
        samples=sum(score.samples for score in scores),
    )


@dataclass(frozen=True, kw_only=True)
class NeedleMap:
    """A model's scores by depth and length."""

    model: str
    lengths: tuple[int, ...]
    shares: tuple[tuple[float | None, ...], ...]
    """[depth bin][length]; None: no needle there."""
    counts: tuple[tuple[int, ...], ...]


def needle_map(model: str, samples: Iterable[Sample]) -> NeedleMap | None:
    """The needles of the niah tasks' examples, under the first one's metric; None: there are none."""
    samples = [sample for sample in samples if sample.task.startswith("niah_")]
    samples = [sample for sample in samples if sample.metric == samples[0].metric]
    hits: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        scores = sample.scores if len(sample.scores) == len(sample.depths) else [sample.score] * len(sample.depths)
        for depth, score in zip(sample.depths, scores, strict=True):
            hits[min(int(depth * DEPTHS), DEPTHS - 1), sample.length].append(score)
    if not hits:
        return None
    lengths = tuple(sorted({length for _, length in hits}))
    grid = [[hits.get((depth, length), []) for length in lengths] for depth in range(DEPTHS)]
    return NeedleMap(
        model=model,
        lengths=lengths,
        shares=tuple(tuple(sum(cell) / len(cell) if cell else None for cell in row) for row in grid),
        counts=tuple(tuple(len(cell) for cell in row) for row in grid),
    )


def suite_scores(records: Records, suite: str) -> dict[str, Score]:
    """Each model's score of a suite of the harness: its overall record, else the mean over the tasks that all have. Of
    several metrics of a task, the first."""
    of_suite: dict[str, dict[str, Record]] = {}
    for model, of_model in records.items():
        for record in of_model:
            if record.suite == suite and record.value is not None:
                of_suite.setdefault(model, {}).setdefault(record.task, record)
    if not of_suite:
        return {}
    common = set.intersection(*(set(tasks) for tasks in of_suite.values()))
    overall = sorted(task for task in common if is_overall(task, suite))
    parts = sorted(common - set(overall))
    chosen = overall[:1] or parts
    means = {model: _mean([tasks[name] for name in chosen]) for model, tasks in of_suite.items() if chosen}
    return {model: replace(mean, tasks=len(parts) or 1) for model, mean in means.items()}


def _mean(records: Sequence[Record]) -> Score:
    values = [record.value for record in records if record.value is not None]
    assert len(values) == len(records) > 0
    value = sum(values) / len(values)
    errors = [_stderr(record) for record in records]
    return Score(value=value, stderr=of_mean(errors), tasks=len(records), samples=sum(r.samples for r in records))


def _stderr(record: Record) -> float | None:
    """As the record says, else that of a share of its samples; None: one sample alone says nothing of its spread."""
    if record.samples < 2:
        return None
    if record.stderr is not None or record.value is None or not 0 <= record.value <= 1:
        return record.stderr
    return math.sqrt(record.value * (1 - record.value) / record.samples)
