"""RULER's examples with their scores: what is to be scored, exactness on the parallel model, and what is written."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_tw.config.ruler import RulerOptions
from megatron_tw.data.tokenizer import Tokenizer
from megatron_tw.evaluation.kept import Kept, in_passes
from megatron_tw.evaluation.results import Record
from megatron_tw.evaluation.ruler.exactness import Flags, Forward
from megatron_tw.evaluation.ruler.prompt import Prompt
from megatron_tw.evaluation.ruler.rows import tokenize
from megatron_tw.evaluation.ruler.tasks import TASKS, Examples, Texts
from megatron_tw.evaluation.ruler.texts import FROM, read_essay, read_hotpotqa, read_squad
from megatron_tw.evaluation.tasks import Found
from megatron_tw.parallel.contact import now_at

SAMPLES_FILE = "ruler_samples.jsonl"
EXACTNESS, STRING_MATCH = "exactness", "string_match"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for. examples: of each task and length. not_run: why tasks are left out."""

    examples: tuple[Examples, ...]
    not_run: Mapping[str, str]
    lengths: tuple[int, ...]
    samples: int
    tokenizer: Tokenizer
    first_ids: tuple[int, ...]

    def number(self, examples: Examples) -> int:
        """Examples of one task at one length."""
        return self.samples if examples.available is None else min(self.samples, examples.available)


def open_examples(
    options: RulerOptions,
    names: Sequence[str],
    lengths: Sequence[int],
    texts: Texts,
    tokenizer: Tokenizer,
    first_ids: tuple[int, ...],
) -> Work:
    """What is to be scored.

    Raises:
        ValueError: a task that does not fit a length.
    """
    missing = {
        name: f"needs --ruler-{text}, {FROM[f'--ruler-{text}']}"
        for name in names
        if (text := TASKS[name].text) is not None and getattr(texts, text) is None
    }
    try:
        examples = tuple(
            Examples(name, length, tokenizer, texts, seed=options.ruler_seed, first_tokens=len(first_ids))
            for length in lengths
            for name in names
            if name not in missing
        )
        work = Work(
            examples=examples,
            not_run=missing,
            lengths=tuple(lengths),
            samples=options.ruler_samples,
            tokenizer=tokenizer,
            first_ids=first_ids,
        )
        for one in examples:
            one.check(work.number(one))
    except ValueError as error:
        raise ValueError(f"--ruler-lengths: {error}") from error
    return work


def open_texts(options: RulerOptions, names: Sequence[str]) -> Texts:
    """Those that the tasks want and the user named.

    Raises:
        ValueError: one cannot be read.
    """
    readers: dict[str, tuple[str | None, Callable[[Path], object]]] = {
        "essay": (options.ruler_essay, read_essay),
        "squad": (options.ruler_squad, read_squad),
        "hotpotqa": (options.ruler_hotpotqa, read_hotpotqa),
    }
    wanted = {TASKS[name].text for name in names}
    opened = {text: read(Path(file)) for text, (file, read) in readers.items() if file is not None and text in wanted}
    return Texts(**opened)  # type: ignore[arg-type]


def first_tokens(bos_id: int | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before a prompt: --bos-id, else what the tokenizer puts before every text."""
    return (bos_id,) if bos_id is not None else tuple(tokenizer.first_ids())


def ruler_exactness(
    forward: Forward,
    examples: Examples,
    work: Work,
    *,
    kept: Kept | None = None,
    keep_bar: bool = True,
    place: str = "",
) -> Flags | None:
    """Teacher-forced exactness of one task at one length, in the order of the examples; on the writing rank at least,
    None before the last pipeline stage. Collective over the world. place: for the progress, among what else is done."""
    layout, total = forward.layout, work.number(examples)
    what = f"{examples.name} at {examples.length:,}"

    def one_pass(index: int) -> Flags | None:
        first = index * forward.examples_per_pass
        now_at(f"{what}, example {first}")
        left = min(total - first, forward.examples_per_pass)
        mine = range(first + layout.dp_rank, first + left, layout.dp_size) or [total - 1]
        rows = [tokenize(examples.example(number), work.tokenizer, work.first_ids) for number in mine]
        return forward.exactness(rows, left)

    passes = -(-total // forward.examples_per_pass)
    return in_passes(
        one_pass,
        [1] * passes,
        layout,
        what=f"{what}{place}",
        kept=kept,
        name=f"ruler-{examples.name}-{examples.length}",
        keep_bar=keep_bar,
    )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An example and its scores, 0 to 1: one of each answer, where that is known. more: what else is known of it."""

    prompt: Prompt
    scores: tuple[float, ...]
    more: Mapping[str, str | bool]

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """All samples of one task at one length."""

    name: str
    length: int
    samples: tuple[Sample, ...]

    @property
    def mean(self) -> float:
        return float(np.mean([sample.score for sample in self.samples]))

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over examples."""
        values = [sample.score for sample in self.samples]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def scores_of(examples: Examples, flags: Flags) -> Scored:
    """The examples with what `ruler_exactness` found of them."""
    samples = (
        Sample(prompt=examples.example(index), scores=tuple(map(float, answers)), more={"exact": bool(exact)})
        for index, (answers, exact) in enumerate(zip(flags["answers"], flags["exact"], strict=True))
    )
    return Scored(name=examples.name, length=examples.length, samples=tuple(samples))


def found(work: Work, scored: Sequence[Scored], metric: str) -> Found:
    """Records and ruler_samples.jsonl."""
    return Found(records=tuple(_records(work, scored, metric)), files={SAMPLES_FILE: _sample_lines(scored, metric)})


def _records(work: Work, scored: Sequence[Scored], metric: str) -> list[Record]:
    """Of each length the tasks, and their average: the mean of the tasks that were run."""
    records = []
    for length in work.lengths:
        here = [task for task in scored if task.length == length]
        records += [
            Record(
                suite="ruler", task=task.name, length=length, metric=metric, value=task.mean, stderr=task.stderr,
                samples=len(task.samples),
            )
            for task in here
        ]  # fmt: skip
        records += [
            Record(suite="ruler", task=name, length=length, metric=metric, not_run=reason)
            for name, reason in work.not_run.items()
        ]
        if len(here) + len(work.not_run) > 1 and here:
            errors = [task.stderr for task in here]
            known = [error for error in errors if error is not None]
            records.append(
                Record(
                    suite="ruler",
                    task=f"average of {len(here)} tasks",
                    length=length,
                    metric=metric,
                    value=float(np.mean([task.mean for task in here])),
                    stderr=math.hypot(*known) / len(here) if len(known) == len(here) else None,
                    samples=sum(len(task.samples) for task in here),
                )
            )
    return records


def _sample_lines(scored: Sequence[Scored], metric: str) -> bytes:
    lines = [
        json.dumps(
            {
                "task": task.name,
                "length": task.length,
                "index": index,
                "depths": sample.prompt.depths,
                "scores": list(sample.scores),
                "metric": metric,
                **sample.more,
            }
        )
        for task in scored
        for index, sample in enumerate(task.samples)
    ]
    return "".join(line + "\n" for line in lines).encode()
