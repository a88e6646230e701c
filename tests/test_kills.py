"""Runs killed at random moments and started again with the same command: the same run, bit for bit, as one without
faults (tools/benchmarks/faults.py, with few kills); and what is left of a dead run never writes into a folder that
another run has taken."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import faults
import pytest
from test_bad_input import run_tool
from test_launch import ROOT, environment
from test_training import METRICS, metrics_of
from tiny import BOS, SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW, prepare_ready_rows, reference_rows

from megatron_tw.parallel.launcher import kill_with_children
from megatron_tw.runtime.lock import LOCK_FILE, FolderLock, Holder

STEPS, SAVE_INTERVAL = 20, 3
SECONDS = 120
"""In which a step must come, and a process end."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("kills") / "rows")


def arguments(rows: Path, run: Path) -> list[str]:
    return [
        *("--load-hf", str(TINY_LLAMA), "--data-path", str(rows), "--seq-length", str(SEQ_LENGTH)),
        *("--bos-id", str(BOS), "--weighting", "dense", "--short-window", str(WINDOW), "--short-stride", str(STRIDE)),
        *("--train-iters", str(STEPS), "--global-batch-size", "2", "--lr", "1e-3", "--log-interval", str(STEPS)),
        *("--save", str(run), "--load", str(run), "--save-interval", str(SAVE_INTERVAL), "--save-hf", f"{run}-hf"),
    ]


@pytest.fixture(scope="module")
def straight(rows, ranks, tmp_path_factory) -> Path:
    """A run of one rank, without faults."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert ranks(1).run(run_tool, "train", arguments(rows, run)) == [(0, "")]
    return run


@contextlib.contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, its output in a file. It is killed at the end, and what it started."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment(**variables), stdout=output, stderr=output)
    try:
        yield process
    finally:
        kill_with_children(process.pid)
        process.wait()


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def wait_for(what, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    faults.write_inputs(folder, folder / "log", scores=False)
    return folder


@pytest.fixture
def inputs_of(inputs):
    """The folder with the inputs of a case; the scores of that which uses them are made when it comes."""

    def get(case: faults.Case) -> Path:
        if case.uses_scores and not (inputs / "scores").is_dir():
            faults.write_scores(inputs, inputs / "log")
        return inputs

    return get


CASES = faults.CASES


@pytest.mark.parametrize(
    ("case", "kills"),
    [(CASES[0], 2), *(pytest.param(case, 6, marks=pytest.mark.full) for case in CASES)],
    ids=lambda value: getattr(value, "name", value),
)
def test_kills_at_random_moments_leave_the_run_as_it_is(case, kills, inputs_of):
    seed = random.randrange(10**6)
    print("seed", seed)
    inputs = inputs_of(case)
    for folder in (inputs / case.name, inputs / f"{case.name} straight"):
        shutil.rmtree(folder, ignore_errors=True)
    assert faults.examine(case, inputs, kills, random.Random(seed)).kills == kills


def test_every_checkpoint_that_should_be_there_is_looked_at(straight, tmp_path):
    """A run that saves at steps 3, 6, ..., 18 and 20, of which one of the older checkpoints is damaged, then gone."""
    case, run = faults.Case("all", 1, ""), Path(shutil.copytree(straight, tmp_path / "run"))
    with mock.patch.object(faults, "SAVE_INTERVAL", SAVE_INTERVAL), mock.patch.object(faults, "STEPS", STEPS):
        shutil.rmtree(run / "iter_0000020")
        (run / "latest_checkpointed_iteration.txt").write_text("18")
        assert faults.newest(case, run) == (18, None)
        damaged = next((run / "iter_0000006").glob("*.distcp"))
        with damaged.open("r+b") as file:
            file.truncate(damaged.stat().st_size - 1)
        step, problem = faults.newest(case, run)
        assert (step, str(problem).startswith(f"{damaged} ")) == (18, True)
        shutil.rmtree(run / "iter_0000006")
        gone = "the checkpoints of steps [6] are gone, there are [3, 9, 12, 15, 18]"
        assert faults.newest(case, run) == (18, gone)
        assert faults.newest(faults.Case("last", 1, "--keep-last 4"), run) == (18, None)
        assert faults.newest(faults.Case("last", 1, "--keep-last 5"), run) == (18, gone)
        assert faults.Case("retained", 1, "--save-retain-interval 6").kept(15) == {6, 12, 15}
        assert faults.Case("both", 1, "--keep-last 2 --save-retain-interval 6").kept(15) == {6, 12, 15}
        assert faults.Case("one", 1, "--keep-last 1").kept(15) == {15}


def same_run(run: Path, expected: Path) -> None:
    resumed, whole = metrics_of(run), metrics_of(expected)
    assert resumed["iteration"].tolist() == list(range(1, STEPS + 1))
    for key in METRICS:
        assert resumed[key].tolist() == whole[key].tolist(), key
    exports = [Path(f"{folder}-hf") / "model.safetensors" for folder in (run, expected)]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    names = [sorted(str(path.relative_to(folder)) for path in folder.glob("iter_*")) for folder in (run, expected)]
    assert names[0] == names[1]
    assert not (run / LOCK_FILE).exists()
    assert not Path(f"{run}-hf.partial").exists()


def run_tool_impatiently(tool: str, argv: list[str]) -> tuple[int, str]:
    """On a rank: a run that gives another half a second to live."""
    with mock.patch.dict(FolderLock.__init__.__kwdefaults__, {"stale_seconds": 0.5, "beat_seconds": 0.1}):
        return run_tool(tool, argv)


@pytest.mark.full
def test_a_run_that_comes_back_does_not_write_into_what_another_has_taken(straight, rows, ranks, tmp_path):
    """A run is suspended, given up by one that thinks it is on another machine, and goes on when that one has ended."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments(rows, run)]
    with started(command, log) as process:
        wait_for(lambda: steps_of(run) >= SAVE_INTERVAL + 1, log)
        process.send_signal(signal.SIGSTOP)
        for folder in (run, Path(f"{run}-hf.partial")):
            file = folder / LOCK_FILE
            holder = Holder(**json.loads(file.read_text()))
            file.write_text(json.dumps(asdict(holder) | {"machine": "another"}))
        assert ranks(1).run(run_tool_impatiently, "train", arguments(rows, run)) == [(0, "")]
        before = files_of(tmp_path)
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
        process.wait(SECONDS)
        assert process.returncode not in (0, None), log.read_text()
    after = files_of(tmp_path)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {log, *run.glob("tensorboard/*")}
    same_run(run, straight)


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
