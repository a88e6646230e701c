"""Benchmarks by lm_eval's own task definitions: MMLU (5-shot) and LongBench v2 by log-likelihoods on the parallel
model, BBH (chain of thought, 3-shot) and LongBench by generation on a Hugging Face folder."""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tw.evaluation.harness.adapter import parallel_lm
from megatron_tw.evaluation.harness.datasets import MissingDataError, data_from
from megatron_tw.evaluation.harness.generation import check_model_as_saved, hugging_face_lm
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.results import Record
from megatron_tw.evaluation.tasks import Found, Model, Run, Setting, WithoutModel, check_model_length, tokenizer_folder

SEED = 1234
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Suite:
    """name: what --tasks calls it. group: what lm_eval calls it, in `folder` of its tasks. datasets: on the hub.
    num_fewshot: None for the tasks' own. generates: whether answers are generated."""

    name: str
    group: str
    folder: str
    dataset: str
    num_fewshot: int | None
    generates: bool
    needs: tuple[str, ...] = ()
    """Further packages, which lm_eval[longbench] brings."""


SUITES = (
    Suite("mmlu", "mmlu", "mmlu", "cais/mmlu", 5, generates=False),
    Suite("bbh", "bbh", "bbh", "SaylorTwift/bbh", None, generates=True),
    Suite(
        "longbench", "longbench", "longbench", "Xnhyacinth/LongBench", None, True, ("jieba", "fuzzywuzzy", "rouge")
    ),
    Suite("longbench2", "longbench2", "longbench2", "recursal/longbench-v2", None, generates=False),
)  # fmt: skip


def prepare_mmlu(setting: Setting, names: Sequence[str]) -> Run:
    """The suite mmlu. See `tasks`."""
    return _prepare(setting, SUITES[0])


def prepare_bbh(setting: Setting, names: Sequence[str]) -> Run | WithoutModel:
    """The suite bbh. See `tasks`."""
    return _prepare(setting, SUITES[1])


def prepare_longbench(setting: Setting, names: Sequence[str]) -> Run | WithoutModel:
    """The suite longbench. See `tasks`."""
    return _prepare(setting, SUITES[2])


def prepare_longbench2(setting: Setting, names: Sequence[str]) -> Run:
    """The suite longbench2. See `tasks`."""
    return _prepare(setting, SUITES[3])


def _prepare(setting: Setting, suite: Suite) -> Any:
    options, source = setting.config.evaluation, setting.source
    for package in ("lm_eval", "datasets", *suite.needs):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--tasks {suite.name}: needs the package {package}; pip install 'megatron-tw[eval]'")
    if options.eval_data is None:
        raise ValueError(
            f"--eval-data: --tasks {suite.name} needs a folder with {suite.dataset} of the Hugging Face hub "
            f"(hf download --repo-type dataset {suite.dataset} --local-dir DIR/{suite.dataset}), got none"
        )
    if suite.generates and source.checkpoint is not None:
        raise ValueError(
            f"--tasks {suite.name} generates, on a Hugging Face folder: python tools/convert_checkpoint.py --load "
            f"{options.load} --save-hf DIR, then evaluate with --load-hf DIR"
        )
    if suite.generates and dist.get_world_size() > 1:
        raise ValueError(
            f"--tasks {suite.name} generates in one process, which uses the GPUs that it sees: start tools/evaluate.py "
            f"without torchrun, got {dist.get_world_size()} ranks"
        )
    if suite.generates:
        check_model_as_saved(setting.config.model, source, f"--tasks {suite.name}")
    check_model_length(setting, setting.longest_input)
    folder = tokenizer_folder(source, suite.name)
    tasks = load_tasks(suite, Path(options.eval_data))
    if suite.generates:
        most = max(_generated_tokens(task) for task in tasks["tasks"].values())
        if most >= setting.longest_input:
            raise ValueError(
                f"--seq-length {setting.longest_input}: --tasks {suite.name} generates up to {most} tokens, so prompt "
                "and answer together need more"
            )
        return _Generated(setting, suite, tasks)

    def run(model: Model) -> Found:
        lm = parallel_lm(model, folder, max_length=setting.longest_input, name=suite.name)
        return found(suite, tasks, lm, options.eval_limit)

    return run


