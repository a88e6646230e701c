"""What a resumed run takes from its checkpoint and what from its options; and communication that overlaps computation,
whose small buckets are padded and whose weights are gathered late."""

import json
import shutil
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_model import read_tensors
from test_training import (
    DENSE,
    METRICS,
    RELATIVE,
    metrics_of,
    options,
    reference_data,
    run_all,
)
from tiny import TINY_LLAMA, Axes, layout_of, release

from megatron_tw.config import (
    CheckpointConfig,
    DataParallelConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
    parse_options,
)
from megatron_tw.model.architecture import read_architecture
from megatron_tw.model.families import layers
from megatron_tw.model.norm import RMSNorm
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.runtime.source import ModelSource
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run
from megatron_tw.training.scorers import EmaScorer, base, reads_updated_weights

__all__ = ["reference_data"]  # a fixture of test_training
STEPS, STOP = 6, 3
EMA = ScorerConfig(scorer="ema", scorer_ema_decay=0.9)


# Several buckets, nearly all of them padded: none of the tiny Llama's sizes fills one.
OVERLAP = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=10_000)


def run_of(axes: Axes, data: Path, save: Path, *, stop: int | None = None, **changes) -> RunConfig:
    train = TrainConfig(train_iters=STEPS, global_batch_size=2, exit_interval=stop)
    checkpoint = CheckpointConfig(save=str(save), load=str(save), save_hf=str(save) + "-hf")
    return options(axes, data, **{"weighting": DENSE, "train": train, "checkpoint": checkpoint, **changes})


def close(metrics: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for key in METRICS:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=RELATIVE, atol=1e-6, err_msg=key)


@pytest.fixture(scope="module")
def straight(ranks, reference_data, tmp_path_factory) -> Path:
    """A run of one rank, without a stop and without overlap."""
    save = tmp_path_factory.mktemp("runs") / "straight"
    ranks(1).run(run_all, [run_of(Axes(), reference_data, save)])
    return save


@pytest.mark.core
@pytest.mark.parametrize("axes", [Axes(dp=2), Axes(pp=2, vpp_layers=1)], ids=lambda axes: axes.name)
def test_overlapped_runs_learn_and_resume_alike(axes, straight, ranks, reference_data, tmp_path):
    pool = ranks(axes.world_size)
    pool.run(run_all, [run_of(axes, reference_data, tmp_path / "whole", data_parallel=OVERLAP)])
    whole = metrics_of(tmp_path / "whole")
    close(whole, metrics_of(straight))
    exported = [read_tensors(Path(f"{save}-hf")) for save in (straight, tmp_path / "whole")]
    for name, tensor in exported[0].items():  # AdamW's steps of 1e-3 a weight: a weight of the step before would show
        torch.testing.assert_close(exported[1][name], tensor, atol=2e-4, rtol=0, msg=name)
    stopped = tmp_path / "stopped"
    pool.run(run_all, [run_of(axes, reference_data, stopped, stop=STOP, data_parallel=OVERLAP)])
    pool.run(run_all, [run_of(axes, reference_data, stopped, data_parallel=OVERLAP)])
    resumed = metrics_of(stopped)
    for key in METRICS:
        assert resumed[key].tolist() == whole[key].tolist(), key


@pytest.mark.parametrize(
    ("axes", "given", "scorer", "decided"),
    [
        (Axes(dp=2), {}, ScorerConfig(), (True, True)),
        (Axes(cp=2), {}, EMA, (True, False)),
        (Axes(tp=2), {}, ScorerConfig(), (False, False)),
        (Axes(cp=2), {"overlap_grad_reduce": False}, ScorerConfig(), (False, False)),
        (Axes(cp=2), {"overlap_param_gather": False}, ScorerConfig(), (True, False)),
    ],
    ids=["DP", "moving average", "TP", "off", "reduce alone"],
)
def test_what_overlaps_is_decided_and_kept(axes, given, scorer, decided, ranks, reference_data, tmp_path):
    """In the saved options, and in what Megatron's wrapper and the optimizer were made with."""
    save = tmp_path / "run"
    given = DataParallelConfig(**given)
    config = run_of(axes, reference_data, save, stop=1, scorer=scorer, data_parallel=given)
    for overlaps in ranks(axes.world_size).run(overlaps_of, axes, config):
        assert overlaps == decided
    ranks(axes.world_size).run(run_all, [config])
    saved = parse_options(["--config", str(save / "iter_0000001" / "config.yaml")], RunConfig).data_parallel
    assert (saved.overlap_grad_reduce, saved.overlap_param_gather) == decided


