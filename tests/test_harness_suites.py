"""MMLU, BBH, LongBench and LongBench v2 by the harness' own task definitions, on made data with the same columns."""

import functools
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from evaluations import content, flags_of, parts_there, run, run_evaluation, run_or_die, values
from test_harness import WORDS, make_word_model
from tiny import Axes, prepare_ready_rows

pytest.importorskip("lm_eval")

import lm_eval.tasks
import yaml

from megatron_tw.config import parse_options
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.evaluation.harness.datasets import data_from, files_of
from megatron_tw.evaluation.harness.generation import REQUESTS_PER_PART, hugging_face_lm
from megatron_tw.evaluation.harness.suites import SUITES, found, load_tasks
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.results import Results

TASKS = Path(lm_eval.tasks.__file__).parent
LONGBENCH = [package for package in SUITES[2].needs if importlib.util.find_spec(package) is None]


class _Loader(yaml.SafeLoader):
    """Task definitions hold tags of the harness' own."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


@functools.cache
def parts_of(folder: str) -> list[str]:
    """The `dataset_name`s of the tasks in a folder of the harness."""
    files = sorted((TASKS / folder).rglob("*.yaml"))
    found = [yaml.load(file.read_text(), Loader=_Loader) for file in files]
    return sorted({config["dataset_name"] for config in found if config.get("dataset_name")})


def words(first: int, count: int) -> str:
    return " ".join(WORDS[(first * 7 + i * 3) % len(WORDS)] for i in range(count))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder: Path) -> Path:
    """All four data sets, small: MMLU and LongBench v2 as parquet, BBH and LongBench as JSON lines."""
    for number, part in enumerate(parts_of("mmlu/default")):
        for split, rows in (("dev", 5), ("test", 2)):
            content = [
                {"question": words(number + row, 4), "subject": part, "choices": [words(row + i, 2) for i in range(4)],
                 "answer": (number + row) % 4}
                for row in range(rows)
            ]  # fmt: skip
            write(folder / "cais" / "mmlu" / part / f"{split}-00000-of-00001.parquet", content)
    for number, part in enumerate(parts_of("bbh/cot_fewshot")):
        content = [{"input": words(number + row, 5), "target": words(row, 1)} for row in range(3)]
        write(folder / "SaylorTwift" / "bbh" / part / "test.jsonl", content)
    retrieved = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "\u6bb5\u843d1"}
    for number, part in enumerate(parts_of("longbench")):
        content = [
            {"input": words(row, 3), "question": words(row, 3), "context": words(number, 20), "length": 20,
             "answers": [retrieved.get(part, words(row, 1))], "dataset": part, "language": "en",
             "all_classes": [words(0, 1), words(1, 1)], "_id": str(row)}
            for row in range(2)
        ]  # fmt: skip
        write(folder / "Xnhyacinth" / "LongBench" / "data" / f"{part}.jsonl", content)
    for number, part in enumerate(parts_of("longbench2")):
        content = [
            {"context": words(number, 60), "question": words(row, 3), "choices": [words(i, 2) for i in range(4)],
             "answer": (number + row) % 4}
            for row in range(2)
        ]  # fmt: skip
        write(folder / "recursal" / "longbench-v2" / part / "train-00000-of-00001.parquet", content)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    make_word_model(folder / "model")
    make_data(folder / "data")
    return folder


def options(world: Path, output: Path, *more: str) -> list[str]:
    return [
        f"--load-hf={world / 'model'}", f"--eval-data={world / 'data'}", f"--output={output}", "--eval-limit=1",
        "--micro-batch-size=8", *more,
    ]  # fmt: skip


def own_figures(world: Path, name: str, num_fewshot: int) -> dict[str, float]:
    """What the harness finds with its own model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    (suite,) = (suite for suite in SUITES if suite.name == name)
    loaded = load_tasks(suite, world / "data")
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=1234)
    lm = HFLM(pretrained=str(world / "model"), device="cpu", dtype="float32", batch_size=8)
    results = evaluate(lm, loaded, limit=1, bootstrap_iters=0, log_samples=False)
    everything = {**results["results"], **results["groups"]}
    return {task: figures["acc,none"] for task, figures in everything.items() if "acc,none" in figures}


