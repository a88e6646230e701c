"""A recipe on two nodes, which are two launchers on this machine, and torchrun's restarts of one."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_kills import steps_of, wait_for
from test_launch import SCRIPT, environment, overrides, rows
from test_training import metrics_of

__all__ = ["rows"]  # a fixture of test_launch
MINUTE = 60
STEPS = 12


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def nodes(rows: Path, run: Path, log: Path, count: int, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The recipe's script on so many nodes of two ranks, each with its own output. Nothing of it is left at the end."""
    recipe = [*overrides(rows, run), "--train-iters", str(STEPS), "--save-interval", "2", "--async-save"]
    port, launchers = str(free_port()), []
    for number in range(count):
        several = {"NNODES": str(count), "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = (several if count > 1 else {}) | {"NPROC_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo"} | variables
        with Path(f"{log}{number}").open("ab") as output:
            command = ["bash", str(SCRIPT), *recipe]
            launchers.append(subprocess.Popen(command, env=environment(**own), stdout=output, stderr=output))
    families: list[psutil.Process] = []
    try:
        wait_for(lambda: steps_of(run) >= 1, Path(f"{log}0"))
        families = [child for launcher in launchers for child in psutil.Process(launcher.pid).children(recursive=True)]
        yield launchers
    finally:
        for process in [*launchers, *families]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        for launcher in launchers:
            launcher.wait()


@pytest.mark.full
def test_two_nodes_end_together_and_the_same_commands_resume(rows, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    with nodes(rows, run, log, 2) as (first, second):
        wait_for(lambda: (run / "iter_0000002").is_dir(), Path(f"{log}0"))
        second.kill()
        killed = time.monotonic()
        assert first.wait(MINUTE) != 0
        assert time.monotonic() - killed < MINUTE
    with nodes(rows, run, log, 2) as launchers:
        wait_for(lambda: "resumed from" in Path(f"{log}0").read_text(), Path(f"{log}0"))
        resumed_at = steps_of(run)
        wait_for(lambda: steps_of(run) > resumed_at, Path(f"{log}0"))
        for number in range(2):
            Path(f"{log}{number}").write_text("")
        for launcher in launchers:  # as Slurm ends a job
            launcher.send_signal(signal.SIGTERM)
        assert [launcher.wait(MINUTE) for launcher in launchers] == 2 * [128 + signal.SIGTERM]
    said = [Path(f"{log}{number}").read_text() for number in range(2)]
    assert "Traceback" not in "".join(said)
    assert said[0].count("stopped after step") == 1
    steps = metrics_of(run)["iteration"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    assert (run / f"iter_{len(steps):07d}").is_dir()


@pytest.mark.full
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_launcher_that_restarts_its_ranks_goes_on(how, rows, tmp_path):
    """Where one is stopped, the other finds it and ends; what it said then does not end those of the next start."""
    run, log = tmp_path / "run", tmp_path / "log"
    with nodes(rows, run, log, 1, MAX_RESTARTS="2") as [launcher]:
        wait_for(lambda: (run / "iter_0000002").is_dir(), Path(f"{log}0"))
        ranks = [child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline())]
        os.kill(ranks[1].pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        assert launcher.wait(4 * MINUTE) == 0
    assert "resumed from" in Path(f"{log}0").read_text()
    assert metrics_of(run)["iteration"].tolist() == list(range(1, STEPS + 1))
