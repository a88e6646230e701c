"""tools/train.py --check: what is wrong is found without a training step, all of it at once."""

import contextlib
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from damage import flip, make_tokenizer
from test_bad_input import run_tool
from test_model_reading import in_index
from test_training import CACHED, DENSE, make_scores, options, reference_data, run_all, scoring_options
from tiny import SEQ_LENGTH, TINY_LLAMA, WINDOW, Axes, prepare_ready_rows, reference_rows

from megatron_tw.config import CheckpointConfig, ModelConfig, RunConfig, TrainConfig
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.planning import check as module
from megatron_tw.planning.check import Check, Line

__all__ = ["reference_data"]  # a fixture of test_training
AXES = Axes(cp=2)
PLAN = Path(__file__).resolve().parents[1] / "tools" / "plan.py"
PARTS = ["options", "model", "data", "tokenizer", "scorer", "rows", "folders", "memory", "groups"]


@contextmanager
def machine(memory: int | None, free: int | None, *, plan: bool) -> Iterator[None]:
    """On a rank: a machine with so many bytes of memory and on its disk, instead of its own. plan: ask tools/plan.py,
    which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if memory is not None:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
        if free is not None:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        if not plan:
            patch.setattr(module, "planned", lambda *_: "not planned")
        yield


def checked(config: RunConfig, memory: int | None = None, free: int | None = None, *, plan: bool = False) -> list[Line]:
    """On a rank: the lines."""
    check = Check(config, PLAN)
    try:
        with machine(memory, free, plan=plan):
            check.run()
    finally:
        destroy_layout()
    assert [line.part for line in check.lines] == PARTS
    return check.lines


def printed(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: exit status, stdout and stderr of the program."""
    stdout = io.StringIO()
    with machine(None, None, plan=False), contextlib.redirect_stdout(stdout):
        status, stderr = run_tool("train", argv)
    return status, stdout.getvalue(), stderr


def failed(lines: list[Line]) -> dict[str, str]:
    return {line.part: line.text for line in lines if line.ok is False}


def left_out(lines: list[Line]) -> list[str]:
    return [line.part for line in lines if line.ok is None]