def test_multiple_choice_on_the_parallel_model(world, ranks, tmp_path):
    ranks(2).run(run_evaluation, options(world, tmp_path / "out", "--tasks=longbench2", *flags_of(Axes(cp=2))))
    own, ours = own_figures(world, "longbench2", 0), values(tmp_path / "out")
    assert len(own) > len(parts_of("longbench2"))
    assert 0 < own["longbench2"] < 1
    for task, accuracy in own.items():
        assert ours["all" if task == "longbench2" else task, "acc"] == pytest.approx(accuracy)


@pytest.mark.full
def test_mmlu_with_five_shots(world, ranks, tmp_path):
    ranks(2).run(run_evaluation, options(world, tmp_path / "out", "--tasks=mmlu"))
    own, ours = own_figures(world, "mmlu", 5), values(tmp_path / "out")
    assert len(own) > 57
    assert 0 < own["mmlu"] < 1
    for task, accuracy in own.items():
        assert ours["all" if task == "mmlu" else task, "acc"] == pytest.approx(accuracy)
    loaded = load_tasks(SUITES[0], world / "data")["tasks"]["mmlu_anatomy"]
    loaded.set_config(key="num_fewshot", value=5)
    (text, *_) = (doc for doc in [loaded.fewshot_context(loaded.dataset["test"][0], 5)])
    assert str(text).count("Answer:") == 6


@pytest.mark.parametrize("axes", [Axes(), pytest.param(Axes(dp=2), marks=pytest.mark.full)], ids=lambda axes: axes.name)
def test_multiple_choice_that_is_cut_off_goes_on(axes, world, ranks, tmp_path):
    def of(output: str) -> list[str]:
        return options(world, tmp_path / output, "--tasks=longbench2", "--micro-batch-size=2", *flags_of(axes))

    whole = [part for written in ranks(axes.world_size).run(run, of("whole")) for part in written]
    with pytest.raises(RuntimeError):
        ranks(axes.world_size).run(run_or_die, of("cut"), 2)
    made = parts_there(tmp_path / "cut")
    assert len(made) == 2 < len(whole)
    rest = [part for written in ranks(axes.world_size).run(run, of("cut")) for part in written]
    assert sorted([*made, *rest]) == sorted(whole), "no part is made twice"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("suite", [SUITES[1], SUITES[2]], ids=lambda suite: suite.name)
def test_suites_that_generate_as_a_whole(suite, world, ranks, tmp_path):
    """From the options to the output's records, beside a loss that needs the parallel model; cut off once."""
    if suite.name == "longbench" and LONGBENCH:
        pytest.skip(f"LongBench's metrics need {', '.join(LONGBENCH)}")
    model = make_word_model(tmp_path / "model", max_position_embeddings=2048)
    rows = prepare_ready_rows(np.arange(2 * 2048).reshape(2, 2048) % 60 + 4, tmp_path / "rows", vocab_size=64)

    def of(output: str) -> list[str]:
        return options(
            world, tmp_path / output, f"--tasks={suite.name},loss", f"--load-hf={model}", "--seq-length=2048",
            f"--data-path={rows}",
        )  # fmt: skip

    (whole,) = ranks(1).run(run, of("whole"))
    (made,) = ranks(1).run(run, of("cut"), 2)
    (rest,) = ranks(1).run(run, of("cut"))
    assert [*made, *rest] == whole
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    found = [record for record in Results.load(tmp_path / "whole").records if record.suite == suite.name]
    assert set(load_tasks(suite, world / "data")["tasks"]) <= {record.task for record in found}
    assert all(record.value is not None for record in found)


