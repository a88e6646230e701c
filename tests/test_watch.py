"""What a run tells while it runs: where the time goes, its slowest rank, traces, lines of the log, W&B."""

import gzip
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_training import DENSE, options, reference_data
from tiny import Axes, layout_of, prepare_ready_rows, reference_rows, release

from megatron_tw.config import CheckpointConfig, LoggingConfig, RunConfig, TrainConfig
from megatron_tw.evaluation import loss
from megatron_tw.parallel import contact
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.runtime.clock import PARTS, Clock
from megatron_tw.runtime.metrics import MetricsLog
from megatron_tw.runtime.profiling import StepProfiler
from megatron_tw.runtime.wandb_run import check_wandb
from megatron_tw.training import loop
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

__all__ = ["reference_data"]  # a fixture of test_training
AXES = Axes(dp=2)
DELAY = 0.4


def run_with_a_slow_rank(config: RunConfig) -> list[str]:
    """On a rank: a run in which rank 1 sleeps before each forward pass of a training step. Where the rank said it
    was."""
    inputs, places = open_inputs(config), []

    def spy(place: str) -> None:
        places.append(place)
        contact.now_at(place)

    with layout_of(AXES) as layout, pytest.MonkeyPatch.context() as patch:
        for module in (loop, loss):
            patch.setattr(module, "now_at", spy)
        run = Run.start(config, inputs, layout, prepare_device())

        def sleep(module, *_) -> None:
            if module.training and layout.rank == 1:
                time.sleep(DELAY)

        run.chunks[0].register_forward_pre_hook(sleep)
        run.train()
        release(run.step.model)
    return places


PLACES = [
    *("step 1", "step 2", "the checkpoint of step 2"),
    *("step 3", "the held-out rows after step 3", "validating, row 0"),
    *("step 4", "the held-out rows after step 4", "validating, row 0", "the checkpoint of step 4"),
]
"""Of the run below: what others tell of a rank that stops answering, and what counts as progress."""


def test_time_by_part_places_the_slowest_rank_and_traces(ranks, reference_data, tmp_path):
    held_out = prepare_ready_rows(reference_rows(), tmp_path / "held_out")
    config = options(
        AXES,
        reference_data,
        weighting=DENSE,
        train=TrainConfig(train_iters=4, global_batch_size=2, eval_interval=3, eval_iters=1),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run"), save_interval=2),
        logging=LoggingConfig(profile=True, profile_step_start=1, profile_step_end=3, profile_ranks=(1,)),
    )
    config = replace(config, data=replace(config.data, valid_data_path=str(held_out)))
    assert ranks(AXES.world_size).run(run_with_a_slow_rank, config) == [PLACES] * 2
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    for step in steps:
        seconds = {part: step[f"{part}_seconds"] for part in PARTS}
        assert all(
            seconds[part] > 0 for part in ("data", "scoring", "forward", "backward", "gradient_reduction", "optimizer")
        )
        within = sum(seconds[part] for part in PARTS if part not in ("data", "evaluation", "checkpoint"))
        assert within < step["step_seconds"] * 1.1
        assert seconds["forward"] > DELAY / 2
        assert 0 < step["rank_spread"] <= 1
        assert step["peak_memory_gib"] > 0.1
    assert sum(step["slowest_rank"] for step in steps) >= 3  # the machine may hold up rank 0 once
    assert [step["evaluation_seconds"] > 0 for step in steps] == [False, False, True, True]
    saving = [step["checkpoint_seconds"] for step in steps]
    assert saving.index(max(saving)) == 2  # that before it

    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "steps2-3_rank1.json.gz"
    with gzip.open(trace, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert any("scaled_dot_product" in str(name) for name in names)


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        (0, 8, "steps3-5_rank0.json.gz"),
        (0, 4, "steps3-4_rank0.json.gz"),
        (3, 8, "steps4-5_rank0.json.gz"),
        (0, 1, "none of the steps 3 to 5 (--profile-step-start, --profile-step-end) was done before the run ended"),
        (5, 8, "none of the steps 3 to 5 (--profile-step-start, --profile-step-end) was done before the run ended"),
    ],
    ids=["whole", "cut off", "begun late", "ended before", "begun after"],
)
def test_a_trace_is_of_the_steps_that_were_done_or_missed_aloud(first, last, told, tmp_path, capsys):
    profiler = StepProfiler(
        LoggingConfig(profile=True, profile_step_start=2, profile_step_end=5), str(tmp_path), rank=0
    )
    for step in range(first, last):
        profiler.before(step)
        profiler.after(step + 1)
    profiler.close(last)
    (line,) = capsys.readouterr().out.splitlines()
    assert told in line
    traces = [path.name for path in tmp_path.glob("profile/*")]
    assert traces == ([told] if told.endswith(".gz") else [])


