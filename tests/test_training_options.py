"""Options that must not change what is learned (recomputation, tied embeddings), and those that must as said."""

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import DENSE, METRICS, RELATIVE, metrics_of, options, reference_data, run_all, run_steps
from tiny import (
    BOS,
    SEQ_LENGTH,
    STRIDE,
    TINY_LLAMA,
    VOCAB,
    WINDOW,
    Axes,
    prepare_ready_rows,
    reference_rows,
)

from megatron_tw.config import (
    ActivationConfig,
    CheckpointConfig,
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
)

__all__ = ["reference_data"]  # a fixture of test_training
STEPS = 3
SHORT_RUN = TrainConfig(train_iters=STEPS, global_batch_size=2)


@pytest.mark.parametrize(
    "axes",
    [Axes(), Axes(tp=2), pytest.param(Axes(pp=2, vpp_layers=1), marks=pytest.mark.full)],
    ids=lambda axes: axes.name,
)
def test_recomputation_changes_nothing(axes, ranks, reference_data):
    activations = [
        ActivationConfig(**recompute)
        for recompute in (
            {},
            {"recompute_granularity": "selective"},
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        )
    ]
    configs = [options(axes, reference_data, weighting=DENSE, activations=one, train=SHORT_RUN) for one in activations]
    plain, *recomputed = ranks(axes.world_size).run(run_steps, axes, configs)[0]
    for metrics in recomputed:
        for key in METRICS:
            np.testing.assert_allclose(metrics[key], plain[key], rtol=1e-6, err_msg=key)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A random Llama whose output projection is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=BOS, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "layouts",
    [[Axes(tp=2), Axes(pp=2), Axes(pp=2, vpp_layers=1)], pytest.param([Axes(tp=2, pp=2)], marks=pytest.mark.full)],
    ids=["2 ranks", "4 ranks"],
)
def test_tied_embeddings_learn_alike_in_every_layout(layouts, tied, ranks, reference_data):
    def run(axes: Axes) -> dict[str, list[float]]:
        config = options(axes, reference_data, weighting=DENSE, model=ModelConfig(load_hf=str(tied)), train=SHORT_RUN)
        return ranks(axes.world_size).run(run_steps, axes, [config])[0][0]

    expected = run(Axes())
    for axes in layouts:
        metrics = run(axes)
        for key in METRICS:
            np.testing.assert_allclose(metrics[key], expected[key], rtol=RELATIVE, err_msg=f"{axes.name} {key}")


