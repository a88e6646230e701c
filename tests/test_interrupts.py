"""Ctrl-C and a reader that leaves: no traceback, nothing lost."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_kills import arguments, steps_of, wait_for
from test_launch import ROOT, environment
from test_scores import word_tokenizer
from test_training import metrics_of
from tiny import prepare_ready_rows, reference_rows

from megatron_tw.config.errors import INTERRUPTED

MANY = "100000"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("interrupts") / "rows")


@contextlib.contextmanager
def tool(name: str, argv: list[str], log: Path):
    """A tool in a process group of its own, as in a terminal's foreground, its output in a file."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *argv]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_ctrl_c_saves_and_ends_with_one_line_and_a_second_ends_at_once(rows, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    with tool("train", [*arguments(rows, run), "--train-iters", MANY, "--save-interval", MANY], log) as process:
        wait_for(lambda: steps_of(run) >= 3, log)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == INTERRUPTED
    said = log.read_text()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    steps = metrics_of(run)["iteration"].tolist()
    assert last == f"stopped after step {len(steps)} of {MANY}: Ctrl-C"
    assert (run / f"iter_{len(steps):07d}").is_dir()
    assert not (tmp_path / "run-hf").exists()  # the run is not at its end

    with tool("train", [*arguments(rows, run), "--train-iters", MANY, "--save-interval", MANY], log) as process:
        wait_for(lambda: steps_of(run) > len(steps), log)
        process.send_signal(signal.SIGSTOP)  # it takes its time over the step
        os.killpg(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: b"once more ends it at once" in log.read_bytes(), log)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) in (-signal.SIGINT, INTERRUPTED)  # the checkpoint may have been quicker
    assert "Traceback" not in log.read_text()


def long_preprocessing(folder: Path) -> list[str]:
    """Arguments of some seconds of work by two workers, made in `folder`."""
    (folder / "long.txt").write_text("some words of a document that is long enough\n\n" * 400_000)
    tokenizer = word_tokenizer(folder / "tokenizer", ["<s>", "some", "words", "of", "a", "document"], "<s>")
    argv = ["--input", str(folder / "long.txt"), "--tokenizer", str(tokenizer), "--seq-length", "64"]
    return [*argv, "--output", str(folder / "out"), "--workers", "2"]


def test_ctrl_c_ends_preprocessing_and_its_workers(tmp_path):
    log = tmp_path / "log"
    with tool("preprocess_data", long_preprocessing(tmp_path), log) as process:
        wait_for(lambda: len(psutil.Process(process.pid).children()) >= 2, log)  # a worker, and who counts its locks
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == INTERRUPTED, log.read_text()
    assert log.read_text() == "interrupted\n"
    assert {path.name for path in tmp_path.iterdir()} == {"long.txt", "tokenizer", "log"}


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.process_iter(["ppid", "cmdline"])  # None of one that has just ended
    return [
        child
        for child in children
        if child.info["ppid"] == process.pid and "spawn_main" in " ".join(child.info["cmdline"] or [])
    ]


def test_workers_end_with_a_preprocessing_that_is_killed(tmp_path):
    log = tmp_path / "log"
    with tool("preprocess_data", long_preprocessing(tmp_path), log) as process:
        wait_for(lambda: workers_of(process), log)
        workers = workers_of(process)
        time.sleep(1)  # they import what they need
        process.kill()
        process.wait()
        assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_a_worker_that_is_killed_is_told(tmp_path):
    log = tmp_path / "log"
    with tool("preprocess_data", long_preprocessing(tmp_path), log) as process:
        wait_for(lambda: workers_of(process), log)
        workers_of(process)[0].kill()
        assert process.wait(60) == 2, log.read_text()
    assert log.read_text() == "error: --workers 2: one of them was killed; fewer take less memory\n"
    assert {path.name for path in tmp_path.iterdir()} == {"long.txt", "tokenizer", "log"}


def test_a_reader_that_leaves_does_not_end_the_run(rows, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments(rows, run), "--log-interval", "1"]
    command += ["--train-iters", "4"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # as `| head` does
    stderr = process.stderr.read().decode()
    assert process.wait(120) == 0, stderr
    assert "Broken pipe" not in stderr
    assert len(metrics_of(run)["iteration"]) == 4
