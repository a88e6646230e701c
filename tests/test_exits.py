"""Runs that end before their last step: all ranks together, with a checkpoint from which the run goes on."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_training import DENSE, METRICS, metrics_of, options, reference_data, run_all
from tiny import Axes, layout_of, release

from megatron_tw.config import CheckpointConfig, RunConfig, TrainConfig
from megatron_tw.parallel.devices import Device, prepare_device
from megatron_tw.runtime import exits as exits_module
from megatron_tw.runtime.exits import Exits
from megatron_tw.training import loop
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

__all__ = ["reference_data"]  # a fixture of test_training
AXES = Axes(pp=2)


def run_with_signal(config: RunConfig) -> None:
    """On a rank: a run in whose third step rank 1, and no other, is sent SIGTERM."""
    inputs = open_inputs(config)
    with layout_of(AXES) as layout:
        run = Run.start(config, inputs, layout, prepare_device())

        def send(*_) -> None:
            if run.iteration == 2 and layout.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run.chunks[0].register_forward_pre_hook(send)
        run.train()
        release(run.step.model)


def run_with_signal_while_saving(config: RunConfig) -> None:
    """On a rank: a run in which rank 1, and no other, is sent SIGTERM while its first checkpoint is written."""
    inputs = open_inputs(config)
    with layout_of(AXES) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        begin = run.begin_checkpoint

        def begin_and_send() -> Any:
            if layout.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return begin()

        run.begin_checkpoint = begin_and_send  # type: ignore[method-assign]
        run.train()
        release(run.step.model)


def run_after_a_long_start(config: RunConfig) -> None:
    """On a rank: a run whose loading takes a minute on rank 1, and on no other."""
    start, loaded = Run.start, []

    def start_late(*arguments: Any) -> Run:
        run = start(*arguments)
        loaded.append(True)
        return run

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 60 * dist.get_rank() * len(loaded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "start", start_late)
        for module in (loop, exits_module):
            patch.setattr(module, "time", clock)
        run_all([config])


def reasons_when_time_is_over(config: TrainConfig) -> list[str | None]:
    """On a rank: the reasons to stop before and after rank 1, and no other, finds that a minute is over."""
    with Exits(config, prepare_device(), time.monotonic()) as exits:
        before = exits.reason(1)
        if dist.get_rank() == 1:
            exits._started -= 60
        return [before, exits.reason(2)]


def test_a_signal_ends_the_run_after_the_step(ranks, reference_data, tmp_path):
    def config(save: Path) -> RunConfig:
        return options(
            AXES,
            reference_data,
            weighting=DENSE,
            train=TrainConfig(train_iters=5, global_batch_size=2, exit_signal_handler=True),
            checkpoint=CheckpointConfig(save=str(save), load=str(save)),
        )

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pool = ranks(AXES.world_size)
    pool.run(run_all, [config(straight)])
    pool.run(run_with_signal, config(stopped))
    assert metrics_of(stopped)["iteration"].tolist() == [1, 2, 3]
    assert (stopped / "iter_0000003").is_dir()
    pool.run(run_all, [config(stopped)])
    resumed, expected = metrics_of(stopped), metrics_of(straight)
    for key in METRICS:
        assert resumed[key].tolist() == expected[key].tolist(), key


def test_a_signal_while_a_checkpoint_is_written_ends_the_run_with_it(ranks, reference_data, tmp_path):
    save = tmp_path / "run"
    config = options(
        AXES,
        reference_data,
        train=TrainConfig(train_iters=5, global_batch_size=2, exit_signal_handler=True),
        checkpoint=CheckpointConfig(save=str(save), save_interval=2),
    )
    ranks(AXES.world_size).run(run_with_signal_while_saving, config)
    assert metrics_of(save)["iteration"].tolist() == [1, 2]
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000002"]


def test_when_time_is_over_all_ranks_stop(ranks):
    config = TrainConfig(train_iters=5, exit_duration_in_mins=1)
    assert ranks(2).run(reasons_when_time_is_over, config) == 2 * [[None, "--exit-duration-in-mins 1"]]


def test_the_time_of_loading_counts(ranks, reference_data, tmp_path):
    config = options(
        AXES,
        reference_data,
        train=TrainConfig(train_iters=5, global_batch_size=2, exit_duration_in_mins=1),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    ranks(AXES.world_size).run(run_after_a_long_start, config)
    assert metrics_of(tmp_path / "run")["iteration"].tolist() == [1]


@pytest.mark.parametrize("handled", [True, False])
def test_the_signal_means_what_it_did_once_the_run_is_over(handled):
    before = signal.getsignal(signal.SIGTERM)
    device = Device("cpu", "gloo", torch.device("cpu"))
    with Exits(TrainConfig(train_iters=5, exit_signal_handler=handled), device, time.monotonic()):
        assert (signal.getsignal(signal.SIGTERM) == before) != handled
    assert signal.getsignal(signal.SIGTERM) == before
