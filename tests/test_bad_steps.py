"""NaN, infinite gradients and losses that jump: what --on-bad-step says, on all ranks alike, and after a resume too."""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_training import DENSE, METRICS, MOVING, UNFROZEN, options, reference_data
from tiny import Axes, layout_of, release

from megatron_tw.config import CheckpointConfig, DataParallelConfig, FaultConfig, RunConfig, ScorerConfig, TrainConfig
from megatron_tw.evaluation.training import read_metrics
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training import bad_steps
from megatron_tw.training.bad_steps import LEAST_LOSSES, BadStepError, BadSteps
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run
from megatron_tw.training.scorers import EmaScorer

__all__ = ["reference_data"]  # a fixture of test_training
SKIP = FaultConfig(on_bad_step="skip", max_bad_steps=2)
FAULTS = {
    "NaN": lambda nll: nll * torch.nan,
    "infinite gradients": lambda nll: _with_infinite_gradient(nll) if nll.requires_grad else nll,
    "high": lambda nll: nll * 3,
}


def _with_infinite_gradient(nll: torch.Tensor) -> torch.Tensor:
    nll = nll * 1.0
    if not nll.requires_grad:  # what a stage was sent asks for gradients in a pass without any, too
        return nll
    nll.register_hook(lambda gradient: gradient * torch.inf)
    return nll


def run_of(
    axes: Axes, data: Path, save: Path | None, steps: int, faults: FaultConfig, scorer: ScorerConfig = MOVING,
    **changes: Any,
) -> RunConfig:  # fmt: skip
    folder = str(save) if save is not None else None
    return options(
        axes,
        data,
        weighting=DENSE,
        scorer=scorer,
        train=TrainConfig(train_iters=steps, global_batch_size=2, **changes),
        checkpoint=CheckpointConfig(save=folder, load=folder),
        faults=faults,
    )


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def run_with(
    axes: Axes, config: RunConfig, faults: Mapping[int, str], ranks: tuple[int, ...], least_losses: int = LEAST_LOSSES
) -> dict[str, Any]:
    """On a rank: a run in whose steps of these numbers, on these ranks alone, something is wrong. What was raised and
    said; of each step the weights, the moving average and the learning rate after it; and the samples that were taken.

    least_losses: that a loss is compared with."""
    inputs, said = open_inputs(config), io.StringIO()
    seen: dict[str, Any] = {"weights": [], "average": [], "rate": [], "raised": None}
    with (
        layout_of(axes) as layout,
        contextlib.redirect_stdout(said),
        mock.patch.object(bad_steps, "LEAST_LOSSES", least_losses),
    ):
        run = Run.start(config, inputs, layout, prepare_device())

        def break_it(module, arguments, nll):
            how = faults.get(run.iteration + 1)
            return FAULTS[how](nll) if how is not None and layout.rank in ranks else nll

        def look(*_) -> None:
            """Before the first forward pass of a step, with the weights gathered."""
            if len(seen["rate"]) < run.iteration + 1 - start:
                seen["weights"].append(digest(run.chunks[0].parameters()))
                seen["average"].append(digest(average.values()))
                seen["rate"].append(run.step.scheduler.num_steps)

        start, scorer = run.iteration, run.step.scorer
        average = scorer.average if isinstance(scorer, EmaScorer) else {}
        run.chunks[0].register_forward_hook(break_it)
        run.chunks[0].register_forward_pre_hook(look)
        try:
            run.train()
        except BadStepError as error:
            seen["raised"] = str(error)
        seen["samples"] = run.loader.consumed_samples
        release(run.step.model)
    seen["said"] = said.getvalue()
    return seen


@pytest.mark.parametrize(
    ("axes", "how", "numbers"),  # steps whose losses are numbers, as rank 0 sees them
    [
        (Axes(tp=2), "NaN", 6),
        (Axes(dp=2), "NaN", 4),
        (Axes(dp=2), "infinite gradients", 6),
        *(
            pytest.param(axes, how, numbers, marks=pytest.mark.full)
            for axes in (Axes(pp=2), Axes(pp=2, vpp_layers=1))
            for how, numbers in (("NaN", 4), ("infinite gradients", 6))
        ),
    ],
)
def test_a_bad_step_of_one_rank_is_skipped_by_all(axes, how, numbers, ranks, reference_data, tmp_path):
    config, said = run_of(axes, reference_data, tmp_path / "run", 6, SKIP), ""
    for seen in ranks(2).run(run_with, axes, config, {3: how, 4: how}, (1,)):
        said += seen["said"]
        assert seen["raised"] is None
        weights, average = seen["weights"], seen["average"]
        assert weights[2] == weights[3] == weights[4]  # before steps 3, 4 and 5
        assert average[2] == average[3] == average[4]
        assert len(set(weights)) == len(set(average)) == 4
        assert seen["rate"] == [0, 1, 2, 3, 4, 5]
        assert seen["samples"] == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, True, False, False]
    assert len(read_metrics(tmp_path / "run")) == numbers
    told = [line for line in said.splitlines() if "skipped" in line]
    why = "long NLL: expected finite values, got nan at row " if how == "NaN" else "gradients: a norm of "
    assert len(told) == 2
    for line, step, in_a_row in zip(told, (3, 4), (1, 2), strict=True):
        assert line.startswith(f"step {step}: skipped, {in_a_row} in a row of at most 2: {why}")