def overlaps_of(axes: Axes, config: RunConfig) -> tuple[bool, bool]:
    """On a rank: what the wrapper of the model in training overlaps."""
    inputs = open_inputs(config)
    with layout_of(axes) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        ddp = run.step.model[0].ddp_config
        release(run.step.model)
    return ddp.overlap_grad_reduce, ddp.overlap_param_gather


def test_a_scorer_that_acts_after_updates_keeps_weights_from_being_gathered_late(monkeypatch):
    class Acting(EmaScorer):
        pass

    assert not reads_updated_weights("unfrozen")
    assert not reads_updated_weights("frozen")
    assert reads_updated_weights("ema")
    monkeypatch.setitem(base._SCORERS, "acting", Acting)
    assert reads_updated_weights("acting")


@pytest.mark.core
def test_padded_buckets_are_read_by_another_layout(straight, ranks, reference_data, tmp_path):
    before, save = Axes(dp=2), tmp_path / "run"
    config = run_of(before, reference_data, save, stop=STOP, data_parallel=OVERLAP)
    ranks(2).run(run_all, [config])
    ranks(1).run(run_all, [run_of(Axes(), reference_data, save)])
    close(metrics_of(save), metrics_of(straight))


AS_HELD: dict[str, Any] = {"dist_ckpt_optim_fully_reshardable": False}
"""Optimizer state saved as the ranks hold it."""


PARALLEL_LOAD: dict[str, Any] = {"ckpt_fully_parallel_load": True}


@pytest.mark.parametrize(
    ("axes", "given"),
    [
        pytest.param(Axes(dp=2), AS_HELD, id="DP2-as held"),
        pytest.param(Axes(dp=2), PARALLEL_LOAD, id="DP2-parallel load"),
        pytest.param(Axes(tp=2, cp=2), AS_HELD, id="TP2xCP2-as held", marks=pytest.mark.full),
        pytest.param(Axes(tp=2, cp=2), PARALLEL_LOAD, id="TP2xCP2-parallel load", marks=pytest.mark.full),
        pytest.param(Axes(pp=2, vpp_layers=1), AS_HELD, id="PP2-1layers-as held"),
        pytest.param(Axes(pp=2, vpp_layers=1), PARALLEL_LOAD, id="PP2-1layers-parallel load", marks=pytest.mark.full),
    ],
)
def test_other_ways_to_save_and_load_resume_exactly(given, axes, ranks, reference_data, tmp_path):
    pool, saves = ranks(axes.world_size), [tmp_path / "straight", tmp_path / "stopped"]
    straight, stopped = (
        replace(config, checkpoint=replace(config.checkpoint, save_hf=None, **given))
        for config in (run_of(axes, reference_data, save) for save in saves)
    )
    first = replace(stopped, train=replace(stopped.train, exit_interval=STOP))
    pool.run(run_all, [straight, first])
    pool.run(run_all, [stopped])
    whole, resumed = (metrics_of(save) for save in saves)
    for key in METRICS:
        assert resumed[key].tolist() == whole[key].tolist(), key


def opened(config: RunConfig) -> None:
    """On a rank: what a run does before anything is allocated."""
    prepare_device()
    open_inputs(config)


