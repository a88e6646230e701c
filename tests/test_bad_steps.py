"""NaN, infinite gradients and losses that jump: what --on-bad-step says, on all ranks alike, and after a resume too."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import DENSE, METRICS, MOVING, options, reference_data
from tiny import Axes, layout_of, release

from megatron_tw.config import CheckpointConfig, FaultConfig, RunConfig, TrainConfig
from megatron_tw.evaluation.training import read_metrics
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.bad_steps import LEAST_LOSSES, BadStepError, BadSteps
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run
from megatron_tw.training.scorers import EmaScorer

__all__ = ["reference_data"]  # a fixture of test_training
SKIP = FaultConfig(on_bad_step="skip", max_bad_steps=2)
FAULTS = {
    "NaN": lambda nll: nll * torch.nan,
    "infinite gradients": lambda nll: nll if not nll.requires_grad else _with_infinite_gradient(nll),
    "high": lambda nll: nll * 3,
}


def _with_infinite_gradient(nll: torch.Tensor) -> torch.Tensor:
    nll = nll * 1.0
    nll.register_hook(lambda gradient: gradient * torch.inf)
    return nll


def run_of(axes: Axes, data: Path, save: Path | None, steps: int, faults: FaultConfig, **changes: Any) -> RunConfig:
    folder = str(save) if save is not None else None
    return options(
        axes,
        data,
        weighting=DENSE,
        scorer=MOVING,
        train=TrainConfig(train_iters=steps, global_batch_size=2, **changes),
        checkpoint=CheckpointConfig(save=folder, load=folder),
        faults=faults,
    )


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def run_with(axes: Axes, config: RunConfig, faults: Mapping[int, str], ranks: tuple[int, ...]) -> dict[str, Any]:
    """On a rank: a run in whose steps of these numbers, on these ranks alone, something is wrong. What was raised; of
    each step the weights, the moving average and the learning rate after it; and the samples that were taken."""
    inputs = open_inputs(config)
    seen: dict[str, Any] = {"weights": [], "average": [], "rate": [], "raised": None}
    with layout_of(axes) as layout:
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
        assert isinstance(scorer, EmaScorer)
        average = scorer.average
        run.chunks[0].register_forward_hook(break_it)
        run.chunks[0].register_forward_pre_hook(look)
        try:
            run.train()
        except BadStepError as error:
            seen["raised"] = str(error)
        seen["samples"] = run.loader.consumed_samples
        release(run.step.model)
    return seen


@pytest.mark.parametrize(
    ("axes", "how", "numbers"),  # steps whose losses are numbers, as rank 0 sees them
    [(Axes(tp=2), "NaN", 6), (Axes(dp=2), "NaN", 4), (Axes(dp=2), "infinite gradients", 6)],
)
def test_a_bad_step_of_one_rank_is_skipped_by_all(axes, how, numbers, ranks, reference_data, tmp_path):
    config = run_of(axes, reference_data, tmp_path / "run", 6, SKIP)
    for seen in ranks(2).run(run_with, axes, config, {3: how, 4: how}, (1,)):
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
