"""Training reproduces the method's reference runs under every layout, and resumes exactly."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import (
    BOS,
    SEQ_LENGTH,
    STRIDE,
    TINY_LLAMA,
    WINDOW,
    Axes,
    layout_of,
    load_tiny,
    prepare_ready_rows,
    reference_rows,
    release,
)

from megatron_tw.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.config.scoring import ScoringConfig, ScoringOptions
from megatron_tw.model.forward import ShortWindowForward
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.programs.scoring import score_tokens
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run, train

DENSE = WeightingOptions(weighting="dense", interpolation=0.75)
SPARSE_UNFROZEN = WeightingOptions(weighting="sparse", sparsification=0.2)
SPARSE_FROZEN = WeightingOptions(weighting="sparse", sparsification=0.4)
LONGCE = WeightingOptions(weighting="longce", truncation=5.0)
WINDOWS = WindowsConfig(short_window=WINDOW, short_stride=STRIDE)
UNFROZEN = ScorerConfig()
LIVE = ScorerConfig(scorer="frozen", scorer_hf=str(TINY_LLAMA))
# A moving average that keeps everything of itself stays the initial model, which is the frozen scorer of the reference.
EMA = ScorerConfig(scorer="ema", scorer_ema_decay=1.0)
CACHED = ScorerConfig(scorer="frozen", scores=("scores",))
TRAJECTORIES = [
    ("trajectory_uniform", WeightingOptions(), UNFROZEN),
    ("trajectory_dense_unfrozen", DENSE, UNFROZEN),
    ("trajectory_sparse_unfrozen", SPARSE_UNFROZEN, UNFROZEN),
    ("trajectory_longce_unfrozen", LONGCE, UNFROZEN),
    ("trajectory_dense_frozen", DENSE, CACHED),
    ("trajectory_sparse_frozen", SPARSE_FROZEN, LIVE),
    ("trajectory_sparse_frozen", SPARSE_FROZEN, EMA),
]
METRICS = {
    "weighted_loss": "weighted_loss",
    "lm_loss": "unweighted_loss",
    "grad_norm": "grad_norm",
    "weight_std": "weight_std",
}
RELATIVE = 2e-4

LAYOUTS = [
    Axes(),
    Axes(dp=2),
    Axes(tp=2),
    Axes(pp=2),
    Axes(cp=2),
    Axes(pp=2, vpp_layers=1),
    Axes(tp=2, cp=2),
    Axes(pp=2, cp=2),
    Axes(cp=2, dp=2),
    Axes(tp=2, pp=2, cp=2),
]
# All that 8 ranks, 4 attention heads, 4 layers and a global batch of 2 admit.
FULL_LAYOUTS = [
    Axes(tp=tp, pp=pp, cp=cp, dp=dp, vpp_layers=vpp)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for cp in (1, 2, 4, 8)
    for dp in (1, 2)
    for vpp in (0, 1)
    if tp * pp * cp * dp <= 8 and (vpp == 0 or (pp == 2 and dp == 1))
]
assert len(FULL_LAYOUTS) == 34
ALL = TRAJECTORIES
MAIN, FROZEN = TRAJECTORIES[:3], TRAJECTORIES[-2:]
# Which runs a layout repeats in the ordinary suite, one rank all their steps, others the first few; with --full every
# layout repeats all of them.
STEPS, FEW = 12, 4
RUNS = {Axes(): ALL, Axes(pp=2, vpp_layers=1): ALL, Axes(cp=2, dp=2): FROZEN,
        Axes(tp=2, pp=2, cp=2): TRAJECTORIES[1:2]}  # fmt: skip
EVERY_LAYOUT = [
    pytest.param(axes, RUNS.get(axes, MAIN), STEPS if axes == Axes() else FEW, id=axes.name) for axes in LAYOUTS
] + [
    pytest.param(axes, ALL, STEPS, id=f"{axes.name}-all", marks=pytest.mark.full)
    for axes in sorted(FULL_LAYOUTS, key=lambda axes: axes.world_size)
    if axes != Axes()
]


def options(axes: Axes, data: Path, **changes) -> RunConfig:
    """A run of the tiny Llama on reference rows, as the reference runs were made."""
    sections = {
        "parallel": axes.parallel(),
        "model": ModelConfig(load_hf=str(TINY_LLAMA)),
        "data": DataConfig(data_path=(str(data),), seq_length=SEQ_LENGTH, shuffle=False, bos_id=BOS),
        "train": TrainConfig(train_iters=STEPS, global_batch_size=2),
        "optimizer": OptimizationConfig(lr=1e-3, weight_decay=0.01, clip_grad=1.0, adam_beta1=0.9, adam_beta2=0.95),
        "windows": WINDOWS,
        "checkpoint": CheckpointConfig(),
    }
    return RunConfig(**{**sections, **changes})


def run_all(configs: list[RunConfig]) -> None:
    """On a rank: these runs one after the other."""
    for config in configs:
        try:
            release(train(config).step.model)
        finally:
            destroy_layout()
            gc.collect()


def run_steps(axes: Axes, configs: list[RunConfig]) -> list[dict[str, list[float]]]:
    """On a rank: the metrics of all steps of these runs, without logs and checkpoints."""
    all_metrics = []
    for config in configs:
        inputs = open_inputs(config)
        with layout_of(axes) as layout:
            run = Run.start(config, inputs, layout, prepare_device())
            try:
                steps = [run.step(next(run.loader), iteration) for iteration in range(config.train.train_iters)]
            finally:
                release(run.step.model)
                del run
        all_metrics.append({key: [step[key] for step in steps] for key in METRICS})
    return all_metrics


def metrics_of(save: Path) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {key: np.array([line[key] for line in lines]) for key in lines[0]}


@pytest.fixture(scope="module")
def reference_data(tmp_path_factory, reference) -> Path:
    """The rows of the reference runs in the order in which they were used: 12 steps of two micro-batches."""
    order = np.load(reference / "trajectory_uniform.npz")["row_index"]
    for name, *_ in TRAJECTORIES:
        assert (np.load(reference / f"{name}.npz")["row_index"] == order).all()
    return prepare_ready_rows(reference_rows()[order.flatten()], tmp_path_factory.mktemp("data") / "rows")


def make_scores(config: ScoringConfig) -> None:
    """On a rank: the scores of a dataset, by the initial model."""
    try:
        score_tokens(config)
    finally:
        destroy_layout()
        gc.collect()


def scoring_options(data: Path, output: Path) -> ScoringConfig:
    """Frozen scores of `data` by the tiny Llama."""
    scoring = ScoringOptions(data_path=str(data), output=str(output), bos_id=BOS)
    return ScoringConfig(scoring=scoring, model=ModelConfig(load_hf=str(TINY_LLAMA)), windows=WINDOWS)


@pytest.fixture(scope="module")
def reference_scores(reference_data, ranks) -> Path:
    """Frozen scores of the rows of the reference runs."""
    output = reference_data.parent / "scores"
    ranks(1).run(make_scores, scoring_options(reference_data, output))
    return output


@pytest.mark.core
@pytest.mark.parametrize(("axes", "trajectories", "steps"), EVERY_LAYOUT)
def test_trajectories(axes, trajectories, steps, ranks, reference, reference_data, reference_scores):
    cached = replace(CACHED, scores=(str(reference_scores),))
    train = TrainConfig(train_iters=steps, global_batch_size=2)
    for name, weighting, scorer in trajectories:
        scorer = cached if scorer is CACHED else scorer
        config = options(axes, reference_data, weighting=weighting, scorer=scorer, train=train)
        by_rank = [metrics for (metrics,) in ranks(axes.world_size).run(run_steps, axes, [config])]
        expected, metrics = np.load(reference / f"{name}.npz"), by_rank[0]
        for ours, theirs in METRICS.items():
            np.testing.assert_allclose(
                metrics[ours],
                expected[theirs][:steps],
                rtol=RELATIVE,
                atol=1e-6,
                err_msg=f"{name} {scorer.scorer} {ours}",
            )
        assert all(metrics == by_rank[0] for metrics in by_rank), "every rank must report the same numbers"


RESUME_FROM, RESUMED = 3, 5


MOVING = ScorerConfig(scorer="ema", scorer_ema_decay=0.9)


@pytest.mark.core
@pytest.mark.parametrize(
    ("before", "after", "scorer"),
    [
        (Axes(), Axes(), UNFROZEN),
        (Axes(tp=2, cp=2), Axes(tp=2, cp=2), MOVING),
        (Axes(pp=2, vpp_layers=1), Axes(pp=2, vpp_layers=1), UNFROZEN),
        pytest.param(Axes(tp=2, pp=2), Axes(cp=2), MOVING, marks=pytest.mark.full),
        (Axes(cp=2, dp=2), Axes(pp=2, vpp_layers=1), UNFROZEN),
    ],
    ids=lambda value: value.name if isinstance(value, Axes) else value.scorer,
)
def test_stop_and_resume(before, after, scorer, ranks, reference_data, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    def config(axes: Axes, save: Path, exit_interval: int | None = None) -> RunConfig:
        return options(
            axes,
            reference_data,
            weighting=SPARSE_UNFROZEN,
            scorer=scorer,
            train=TrainConfig(train_iters=RESUMED, global_batch_size=2, exit_interval=exit_interval),
            checkpoint=CheckpointConfig(save=str(save), load=str(save), save_interval=RESUME_FROM),
        )

    ranks(before.world_size).run(run_all, [config(before, straight), config(before, resumed, RESUME_FROM)])
    # A step after the checkpoint, lost in a crash: it must not stand twice in the log.
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({**dict.fromkeys(METRICS, 0.0), "iteration": RESUME_FROM + 1}) + "\n" + '{"iteration": 5, "cut o'
        )
    ranks(after.world_size).run(run_all, [config(after, resumed)])
    expected, metrics = metrics_of(straight), metrics_of(resumed)
    assert metrics["iteration"].tolist() == list(range(1, RESUMED + 1))
    for key in METRICS:
        if before == after:
            assert metrics[key].tolist() == expected[key].tolist(), key
        else:
            np.testing.assert_allclose(metrics[key], expected[key], rtol=RELATIVE, atol=1e-6, err_msg=key)


def collectives_of_scoring(axes: Axes, data: Path) -> tuple[int, list[int], int]:
    """On a rank: windows run by this rank, sizes in elements of what the scoring pass moves over its context-parallel
    group."""
    sizes: list[int] = []
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout)
        forward = ShortWindowForward.create(
            SEQ_LENGTH, WINDOW, STRIDE, include_first=False, bos_id=BOS, layout=layout, sequence_parallel=axes.tp > 1
        )
        names = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all", "all_gather_into_tensor",
                 "reduce_scatter_tensor", "send", "isend")  # fmt: skip
        own = {name: getattr(dist, name) for name in names}

        def counting(name):
            def call(tensor, *args, **kwargs):
                if kwargs.get("group") is layout.cp_group or layout.cp_group in args:
                    tensors = tensor if isinstance(tensor, list) else [tensor]
                    sizes.append(sum(x.numel() for x in tensors))
                return own[name](tensor, *args, **kwargs)

            return call

        calls = []
        hook = chunks[0].register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
        )
        try:
            for name in own:
                setattr(dist, name, counting(name))
            forward.short_nll(chunks, torch.from_numpy(reference_rows())[:1])
        finally:
            for name, function in own.items():
                setattr(dist, name, function)
            hook.remove()
    return sum(calls), sizes, len(forward.windows)


@pytest.mark.parametrize("axes", [Axes(cp=2), Axes(cp=4), Axes(tp=2, cp=2)], ids=lambda axes: axes.name)
def test_scoring_deals_windows_out_and_moves_only_nlls(axes, ranks, reference_data):
    for windows_run, sizes, num_windows in ranks(axes.world_size).run(collectives_of_scoring, axes, reference_data):
        assert num_windows == 4
        assert windows_run == 4 // axes.cp
        assert sizes, "the scoring pass must exchange the NLLs of the row"
        assert max(sizes) <= SEQ_LENGTH - 1
