"""Checkpoints written beside the training, and which of them are kept."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
from test_bad_input import arguments, run_tool, world
from test_checkpoint_damage import run_tool_on_a_full_disk
from test_training import DENSE, METRICS, MOVING, metrics_of, options, reference_data, run_all
from tiny import Axes, layout_of, release

from megatron_tw.config import CheckpointConfig, RunConfig, TrainConfig
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.runtime import beside, checkpoint
from megatron_tw.runtime.run_folder import TRACKER, complete_checkpoints
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

__all__ = ["reference_data", "world"]  # fixtures of others
AXES = Axes(dp=2)
STEPS = 5


def run_of(data: Path, save: Path, steps: int = STEPS, **changes) -> RunConfig:
    return options(
        AXES,
        data,
        weighting=DENSE,
        scorer=MOVING,
        train=TrainConfig(train_iters=steps, global_batch_size=2),
        checkpoint=CheckpointConfig(**{"save": str(save), "load": str(save), "save_interval": 1, **changes}),
    )


def names(save: Path) -> list[str]:
    assert not list(save.glob("*.partial"))
    return [path.name for path in complete_checkpoints(save)]


@pytest.mark.core
def test_written_beside_the_training_they_are_the_same(ranks, reference_data, tmp_path):
    """The steps that are made meanwhile do not come into them; of those that are surplus none is left."""
    at_once, apart, again = tmp_path / "at_once", tmp_path / "apart", tmp_path / "again"
    pool = ranks(AXES.world_size)
    keeps = {"async_save": True, "save_retain_interval": 3}
    pool.run(run_all, [run_of(reference_data, at_once, save_interval=None), run_of(reference_data, apart, **keeps)])
    assert names(apart) == ["iter_0000003", "iter_0000005"]
    assert (apart / TRACKER).read_text() == f"{STEPS}\n"
    expected, metrics = metrics_of(at_once), metrics_of(apart)
    from_third = run_of(reference_data, again, load=str(apart / "iter_0000003"), save_interval=None)
    longer = run_of(reference_data, apart, STEPS + 2, keep_last=1, async_save=True)
    pool.run(run_all, [from_third, longer])
    resumed = metrics_of(again)
    for key in METRICS:
        assert metrics[key].tolist() == expected[key].tolist(), key
        assert resumed[key].tolist() == expected[key].tolist()[3:], key
    assert names(apart) == ["iter_0000005", "iter_0000007"]  # the first of them was resumed from


def test_one_that_cannot_be_written_beside_the_training_is_told(world, ranks, tmp_path):
    save = ["--save", str(tmp_path / "run"), "--save-interval", "2", "--async-save", "--train-iters", "6"]
    for status, stderr in ranks(2).run(
        run_tool_on_a_full_disk, "train", arguments(world, *save, "--global-batch-size", "2")
    ):
        assert status == 2
        assert f"--save {tmp_path}/run: iter_0000002 could not be written" in stderr
        assert "there is no earlier checkpoint" in stderr
        assert len(stderr.splitlines()) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl", "tensorboard"}


def run_tool_with_room_for_one(tool: str, argv: list[str], save: Path) -> tuple[int, str]:
    """On a rank: a program on a disk that is full as soon as there is a checkpoint."""

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=0 if complete_checkpoints(save) else 2**40)

    with mock.patch("shutil.disk_usage", usage):
        return run_tool(tool, argv)


def test_before_a_save_there_must_be_room_for_it(world, ranks, tmp_path):
    run = tmp_path / "run"
    save = ["--save", str(run), "--save-interval", "1", "--train-iters", "3"]
    status, stderr = ranks(1).run(run_tool_with_room_for_one, "train", arguments(world, *save), run)[0]
    assert status == 2
    assert f"--save {run}: iter_0000002 could not be written, 0 GiB were free: expected 0.00" in stderr
    assert "of free space, nothing was written; the newest checkpoint is" in stderr
    assert names(run) == ["iter_0000001"]


@pytest.mark.parametrize(("newest", "expected"), [(100, 4000), (4000, 100)])
def test_the_room_is_for_what_is_expected_and_for_as_much_as_the_newest(newest, expected, tmp_path, monkeypatch):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "weights").write_bytes(bytes(newest))
    monkeypatch.setattr(checkpoint, "complete_checkpoints", lambda save: [save / "iter_0000001"])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=3999))
    with pytest.raises(OSError, match="of free space, nothing was written"):
        checkpoint._check_room(tmp_path, expected)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    checkpoint._check_room(tmp_path, expected)


def fail_while_saving(config: RunConfig) -> tuple[list[int], bool]:
    """On a rank: a run whose third step fails while a writer of its first checkpoint is at work. Which processes of its
    own are left, and whether there was such a writer."""

    def stay(*arguments, **named) -> None:
        time.sleep(600)

    inputs = open_inputs(config)
    with layout_of(AXES) as layout, mock.patch.object(beside, "_write_beside", stay):
        run = Run.start(config, inputs, layout, prepare_device())
        before = children()
        writers: list[int] = []

        def fail(*_) -> None:
            if run.iteration == 2:
                writers.extend(children() - before)
                raise RuntimeError("a bug")

        run.chunks[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="a bug"):
            run.train()
        release(run.step.model)
    return sorted(children() - before), bool(writers)


def children() -> set[int]:
    """Processes that this one has started and that are at work."""
    started = psutil.Process(os.getpid()).children(recursive=True)
    return {child.pid for child in started if child.status() != psutil.STATUS_ZOMBIE}


def test_one_that_was_begun_is_given_up_where_the_run_fails(ranks, reference_data, tmp_path):
    save = tmp_path / "run"
    config = run_of(reference_data, save, async_save=True, save_interval=2)
    pool = ranks(AXES.world_size)
    left = pool.run(fail_while_saving, config)
    assert left == [([], True), ([], False)]  # rank 1 holds nothing that rank 0 does not
    assert len(list(save.glob("iter_0000002.*.partial"))) == 1
    pool.run(run_all, [config])
    assert names(save) == ["iter_0000002", "iter_0000004", "iter_0000005"]