def test_state_saved_as_its_ranks_held_it_is_for_them_alone(straight, ranks, reference_data, tmp_path):
    """Other data-parallel ranks can read it, other tensor-parallel ones and other buckets cannot; weights can be."""
    save = tmp_path / "run"
    overlap = DataParallelConfig(overlap_grad_reduce=True)

    def config(axes: Axes, *, stop: int | None = None, buckets: DataParallelConfig = overlap) -> RunConfig:
        run = run_of(axes, reference_data, save, stop=stop, data_parallel=buckets)
        return replace(run, checkpoint=replace(run.checkpoint, save_hf=None, **AS_HELD))

    ranks(2).run(run_all, [config(Axes(dp=2), stop=STOP)])
    with pytest.raises(ValueError, match=r"^--load .*: its optimizer state was saved for the same layout"):
        ranks(2).run(opened, config(Axes(tp=2)))  # before a model is built
    for axes, buckets, now in (
        (Axes(tp=2), overlap, "TP 2 x PP 1, buckets of 40000000 parameters"),
        (Axes(pp=2, vpp_layers=1), overlap, "TP 1 x PP 2 x 2 chunks, buckets of 40000000 parameters"),
        (Axes(dp=2), DataParallelConfig(overlap_grad_reduce=False), "TP 1 x PP 1, one bucket"),
        (Axes(dp=2), OVERLAP, "TP 1 x PP 1, buckets of 10000 parameters"),
    ):
        said = "TP 1 x PP 1, buckets of 40000000 parameters; this run has " + now
        with pytest.raises(ValueError, match=f"^--load .*: its optimizer state was saved for the same layout.*{said}"):
            ranks(2).run(run_all, [config(axes, buckets=buckets)])
    other = replace(config(Axes(tp=2)), checkpoint=CheckpointConfig(pretrained_checkpoint=str(save)))
    ranks(2).run(run_all, [replace(other, train=replace(other.train, train_iters=1), windows=other.windows)])
    ranks(1).run(run_all, [config(Axes())])
    close(metrics_of(save), metrics_of(straight))


def test_this_runs_options_win_over_the_checkpoints(ranks, reference_data, tmp_path):
    first, then = (
        OptimizationConfig(lr=lr, adam_beta2=beta2, adam_eps=eps, weight_decay=decay)
        for lr, beta2, eps, decay in ((1e-3, 0.95, 1e-8, 0.01), (5e-4, 0.99, 1e-6, 0.1))
    )
    save = tmp_path / "run"
    ranks(1).run(run_all, [run_of(Axes(), reference_data, save, stop=STOP, optimizer=first)])
    resumed = run_of(Axes(), reference_data, save, optimizer=then)
    [groups] = ranks(1).run(groups_after_loading, resumed)
    for group in groups:
        assert group == {"lr": 5e-4, "max_lr": 5e-4, "betas": (0.9, 0.99), "eps": 1e-6, "decay": group["decay"]}
    assert {group["decay"] for group in groups} == {0.1, 0.0}
    ranks(1).run(run_all, [resumed])
    assert metrics_of(save)["learning_rate"].tolist() == STOP * [1e-3] + (STEPS - STOP) * [5e-4]


def groups_after_loading(config: RunConfig) -> list[dict]:
    """On a rank: the optimizer's numbers by parameter group."""
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        names = {"lr": "lr", "max_lr": "max_lr", "betas": "betas", "eps": "eps", "decay": "weight_decay"}
        groups = [{ours: group[theirs] for ours, theirs in names.items()} for group in run.step.optimizer.param_groups]
        release(run.step.model)
    return groups


class WithExtraState:
    """As Transformer Engine's modules: something besides the weights."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("a checkpoint has none")


def losses_from_step_3(config: RunConfig, extra_state: bool) -> list[float]:
    """On a rank: a run whose last norm keeps something besides its weights, or does not, and whose optimizer has a
    number that torch's AdamW has not."""
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout, pytest.MonkeyPatch.context() as patch:
        if extra_state:
            kind = type("NormWithExtraState", (WithExtraState, RMSNorm), {})
            patch.setitem(layers._NORMS, "RMSNorm", kind)
            made = torch.optim.AdamW.__init__
            patch.setattr(torch.optim.AdamW, "__init__", partialmethod(_with_a_number, made))
        run = Run.start(config, inputs, layout, prepare_device())
        assert ("decoder.final_layernorm._extra_state" in run.chunks[0].state_dict()) == extra_state
        assert not extra_state or all(group["bias_correction"] for group in run.step.optimizer.param_groups)
        run.train()
        release(run.step.model)
    return metrics_of(Path(str(config.checkpoint.save)))["lm_loss"].tolist()


def _with_a_number(self: torch.optim.AdamW, made, *args, **kwargs) -> None:
    made(self, *args, **kwargs)
    for group in self.param_groups:
        group["bias_correction"] = True