def cosine(step: int, *, warmup: int, decay: int, high: float, low: float) -> float:
    """Learning rate of the step that `step` steps have gone before: Megatron's formula."""
    if step <= warmup:
        return high * step / warmup
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (decay - warmup)))) / 2


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_learning_rate(style, ranks, reference_data, tmp_path):
    high, low, warmup, steps = 1e-3, 1e-4, 2, 6
    schedule = OptimizationConfig(lr=high, min_lr=low, lr_decay_style=style, lr_warmup_iters=warmup)
    config = options(
        Axes(),
        reference_data,
        optimizer=schedule,
        train=TrainConfig(train_iters=steps, global_batch_size=1),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    ranks(1).run(run_all, [config])
    rates = metrics_of(tmp_path / "run")["learning_rate"]
    after = {
        "constant": [high] * steps,
        "linear": [high - (high - low) * (step - warmup) / (steps - warmup) for step in range(steps)],
        "cosine": [cosine(step, warmup=warmup, decay=steps, high=high, low=low) for step in range(steps)],
    }[style]
    expected = [high * step / warmup if step <= warmup else after[step] for step in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    saved = tmp_path / "run" / f"iter_{steps:07d}"
    assert (saved / "config.yaml").is_file()
    assert json.loads((saved / "run.json").read_text())["state"]["iteration"] == steps


def printed_by(config: RunConfig) -> str:
    """On a rank: what a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_all([config])
    return printed.getvalue()


def test_a_warm_up_longer_than_the_run_is_told_with_the_highest_rate(ranks, reference_data, tmp_path):
    config = options(
        Axes(),
        reference_data,
        optimizer=OptimizationConfig(lr=1e-3, min_lr=1e-4, lr_warmup_iters=20),
        train=SHORT_RUN,
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    (printed,) = ranks(1).run(printed_by, config)
    highest = metrics_of(tmp_path / "run")["learning_rate"].max()
    steps = SHORT_RUN.train_iters
    assert highest == pytest.approx(1e-3 * (steps - 1) / 20)
    told = f"warning: --lr-warmup-iters 20 does not end within --train-iters {steps}: the highest learning rate of this"
    assert f"{told} run is {highest:.3g}, not --lr 0.001\n" in printed
    assert "warning: --min-lr: nothing decays with --lr-decay-style constant\n" in printed


def test_a_schedule_moves_from_uniform_to_dense(ranks, reference_data):
    staged = WeightingOptions(weighting="dense", interpolation=0.5, weighting_schedule="0: uniform; 2: base")
    plain = WeightingOptions()
    configs = [options(Axes(), reference_data, weighting=weighting, train=SHORT_RUN) for weighting in (staged, plain)]
    moved, uniform = ranks(1).run(run_steps, Axes(), configs)[0]
    assert moved["weight_std"][:2] == [0.0, 0.0]
    assert all(std > 0 for std in moved["weight_std"][2:])
    assert moved["lm_loss"][:3] == uniform["lm_loss"][:3]


def test_losses_by_position_at_intervals(ranks, reference_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def lines(axes: Axes) -> list[dict[str, Any]]:
        save = tmp_path / axes.name
        config = options(
            axes,
            reference_data,
            weighting=DENSE,
            train=TrainConfig(train_iters=5, global_batch_size=2),
            checkpoint=CheckpointConfig(save=str(save)),
            logging=LoggingConfig(log_interval=2),
        )
        ranks(axes.world_size).run(run_all, [config])
        return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]

    alone, sharded = lines(Axes()), lines(Axes(pp=2, cp=2))
    for steps in (alone, sharded):
        assert ["by_position" in step for step in steps] == [False, True, False, True, True]
    for one, other in zip(alone[1::2], sharded[1::2], strict=True):
        assert [bucket["first"] for bucket in one["by_position"]] == [1, 32, 64, 128]
        for name in ("lm_loss", "short_lm_loss", "weight_mean"):
            ours, theirs = ([bucket[name] for bucket in step["by_position"]] for step in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=RELATIVE)
            counts = [bucket["targets"] for bucket in one["by_position"]]
            assert np.average(ours, weights=counts) == pytest.approx(one[name], rel=1e-9)
    events = EventAccumulator(str(tmp_path / Axes().name / "tensorboard")).Reload()
    recorded = {event.step: event.value for event in events.Scalars("lm_loss_by_position/128-255")}
    last_buckets = {step["iteration"]: step["by_position"][-1] for step in alone if "by_position" in step}
    assert recorded == pytest.approx({step: bucket["lm_loss"] for step, bucket in last_buckets.items()})


@pytest.mark.parametrize(
    "axes", [Axes(pp=2, vpp_layers=1), pytest.param(Axes(cp=2, dp=2), marks=pytest.mark.full)], ids=lambda a: a.name
)
def test_held_out_loss_at_intervals(axes, ranks, reference, reference_data, tmp_path):
    """The held-out rows are the reference's, whose NLL after 12 steps is known; and training goes on as without."""
    held_out = prepare_ready_rows(reference_rows(), tmp_path / "held_out")

    def config(save: Path, **validation) -> RunConfig:
        plain = options(
            axes,
            reference_data,
            weighting=DENSE,
            train=TrainConfig(train_iters=12, global_batch_size=2, **validation),
            checkpoint=CheckpointConfig(save=str(save)),
        )
        return replace(plain, data=replace(plain.data, valid_data_path=str(held_out) if validation else None))

    saves = [tmp_path / name for name in ("plain", "all", "some")]
    every = [{}, {"eval_interval": 5}, {"eval_interval": 5, "eval_iters": 1}]
    configs = [config(save, **validation) for save, validation in zip(saves, every, strict=True)]
    ranks(axes.world_size).run(run_all, configs)
    plain, whole, some = (
        [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()] for save in saves
    )
    expected = np.load(reference / "trajectory_dense_unfrozen.npz")["final_nll"]
    for steps, rows in ((whole, 4), (some, 2)):
        assert [step["iteration"] for step in steps if "valid_lm_loss" in step] == [5, 10, 12]
        assert steps[-1]["valid_lm_loss"] == pytest.approx(expected[:rows].mean(), rel=RELATIVE)
        buckets = steps[-1]["valid_by_position"]
        assert [(bucket["first"], bucket["last"]) for bucket in buckets] == [(1, 31), (32, 63), (64, 127), (128, 255)]
        for bucket in buckets:
            nlls = expected[:rows, bucket["first"] - 1 : bucket["last"]]
            assert bucket["targets"] == nlls.size
            assert bucket["lm_loss"] == pytest.approx(nlls.mean(), rel=RELATIVE)
        for key in METRICS:
            assert [step[key] for step in steps] == [step[key] for step in plain], key


def test_the_command_itself(reference, reference_data, tmp_path):
    """`tools/train.py` as a user starts it, options from YAML and flags, against the reference run."""
    (tmp_path / "options.yaml").write_text(
        f"seq_length: {SEQ_LENGTH}\nweighting: dense\nshort_window: {WINDOW}\nlr: 5.0e-4\nshuffle: false\n"
    )
    command = [
        sys.executable, "tools/train.py", "--config", str(tmp_path / "options.yaml"), "--load-hf", str(TINY_LLAMA),
        "--data-path", str(reference_data), "--short-stride", str(STRIDE), "--train-iters", "12", "--lr", "1e-3",
        "--global-batch-size", "2", "--save", str(tmp_path / "run"), "--save-hf", str(tmp_path / "hf"),
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    expected, metrics = np.load(reference / "trajectory_dense_unfrozen.npz"), metrics_of(tmp_path / "run")
    for ours, theirs in METRICS.items():
        np.testing.assert_allclose(metrics[ours], expected[theirs], rtol=RELATIVE, atol=1e-6, err_msg=ours)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.from_numpy(np.load(reference / "windows.npz")["input_ids"])
    with torch.no_grad():
        logits = model(ids).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(nll.view(4, -1), expected["final_nll"], atol=2e-3)