def test_all_that_is_wrong_is_found_at_once(ranks, tmp_path):
    rows = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    with (rows / "rows.bin").open("r+b") as file:  # in the last row
        file.seek(-2, 2)
        file.write(b"\x07\x00")
    config = options(
        AXES,
        rows,
        weighting=DENSE,
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    one, other = ranks(AXES.world_size).run(checked, config, 2**30, plan=True)
    assert one == other
    assert list(failed(one)) == ["rows", "memory"]
    assert left_out(one) == []
    text = {line.part: line.text for line in one}
    assert "the ids of row 3 are not those that were written" in text["rows"]
    assert "GB a rank, simulated; too large: " in text["memory"]
    assert "room for " in text["folders"]
    assert text["groups"].startswith("slowest all-reduce: CP ")
    assert text["groups"].endswith(" GB/s (ranks 0, 1)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "rows.jsonl"]  # nothing is left


def test_each_file_has_a_line_of_its_own(ranks, reference_data, tmp_path):
    """A damaged checkpoint, damaged scores, and both; weights that are not all there; rows that are not there."""
    scores, run, pool = tmp_path / "scores", tmp_path / "run", ranks(AXES.world_size)
    save = CheckpointConfig(save=str(run), load=str(run))
    train = TrainConfig(train_iters=1, global_batch_size=2)
    pool.run(make_scores, replace(scoring_options(reference_data, scores), parallel=AXES.parallel()))
    pool.run(run_all, [options(AXES, reference_data, train=train, checkpoint=save)])
    scorer = replace(CACHED, scores=(str(scores),))
    config = options(AXES, reference_data, weighting=DENSE, scorer=scorer, checkpoint=save)
    assert [line.ok for line in pool.run(checked, config)[0]] == [True] * len(PARTS)

    other_order = replace(config, train=replace(train, seed=99))
    (lines, other) = pool.run(checked, other_order)
    assert lines == other
    told = "--load: the run's data cannot be continued: seed was 1234 and is now 99 (--seed)"
    assert failed(lines) == {"data": told}

    flip(scores / "scores.bin")
    (lines, other) = pool.run(checked, config)
    assert lines == other
    assert list(failed(lines)) == ["scorer"]
    assert "the NLLs of score row 12 are not those that were written" in failed(lines)["scorer"]

    flip(next(run.glob("iter_0000001/*.distcp")))
    (lines, other) = pool.run(checked, config)
    assert lines == other
    assert list(failed(lines)) == ["model", "scorer"]
    assert failed(lines)["model"].startswith(f"--load {run}: {run / 'iter_0000001'}")
    assert "the NLLs of score row 12 are not" in failed(lines)["scorer"]
    assert left_out(lines) == ["tokenizer", "folders", "memory"]

    model = shutil.copytree(TINY_LLAMA, tmp_path / "model")
    in_index(lambda index: None)(model)
    (model / "1.safetensors").unlink()
    config = options(AXES, reference_data / "none", model=ModelConfig(load_hf=str(model)))
    (lines, _) = pool.run(checked, config)
    assert list(failed(lines)) == ["model", "data"]
    assert failed(lines)["model"] == f"--load-hf: {model / '1.safetensors'}: not found, though the index names it"
    assert failed(lines)["data"].startswith("--data-path: ")
    assert left_out(lines) == ["tokenizer", "scorer", "rows", "folders", "memory"]
    assert lines[-1].text.startswith("slowest all-reduce: all ranks ")


def test_options_tokenizer_and_disk_have_lines(ranks, tmp_path):
    words, model = ["<s>", "a", "b", "c"], shutil.copytree(TINY_LLAMA, tmp_path / "model")
    make_tokenizer(tmp_path / "words", words)
    make_tokenizer(model, words[::-1])
    (tmp_path / "a.txt").write_text("a b c " * 400)
    prepare_rows([tmp_path / "a.txt"], tmp_path / "rows", seq_length=SEQ_LENGTH, tokenizer=tmp_path / "words")
    config = options(AXES, tmp_path / "rows", model=ModelConfig(load_hf=str(model)),
                     checkpoint=CheckpointConfig(save=str(tmp_path / "run")))  # fmt: skip
    config = replace(config, data=replace(config.data, bos_id=None))
    pool = ranks(AXES.world_size)
    (lines, _) = pool.run(checked, config, free=2**20)
    assert list(failed(lines)) == ["tokenizer", "folders"]
    assert failed(lines)["tokenizer"].startswith(f"{model}: a model with another vocabulary than the rows")
    assert failed(lines)["folders"].startswith(f"--save {tmp_path / 'run'}: expected 0.00")
    assert failed(lines)["folders"].endswith("GiB of free space for a checkpoint, got 0.000977 GiB")
    assert left_out(lines) == []

    wrong = replace(config, parallel=replace(config.parallel, context_parallel_size=0, distributed_timeout_minutes=0))
    (lines, _) = pool.run(checked, wrong)
    assert list(failed(lines)) == ["options", "tokenizer"]
    assert failed(lines)["options"].startswith("--context-parallel-size: expected 1 or more, got 0")
    assert left_out(lines) == ["scorer", "folders", "memory"]
    assert not (tmp_path / "run").exists()


def command_of(rows: Path, save: Path) -> list[str]:
    return [
        f"--load-hf={TINY_LLAMA}", f"--data-path={rows}", "--check", f"--seq-length={SEQ_LENGTH}",
        "--weighting=dense", f"--short-window={WINDOW}", "--train-iters=2", f"--save={save}",
    ]  # fmt: skip


def change_an_id(rows: Path) -> None:
    ids = np.fromfile(rows / "rows.bin", dtype="<u2")
    ids[10] ^= 1
    ids.tofile(rows / "rows.bin")


def test_the_program_prints_a_table_and_ends_with_status_0_or_2(ranks, tmp_path):
    rows = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    argv = command_of(rows, tmp_path / "run")
    ((status, stdout, stderr),) = ranks(1).run(printed, argv)
    assert (status, stderr) == (0, "")
    assert [line.split()[:2] for line in stdout.splitlines()] == [[part, "ok"] for part in PARTS]
    change_an_id(rows)
    ((status, stdout, stderr),) = ranks(1).run(printed, [*argv, "--lr=-1"])
    assert (status, stderr) == (2, "error: --check: failed: options, rows\n")
    table = [line.split(maxsplit=2) for line in stdout.splitlines()]
    assert [part for part, *_ in table] == PARTS
    assert table[0][1:] == ["FAILED", "--lr: expected more than 0, got -1.0"]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_the_program_as_a_process(tmp_path):
    rows = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    command = [sys.executable, "tools/train.py", *command_of(rows, tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split()[0] for line in run.stdout.splitlines() if " ok " in line] == PARTS
    change_an_id(rows)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: --check: failed: rows\n"
    assert not (tmp_path / "run").exists()