def generate(world: Path, output: Path) -> None:
    """On a rank. One task of BBH, answers of 5 tokens."""
    from lm_eval.models.huggingface import HFLM

    config = parse_options(["--tasks=bbh", f"--output={output}"], EvaluationConfig)
    loaded = load_tasks(SUITES[1], world / "data")
    name = "bbh_cot_fewshot_navigate"
    task = loaded["tasks"][name]
    task.set_config(key="generation_kwargs", value={"max_gen_toks": 5, "until": ["</s>"], "do_sample": False})
    only = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    lm = hugging_face_lm(world / "model", config, max_length=256, kept=Kept(output, {}), name="bbh")
    plain = HFLM(pretrained=str(world / "model"), device="cpu", dtype="float32", batch_size=1, max_length=256)
    ours = found(SUITES[1], only, lm, None).records
    (record,) = ours
    assert (record.task, record.metric, record.samples) == (name, "exact_match (get-answer)", 3)
    assert found(SUITES[1], only, plain, None).records == ours

    asked = list(task.instances[:3]) * (REQUESTS_PER_PART // 3 + 1)
    told = lm.generate_until(asked)
    assert told == plain.generate_until(asked[:3]) * (REQUESTS_PER_PART // 3 + 1)
    resumed = hugging_face_lm(world / "model", config, max_length=256, kept=Kept(output, {}), name="bbh")
    resumed._model_generate = None  # it must not be asked
    assert resumed.generate_until(asked) == told


def test_generation_is_the_harness_own_and_goes_on(world, ranks, tmp_path):
    ranks(1).run(generate, world, tmp_path / "out")


def test_data_is_found_as_the_hub_has_it(tmp_path):
    def touch(name: str) -> None:
        (tmp_path / "a" / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / "b" / name).touch()

    def names(part: str | None) -> dict[str, list[str]]:
        return {split: [file.name for file in files] for split, files in files_of(tmp_path, "a/b", part).items()}

    assert names("x") == {}
    touch("x/test-00001-of-00002.parquet")
    touch("x/test-00000-of-00002.parquet")
    touch("x/dev-00000-of-00001.parquet")
    touch("test-00000-of-00001.parquet")
    touch("data/y.jsonl")
    assert names("x") == {
        "dev": ["dev-00000-of-00001.parquet"],
        "test": ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"],
    }
    assert names("y") == {"train": ["y.jsonl"], "test": ["y.jsonl"]}
    assert names(None) == {"test": ["test-00000-of-00001.parquet"]}
    (tmp_path / "a" / "b" / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - split: test\n    path: data/y.jsonl\n---\nText\n"
    )
    assert names("x") == {"test": ["y.jsonl"]}


def test_what_is_missing_is_said_before_the_model_is_loaded(world, ranks, tmp_path):
    def refused(match: str, *more: str) -> None:
        with pytest.raises(ValueError, match=match):
            ranks(1).run(run_evaluation, options(world, tmp_path / "out", *more))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    refused(
        r"--tasks mmlu needs cais/mmlu of the Hugging Face hub, of which the part \w+ is missing: expected "
        r".*/cais/mmlu/\w+/SPLIT-\*\.parquet .*; hf download --repo-type dataset cais/mmlu --local-dir ",
        "--tasks=mmlu", f"--eval-data={tmp_path}",
    )  # fmt: skip
    refused(r"--eval-data: --tasks bbh needs a folder with SaylorTwift/bbh", "--tasks=bbh", "--eval-data=null")
    refused("--seq-length 256: --tasks bbh generates up to 1024 tokens", "--tasks=bbh")
    refused("--seq-length 512: .* has a context of 256 tokens", "--tasks=longbench2", "--seq-length=512")
    own = tmp_path / "recursal" / "longbench-v2"
    shutil.copytree(world / "data" / "recursal" / "longbench-v2", own)
    damaged = own / "detective" / "train.jsonl"
    (own / "detective" / "train-00000-of-00001.parquet").unlink()
    damaged.write_text("{")
    refused(r"--eval-data: .*detective/train\.jsonl: no JSON", "--tasks=longbench2", f"--eval-data={tmp_path}")
    write(damaged, [{"answer": 0}])
    refused("a column is missing: 'context' is undefined", "--tasks=longbench2", f"--eval-data={tmp_path}")
    refused(
        r"--rotary-base 500000\.0: --tasks bbh generates with the model as it lies in .*model; write one with these "
        r"options, by tools/convert_checkpoint\.py --load-hf .*model --save RUN, then --load RUN --save-hf DIR",
        "--tasks=bbh", "--rotary-base=5e5", "--seq-length=2048",
    )  # fmt: skip
    refused(
        "--rope-scaling-type linear --rope-scaling-factor 8.0: --tasks bbh generates", "--tasks=bbh",
        "--rope-scaling-type=linear", "--rope-scaling-factor=8", "--seq-length=2048",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [
        (
            "test",
            [{"answer": None}],
            r"mmlu anatomy: a column is missing: 'answer' in the split test, which has question",
        ),
        ("dev", [{"answer": None}], "mmlu anatomy: a column is missing: 'answer' in the split dev, which has question"),
        ("test", [], r"anatomy/test\.jsonl: expected rows of the split test, got none"),
        ("dev", None, r"mmlu anatomy: its split dev is missing: expected .*mmlu/anatomy/dev-\*\.parquet"),
        ("test", None, r"mmlu anatomy: its split test is missing: expected .*mmlu/anatomy/test-\*\.parquet"),
    ],
)
def test_what_a_task_reads_is_there(split, rows, message, world, tmp_path, monkeypatch):
    """One part of MMLU is enough: the others are the same files."""
    shutil.copytree(world / "data" / "cais" / "mmlu" / "anatomy", tmp_path / "cais" / "mmlu" / "anatomy")
    file = next((tmp_path / "cais" / "mmlu" / "anatomy").glob(f"{split}-*"))
    whole = pyarrow.parquet.read_table(file).to_pylist()
    file.unlink()
    if rows is not None:
        taken = [{key: value for key, value in row.items() if key not in rows[0]} for row in whole] if rows else []
        write(file.with_name(f"{split}.jsonl"), taken)
    only = replace(SUITES[0], group="mmlu_anatomy")
    with pytest.raises(ValueError, match=message):
        load_tasks(only, tmp_path)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of the data set `a/b` in `folder`."""
    import datasets

    with data_from(folder, set()):
        return list(datasets.load_dataset("a/b", "x")["test"])


def test_lines_end_where_json_lines_end(tmp_path):
    """U+2028 and U+0085 may stand within a string."""
    rows = [{"text": "one\u2028two"}, {"text": "three\u0085four\x0c"}]
    file = tmp_path / "a" / "b" / "x" / "test.jsonl"
    file.parent.mkdir(parents=True)
    for end in ("\n", "\r\n"):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_bytes("".join(line + end for line in lines).encode())
        assert read(tmp_path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\xff"}\n', "expected UTF-8 text, got byte 0xff"),
        (b"1\n", "row 1: expected an object, got 1"),
        (b'[{"a": 1}, [2]]', r"row 2: expected an object, got \[2\]"),
        (b"[" * 100_000, "no JSON: "),
        (b'{"a": 1}\n{"a": "x"}\n', "expected values of one type in a column: "),
        (b'{"a": 123456789012345678901234567890}\n', "expected values of one type in a column: "),
    ],
    ids=["no UTF-8", "a number", "a list", "deep", "mixed", "large"],
)
def test_damaged_json_lines_are_named(content, message, tmp_path):
    file = tmp_path / "a" / "b" / "x" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--eval-data: {file}: {message}") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_files_of_other_columns_are_named(tmp_path):
    for number, value in enumerate((1, "one")):
        write(tmp_path / "a" / "b" / "x" / f"test-0000{number}-of-00002.parquet", [{"v": value}])
    with pytest.raises(ValueError, match=r"test-00001-of-00002\.parquet: expected the columns of test-00000-of-00002"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("data_files", "message"),
    [
        ("5", "expected a list, got 5"),
        ("[{split: test, path: /data/y.jsonl}]", "expected paths below .*, got '/data/y.jsonl'"),
        ('[{split: test, path: ""}]', "expected paths below .*, got ''"),
    ],
)
def test_files_that_a_readme_names_wrongly_are_said(data_files, message, tmp_path):
    readme = tmp_path / "a" / "b" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text(f"---\nconfigs:\n- config_name: x\n  data_files: {data_files}\n---\n")
    with pytest.raises(ValueError, match=rf"^--eval-data: .*README\.md: data_files of x: {message}"):
        read(tmp_path)


def test_every_suites_own_definitions_are_taken(world):
    """No column that they name is taken for a missing one."""
    for suite in SUITES:
        if not (suite.name == "longbench" and LONGBENCH):
            assert load_tasks(suite, world / "data")["tasks"], suite.name


@pytest.mark.skipif(bool(LONGBENCH), reason=f"LongBench's metrics need {', '.join(LONGBENCH)}")
def test_longbench_is_loaded(world):
    loaded = load_tasks(SUITES[2], world / "data")
    assert len(loaded["tasks"]) == 21


@pytest.mark.skipif(not LONGBENCH, reason="all packages are there")
def test_longbench_says_what_it_needs(world, ranks, tmp_path):
    with pytest.raises(ValueError, match=f"--tasks longbench: needs the package {LONGBENCH[0]}; pip install"):
        ranks(1).run(run_evaluation, options(world, tmp_path / "out", "--tasks=longbench"))
