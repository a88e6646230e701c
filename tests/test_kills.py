"""Jobs killed at random moments and started again with the same command: the same run, bit for bit, as one without
faults; and what is left of a dead run never writes into a folder that another run has taken."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import psutil
import pytest
from test_bad_input import run_tool
from test_launch import ROOT, environment
from test_training import METRICS, metrics_of
from tiny import BOS, SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW, prepare_ready_rows, reference_rows

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
def straight(rows, ranks, tmp_path_factory) -> dict[int, Path]:
    """Runs without faults, of one and of two ranks."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp("straight") / "run"
        for status, stderr in ranks(world_size).run(run_tool, "train", arguments(rows, runs[world_size])):
            assert (status, stderr) == (0, "")
    return runs


@dataclass
class Job:
    """A program that was started, and every process of it that was seen."""

    process: subprocess.Popen[bytes]
    family: list[psutil.Process]


@contextlib.contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[Job]:
    """A program, its output in a file. Nothing of it is left at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment(**variables), stdout=output, stderr=output)
    job = Job(process, [psutil.Process(process.pid)])
    try:
        yield job
    finally:
        for member in [*job.family, *_descendants(job.family[0])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def torchrun(rows: Path, run: Path) -> list[str]:
    tool = [str(ROOT / "tools" / "train.py"), *arguments(rows, run)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *tool]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def holds(run: Path, launcher: psutil.Process) -> bool:
    """Whether a rank of this launcher, and not of an earlier one, is at work in the folder."""
    try:
        holder = json.loads((run / LOCK_FILE).read_text())
        return psutil.Process(holder["pid"]).ppid() == launcher.pid
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return False


def wait_for(what, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def kill(how: str, job: Job, chance: random.Random) -> None:
    launcher = job.family[0]
    ranks = [child for child in launcher.children() if "train.py" in " ".join(child.cmdline())]
    job.family.extend(launcher.children(recursive=True))
    for process in {"job": job.family, "rank": [chance.choice(ranks)], "launcher": [launcher]}[how]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    "kills",
    [("job", "rank", "launcher"), pytest.param(("job", "rank", "launcher") * 5, marks=pytest.mark.full)],
    ids=["few", "many"],
)
def test_kills_at_random_moments_leave_the_run_as_it_is(kills, straight, rows, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    run, log = tmp_path / "run", tmp_path / "log"
    steps = sorted(chance.choices(range(1, STEPS - 1), k=len(kills)))
    with contextlib.ExitStack() as processes:
        for how, step in zip(chance.sample(kills, len(kills)), steps, strict=True):
            job = processes.enter_context(started(torchrun(rows, run), log))
            wait_for(lambda: holds(run, job.family[0]) and steps_of(run) >= step, log)  # noqa: B023
            time.sleep(chance.uniform(0, 0.4))
            print("killed", how, "after step", steps_of(run))
            kill(how, job, chance)
            if how != "launcher":  # else its ranks may still be there when the next run comes
                job.process.wait(SECONDS)
        last = processes.enter_context(started(torchrun(rows, run), log))
        assert last.process.wait(SECONDS) == 0, log.read_text()
    same_run(run, straight[2])
    assert "differs" not in log.read_text()
    assert "Warning" not in log.read_text()


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


def test_a_run_that_comes_back_does_not_write_into_what_another_has_taken(straight, rows, ranks, tmp_path):
    """A run is suspended, given up by one that thinks it is on another machine, and goes on when that one has ended."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments(rows, run)]
    with started(command, log) as job:
        wait_for(lambda: steps_of(run) >= SAVE_INTERVAL + 1, log)
        job.process.send_signal(signal.SIGSTOP)
        for folder in (run, Path(f"{run}-hf.partial")):
            file = folder / LOCK_FILE
            holder = Holder(**json.loads(file.read_text()))
            file.write_text(json.dumps(asdict(holder) | {"machine": "another"}))
        assert ranks(1).run(run_tool_impatiently, "train", arguments(rows, run)) == [(0, "")]
        before = files_of(tmp_path)
        job.process.send_signal(signal.SIGCONT)
        time.sleep(1)
        job.process.wait(SECONDS)
        assert job.process.returncode not in (0, None), log.read_text()
    after = files_of(tmp_path)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {log, *run.glob("tensorboard/*")}
    same_run(run, straight[1])


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