def test_a_part_counts_once() -> None:
    """What Megatron-Core times within a part is of that part; timers that nobody knows are not counted."""
    clock = Clock(prepare_device())
    with clock.part("scoring"):
        clock("forward-compute", log_level=2).start()
        clock("forward-compute").stop()
    clock("forward-backward", log_level=1).start(barrier=True)
    clock("forward-backward").stop()
    assert {name: len(spans) for name, spans in clock._spans.items()} == {"scoring": 1}
    clock("backward-compute", log_level=2).start()
    clock("backward-compute").stop()
    assert "backward" in clock._spans


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_line_has_at_most_120_columns(on_a_gpu, capsys):
    log = MetricsLog(None, None, start_iteration=0, train_iters=100_000, log_interval=1)
    log._written[0] -= 30  # a step of half a minute
    rate = {"tflops_per_second_per_gpu": 1234.0, "model_flops_utilization": 0.4321}
    log.write(
        {"iteration": 1, "weighted_loss": 12.34567, "lm_loss": 12.34567, "grad_norm": 1234.5678,
         "tokens_per_second": 12_345_678.9, "learning_rate": 1.2345e-5, **(rate if on_a_gpu else {})}
    )  # fmt: skip
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) + len("100000") - len("1") <= 120
    assert line.startswith("step 1/100000: loss 12.3457, lm 12.3457, grad 1.23e+03, 12.3M tok/s")
    assert re.search(r", lr 1.23e-05, 8\d\d:\d\d:\d\d left$", line)
    assert ("1234 TFLOP/s 43%" in line) == on_a_gpu


@pytest.mark.full
def test_weights_and_biases_offline(reference_data, tmp_path):
    """With the package of now, in a folder of its own: what a run sends is in W&B's own file, and a resume goes on."""
    packages, save = tmp_path / "packages", tmp_path / "run"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", packages, "wandb"], check=True)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
    model = options(AXES, reference_data).model.load_hf
    command = [
        sys.executable, "tools/train.py", f"--load-hf={model}", f"--data-path={reference_data}", "--seq-length=256",
        "--global-batch-size=1", f"--save={save}", f"--load={save}", "--wandb-project=extension", "--log-interval=1",
    ]  # fmt: skip
    for steps in (1, 2):
        run = subprocess.run(
            [*command, f"--train-iters={steps}"], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
    files = sorted((save / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "the same run"
    for file in files:
        for name in (b"lm_loss", b"backward_seconds", b"lm_loss_by_position/1-31", b"weighting"):
            assert name in file.read_bytes(), name
    refused = subprocess.run(
        [*command, "--train-iters=3"], env={**environment, "WANDB_MODE": "online", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --wandb-project extension: ")
    assert len(refused.stderr.splitlines()) == 1


def test_steps_before_a_checkpoint_are_on_disk_whatever_follows(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers = {"weighted_loss": 1.0, "lm_loss": 2.0, "grad_norm": 3.0, "tokens_per_second": 4.0, "learning_rate": 5.0}
    log = MetricsLog(tmp_path, tmp_path, start_iteration=0, train_iters=4, log_interval=10)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    for step in (1, 2):
        log.write({"iteration": step, **numbers})
    log.flush()
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
    events = EventAccumulator(str(tmp_path)).Reload()  # as it is when the run is killed now
    assert [event.step for event in events.Scalars("lm_loss")] == [1, 2]
    log.close()


@pytest.mark.parametrize(("mode", "sent"), [("offline", [1, 2, 3]), ("online", [3])])
def test_an_offline_run_of_weights_and_biases_gets_the_steps_before_again(mode, sent, tmp_path):
    """`wandb sync` puts its file in the place of that of the run before."""
    numbers = {
        "weighted_loss": 1.0, "lm_loss": 2.0, "grad_norm": None, "tokens_per_second": 4.0, "learning_rate": 5.0,
        "ruler": {"niah": 6.0, "vt": None},
    }  # fmt: skip
    lines = [json.dumps({"iteration": step, **numbers}) + "\n" for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    logged: list[dict] = []
    run = SimpleNamespace(settings=SimpleNamespace(mode=mode), log=logged.append, finish=lambda exit_code: None)
    log = MetricsLog(tmp_path, None, start_iteration=2, train_iters=4, log_interval=10, wandb=run)
    log.write({"iteration": 3, **numbers, "grad_norm": math.nan})
    log.close()
    assert [step["iteration"] for step in logged] == sent
    assert all(step == logged[0] | {"iteration": step["iteration"]} for step in logged)
    assert logged[0].keys() == {"iteration", *numbers, "ruler/niah"} - {"grad_norm", "ruler"}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the package is here")
def test_a_missing_package_is_named(reference_data):
    with pytest.raises(ValueError, match="--wandb-project: expected the package wandb, found none"):
        check_wandb(options(AXES, reference_data, logging=LoggingConfig(wandb_project="extension")))
