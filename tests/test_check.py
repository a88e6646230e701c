"""tools/train.py --check: what is wrong is found without a training step, all of it at once."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from test_training import DENSE, options, reference_data
from tiny import Axes, prepare_ready_rows, reference_rows

from megatron_tw.config import CheckpointConfig, RunConfig
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.planning.check import Check, Line

__all__ = ["reference_data"]  # a fixture of test_training
AXES = Axes(cp=2)
PLAN = Path(__file__).resolve().parents[1] / "tools" / "plan.py"


def checked(config: RunConfig, memory: int | None = None) -> list[Line]:
    """On a rank: the lines; memory: of the machine, in bytes, instead of its own."""
    check = Check(config, PLAN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if memory is not None:
                patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
            check.run()
    finally:
        destroy_layout()
    return check.lines


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
    one, other = ranks(AXES.world_size).run(checked, config, 2**30)
    assert one == other
    assert [(line.part, line.ok) for line in one] == [
        ("options and files", True), ("rows", False), ("folders", True), ("memory", False), ("groups", True),
    ]  # fmt: skip
    text = {line.part: line.text for line in one}
    assert "the ids of row 3 are not those that were written" in text["rows"]
    assert "GB a rank, simulated; too large: " in text["memory"]
    assert "room for " in text["folders"]
    assert text["groups"].startswith("slowest all-reduce: CP ")
    assert text["groups"].endswith(" GB/s (ranks 0, 1)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "rows.jsonl"]  # nothing is left


def test_what_needs_files_that_do_not_open_is_left_out(ranks, reference_data):
    config = options(AXES, reference_data)
    config = replace(config, data=replace(config.data, data_path=(str(reference_data / "none"),)))
    (lines, _) = ranks(AXES.world_size).run(checked, config)
    assert [line.ok for line in lines] == [False, None, None, None, True]
    assert lines[0].text.startswith("--data-path: ")
    assert lines[-1].text.startswith("slowest all-reduce: all ranks ")


@pytest.mark.full
def test_the_program_ends_with_status_0_or_2(tmp_path):
    rows = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    command = [
        sys.executable, "tools/train.py", "--load-hf=tests/reference/tiny_llama", f"--data-path={rows}", "--check",
        "--seq-length=256", "--weighting=dense", "--short-window=64", "--train-iters=2", f"--save={tmp_path / 'run'}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split()[-1] for line in run.stdout.splitlines() if " FAILED " in line] == []
    assert len(run.stdout.splitlines()) == 5
    ids = np.fromfile(rows / "rows.bin", dtype="<u2")
    ids[10] ^= 1
    ids.tofile(rows / "rows.bin")
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: --check: failed: rows\n"
    assert not (tmp_path / "run").exists()