@pytest.mark.full
def test_a_bad_step_is_skipped_alike_with_and_without_overlap(ranks, reference_data, tmp_path):
    """Gradients are reduced during backward and weights gathered during forward, as without options."""
    axes, found = Axes(dp=2), []
    for name, overlap in (("overlap", None), ("none", False)):
        config = run_of(axes, reference_data, tmp_path / name, 6, SKIP, UNFROZEN)
        overlaps = DataParallelConfig(overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        by_rank = ranks(2).run(run_with, axes, replace(config, data_parallel=overlaps), {3: "NaN", 4: "NaN"}, (1,))
        assert [seen["raised"] for seen in by_rank] == [None, None]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
        found.append([[line[key] for line in lines if line[key] is not None] for key in METRICS])
    decided = DataParallelConfig().decided(2, weights_used_at_once=False)
    assert decided.overlap_grad_reduce
    assert decided.overlap_param_gather
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_too_many_in_a_row_and_any_without_skip_end_the_run(ranks, reference_data, tmp_path):
    axes = Axes(tp=2)
    config = run_of(axes, reference_data, tmp_path / "run", 9, SKIP)
    bad = dict.fromkeys((2, 4, 5, 6), "NaN")
    for seen in ranks(2).run(run_with, axes, config, bad, (1,)):
        assert seen["raised"].startswith("step 6: long NLL: expected finite values, got nan at row ")
        assert ", rank 1 (" in seen["raised"]
        assert seen["raised"].endswith("no update was made, nor in the 2 steps before it (--max-bad-steps)")
    stops = run_of(axes, reference_data, None, 9, FaultConfig())
    for seen in ranks(2).run(run_with, axes, stops, bad, (1,)):
        assert seen["raised"].startswith("step 2: long NLL: expected finite values, got nan at row ")
        assert seen["raised"].endswith("no update was made (--on-bad-step skip would go on)")


def test_a_loss_that_jumps_ends_the_run_without_skip(ranks, reference_data):
    axes = Axes(tp=2)
    config = run_of(axes, reference_data, None, 6, FaultConfig(loss_spike_sigmas=6.0))
    for seen in ranks(2).run(run_with, axes, config, {5: "high"}, (0, 1), 3):
        assert seen["raised"].startswith("step 5: lm_loss: ")
        assert ", above --loss-spike-sigmas 6: the last 4 had a mean of " in seen["raised"]
        assert seen["raised"].endswith("no update was made (--on-bad-step skip would go on)")
        assert len(set(seen["weights"])) == 5
        assert "skipped" not in seen["said"]


def test_a_loss_that_jumps_is_found_after_a_resume_too(ranks, reference_data, tmp_path):
    axes, steps = Axes(dp=2), LEAST_LOSSES + 3
    faults = FaultConfig(on_bad_step="skip", loss_spike_sigmas=6.0)
    bad = {LEAST_LOSSES + 2: "high"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def config(save: Path, stop: int | None) -> RunConfig:
        return run_of(axes, reference_data, save, steps, faults, exit_interval=stop)

    pool = ranks(2)
    pool.run(run_with, axes, config(straight, None), bad, (0, 1))
    pool.run(run_with, axes, config(stopped, LEAST_LOSSES - 2), bad, (0, 1))
    pool.run(run_with, axes, config(stopped, None), bad, (0, 1))
    whole, resumed = read_metrics(straight), read_metrics(stopped)
    assert [step["skipped_steps"] for step in whole] == [0] * (LEAST_LOSSES + 1) + [1, 1]
    for key in (*METRICS, "skipped_steps"):
        assert [step[key] for step in resumed] == [step[key] for step in whole], key


def test_which_losses_are_too_high():
    steps = BadSteps(FaultConfig(on_bad_step="skip", loss_spike_sigmas=3.0))
    for index in range(LEAST_LOSSES):
        assert steps.too_high(1e6) is None
        steps.count(None, 1.0 + index % 2, index)  # mean 1.5, deviation 0.5
    assert steps.too_high(3.0) is None
    assert str(steps.too_high(3.01)).startswith(
        "lm_loss: 3.0100, above --loss-spike-sigmas 3: the last 20 had a mean of 1.5"
    )
    steps.count("high", 1e6, 20)
    assert (steps.in_a_row, steps.skipped, max(steps.losses)) == (1, 1, 2.0)
    again = BadSteps(steps.options)
    again.load_state_dict(json.loads(json.dumps(steps.state_dict())))
    assert (again.losses, again.in_a_row, again.skipped) == (steps.losses, 1, 1)
    for index in range(200):
        steps.count(None, 5.0, index)
    assert list(steps.losses) == [5.0] * 100