def _generated_tokens(task: Any) -> int:
    return int((task.config.generation_kwargs or {}).get("max_gen_toks", 256))


@dataclass(frozen=True)
class _Generated(WithoutModel):
    setting: Setting
    suite: Suite
    tasks: Any

    def __call__(self, kept: Kept) -> Found:
        setting = self.setting
        assert setting.source.load_hf is not None
        lm = hugging_face_lm(
            Path(setting.source.load_hf),
            setting.config,
            max_length=setting.longest_input,
            kept=kept,
            name=self.suite.name,
        )
        return found(self.suite, self.tasks, lm, setting.config.evaluation.eval_limit)


def load_tasks(suite: Suite, eval_data: Path) -> Any:
    """lm_eval's tasks with their data, as its TaskManager gives them.

    Raises:
        ValueError: files or columns that are not there, or files that cannot be read; names them, and where they are
        to be had.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # of the libraries; nothing here would ask the network
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import jinja2
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(lm_eval.tasks.__file__).parent / suite.folder
    opened: set[Path] = set()
    try:
        with data_from(eval_data, opened):
            manager = lm_eval.tasks.TaskManager(include_path=str(path), include_defaults=False)
            loaded = manager.load([suite.group])
    except MissingDataError as missing:
        where = eval_data / missing.dataset
        if missing.split is not None:
            raise ValueError(
                f"--eval-data {eval_data}: --tasks {suite.name}: {missing.dataset} {missing.name}: its split "
                f"{missing.split} is missing: expected {where}/{missing.name}/{missing.split}-*.parquet (or .jsonl)"
            ) from missing
        raise ValueError(
            f"--eval-data {eval_data}: --tasks {suite.name} needs {missing.dataset} of the Hugging Face hub, of which "
            f"the part {missing.name} is missing: expected {where}/{missing.name}/SPLIT-*.parquet (or .jsonl); hf "
            f"download --repo-type dataset {missing.dataset} --local-dir {where}"
        ) from missing
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"--eval-data {eval_data}: --tasks {suite.name}: {suite.dataset}: a column is missing: {error}"
        ) from error
    for task in loaded["tasks"].values():
        for split, column in _columns_read(task):
            if column not in task.dataset[split].column_names:
                raise ValueError(
                    f"--eval-data {eval_data}: --tasks {suite.name}: {suite.dataset} {task.config.dataset_name}: a "
                    f"column is missing: '{column}' in the split {split}, which has "
                    f"{', '.join(task.dataset[split].column_names)}"
                )
    return loaded


def _columns_read(task: Any) -> Iterator[tuple[str, str]]:
    """The splits and columns that a task's definition names as they are. Where there is no such column, lm_eval takes
    the name itself for a text: every answer would be wrong, and nothing said."""
    if task.config.process_docs is not None:
        return  # it makes columns
    splits = [task.config.test_split or task.config.validation_split, task.config.fewshot_split]
    for split in filter(None, dict.fromkeys(splits)):
        for kind in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            named = getattr(task.config, kind)
            if isinstance(named, str) and named.isidentifier():
                yield split, named


def _no_bar(items: Any, **_: Any) -> Any:
    return items


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness shows bars of its own, on every rank; ours says how far it is."""
    import lm_eval.api.model
    import lm_eval.api.task

    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task]
    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = _no_bar
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


def found(suite: Suite, loaded: Any, lm: Any, limit: int | None) -> Found:
    """Run the tasks, alike on every rank, and make records of lm_eval's figures: those of the group, then of each
    task."""
    import lm_eval.evaluator

    for task in loaded["tasks"].values():
        if suite.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=suite.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    with _without_bars():
        results = lm_eval.evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    counts = {name: int(count["effective"]) for name, count in results["n-samples"].items()}
    records = []
    groups = [name for name in results.get("groups", {}) if name not in counts]
    for name in [*groups, *counts]:
        figures = results["groups"][name] if name in groups else results["results"][name]
        of_group = [task.task_name for task in loaded["groups"][name].get_all_tasks()] if name in groups else [name]
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            records.append(
                Record(
                    suite=suite.name,
                    task="all" if name == suite.group else name,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    samples=sum(counts[task] for task in of_group),
                )
            )
    return Found(records=tuple(records))