@pytest.mark.parametrize("extra_state", [False, True])
def test_a_checkpoint_passes_between_layers_with_extra_state_and_without(
    extra_state, straight, ranks, reference_data, tmp_path
):
    save, pool = tmp_path / "run", ranks(1)
    pool.run(losses_from_step_3, run_of(Axes(), reference_data, save, stop=STOP), extra_state)
    [losses] = pool.run(losses_from_step_3, run_of(Axes(), reference_data, save), not extra_state)
    assert losses == metrics_of(straight)["lm_loss"].tolist()


def average_less_weights(config: RunConfig) -> float:
    """On a rank: how far the moving average is from the model that was just loaded, at most."""
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        assert isinstance(run.step.scorer, EmaScorer)
        distance = max(float((average - weight).abs().max()) for weight, average in run.step.scorer.average.items())
        release(run.step.model)
    return distance


def test_a_moving_average_begins_at_the_loaded_weights(ranks, reference_data, tmp_path):
    """The checkpoint is of a run with another scorer."""
    save = tmp_path / "run"
    ranks(1).run(run_all, [run_of(Axes(), reference_data, save, stop=STOP)])
    assert ranks(1).run(average_less_weights, run_of(Axes(), reference_data, save, scorer=EMA)) == [0.0]
    own = tmp_path / "own"
    ranks(1).run(run_all, [run_of(Axes(), reference_data, own, stop=STOP, scorer=EMA)])
    [distance] = ranks(1).run(average_less_weights, run_of(Axes(), reference_data, own, scorer=EMA))
    assert 0 < distance < 0.1


def infinite_gradient(config: RunConfig) -> str:
    """On a rank: the error of a run in whose second step one gradient is infinite, on the first pipeline stage."""
    inputs = open_inputs(config)
    with layout_of(Axes(pp=2)) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        weight = next(run.chunks[0].decoder.parameters())
        weight.register_hook(lambda grad: grad / 0.0 if run.iteration == 1 and layout.pp_rank == 0 else grad)
        try:
            run.train()
        except ValueError as error:
            return str(error)
        finally:
            release(run.step.model)
    return "no error"


def test_gradients_that_are_not_finite_end_the_run_before_it_is_saved(ranks, reference_data, tmp_path):
    save = tmp_path / "run"
    checkpoint = CheckpointConfig(save=str(save), load=str(save), save_interval=1)
    config = run_of(Axes(pp=2), reference_data, save, checkpoint=checkpoint)
    for error in ranks(2).run(infinite_gradient, config):
        assert "step 2: gradients: a norm of" in error
    assert json.loads((save / "latest_checkpointed_iteration.txt").read_text()) == 1
    assert metrics_of(save)["iteration"].tolist() == [1]


def test_a_run_beyond_its_last_step_is_exported(straight, ranks, reference_data, tmp_path):
    """--train-iters is less than what the checkpoint has seen: no step is left, the export still is."""
    config = run_of(Axes(), reference_data, straight)
    checkpoint = CheckpointConfig(load=str(straight), save_hf=str(tmp_path / "hf"))
    train = replace(config.train, train_iters=STEPS - 1)
    ranks(1).run(run_all, [replace(config, train=train, checkpoint=checkpoint)])
    expected = read_tensors(Path(f"{straight}-hf"))
    found = read_tensors(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kept", "named", "expected"), [(32, 64, 32), (None, 64, 64), (None, None, 256)])
def test_whose_the_old_context_is(kept, named, expected):
    """Of a run that did not keep it: what --load-hf names, else the checkpoint, which names the new one."""
    saved: Any = SimpleNamespace(state=SimpleNamespace(old_context=kept))
    assert ModelSource(read_architecture(TINY_LLAMA), saved, None, None, named).old_context == expected


def test_the_old_context_is_remembered(ranks, reference_data, tmp_path):
    """Without short windows it is the length that the start model names; the checkpoint's names the new one."""
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    save = tmp_path / "run"
    changes = {"weighting": WeightingOptions(), "windows": WindowsConfig(), "model": ModelConfig(load_hf=str(folder))}
    first = run_of(Axes(), reference_data, save, stop=STOP, **changes)
    again = replace(first, model=ModelConfig(), train=replace(first.train, exit_interval=None))
    ranks(1).run(run_all, [first])
    ranks(1).run(run_all, [again])
    assert metrics_of(save)["weight_share_beyond_context"] == pytest.approx(np.full(STEPS, 192 / 255))
