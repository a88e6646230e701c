"""The short-window forward: how windows are dealt out, and that it leaves nothing behind."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import (
    DENSE,
    LONGCE,
    METRICS,
    SPARSE_UNFROZEN,
    WINDOWS,
    make_scores,
    options,
    run_steps,
    scoring_options,
)
from tiny import (
    BOS,
    SEQ_LENGTH,
    STRIDE,
    TINY_LLAMA,
    VOCAB,
    WINDOW,
    Axes,
    layout_of,
    load_tiny,
    prepare_ready_rows,
    reference_rows,
    release,
)

from megatron_tw.config import ComputeConfig, OptimizationConfig, ScorerConfig, TrainConfig, WeightingOptions
from megatron_tw.model.forward import ShortWindowForward, deal_windows, num_window_groups
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run
from megatron_tw.weighting import plan_windows


@pytest.mark.parametrize("num_windows", range(1, 24))
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6, 8, 16])
def test_every_window_is_run_once_and_the_load_is_even(num_windows, cp_size):
    windows = plan_windows(8 + 4 * num_windows, 8, 4, include_first=False)
    assert len(windows) == num_windows
    groups = num_window_groups(num_windows, cp_size)
    assert cp_size % groups == 0
    dealt = [deal_windows(windows, index, groups) for index in range(groups)]
    assert sorted(window for mine in dealt for window in mine) == sorted(windows)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1, "no rank idle while another has two more"


def test_rows_of_128k_on_16_ranks():
    windows = plan_windows(131072, 8192, 6144, include_first=False)
    assert len(windows) == 20
    assert num_window_groups(20, 16) == 16
    assert num_window_groups(4, 16) == 4  # 32k rows: four ranks share a window


def short_nlls(axes: Axes, cases):
    """On a rank: short NLLs of the reference rows for each (window, stride, include_first)."""
    results = []
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout)
        for window, stride, include_first in cases:
            forward = ShortWindowForward.create(
                SEQ_LENGTH, window, stride,
                include_first=include_first, bos_id=BOS, layout=layout, sequence_parallel=axes.tp > 1,
            )  # fmt: skip
            results.append(forward.short_nll(chunks, torch.from_numpy(reference_rows())))
    return results


# Two windows (ranks share), three (dealt unevenly), five, a ragged end, windows that need padding to be shared.
WINDOW_CASES = [
    (128, 64, False),
    (100, 60, False),
    (100, 60, True),
    (63, 45, False),
    (256, 64, True),
    (150, 107, False),
]


@pytest.mark.parametrize(
    "axes", [Axes(cp=2), Axes(cp=4), Axes(tp=2, cp=2), Axes(pp=2, cp=2)], ids=lambda axes: axes.name
)
def test_windows_shared_by_ranks_score_as_on_one_rank(axes, ranks):
    expected = ranks(1).run(short_nlls, Axes(), WINDOW_CASES)[0]
    for results in ranks(axes.world_size).run(short_nlls, axes, WINDOW_CASES):
        for case, ours, theirs in zip(WINDOW_CASES, results, expected, strict=True):
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0, err_msg=str(case))


def test_frozen_and_unfrozen_windows_agree_beyond_the_first(ranks):
    (frozen, unfrozen) = ranks(1).run(short_nlls, Axes(), [(WINDOW, STRIDE, True), (WINDOW, STRIDE, False)])[0]
    np.testing.assert_array_equal(frozen[:, WINDOW:], unfrozen[:, WINDOW:])
    assert (unfrozen[:, : WINDOW - 1] == 0).all()
    assert (frozen[:, : WINDOW - 1] != 0).all()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("data") / "rows")


def what_scoring_changes(axes: Axes, config) -> list[str]:
    """On a rank: everything of the run that a scoring pass changed."""
    inputs = open_inputs(config)
    with layout_of(axes) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        run.step(next(run.loader), 0)
        batches = next(run.loader)

        def snapshot():
            parameters = {f"{i}.{n}": p for i, m in enumerate(run.step.model) for n, p in m.named_parameters()}
            return {
                "weights": {name: parameter.clone() for name, parameter in parameters.items()},
                "main_grad": {name: parameter.main_grad.clone() for name, parameter in parameters.items()},
                "grad": {name: parameter.grad is None for name, parameter in parameters.items()},
                "mode": [module.training for model in run.step.model for module in model.modules()],
                "rng": torch.get_rng_state(),
                "config": copy.copy(run.chunks[0].config.__dict__),
            }

        before = snapshot()
        rows_RN = torch.cat([batch.tokens for batch in batches])
        assert run.step.scorer is not None
        run.step.scorer.short_nll(rows_RN, torch.cat([batch.row_index for batch in batches]))
        after = snapshot()
        release(run.step.model)

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return a is b or a == b

    return [name for name in before if not equal(before[name], after[name])]


@pytest.mark.parametrize(
    "scorer", [ScorerConfig(), ScorerConfig(scorer="ema", scorer_ema_decay=0.5)], ids=["unfrozen", "ema"]
)
@pytest.mark.parametrize("axes", [Axes(), Axes(tp=2), Axes(pp=2, vpp_layers=1)], ids=lambda axes: axes.name)
def test_scoring_leaves_nothing_behind(axes, scorer, ranks, rows):
    config = options(axes, rows, weighting=DENSE, scorer=scorer)
    assert ranks(axes.world_size).run(what_scoring_changes, axes, config) == [[]] * axes.world_size


@pytest.mark.parametrize("axes", [Axes(), Axes(tp=2)], ids=lambda axes: axes.name)
def test_lambda_one_and_kappa_one_are_plain_cross_entropy(axes, ranks, rows):
    """With the scorer run and without it."""
    plain = WeightingOptions()
    nearly = WeightingOptions(weighting="custom", transforms=("absolute",), normalization="l1", interpolation=1.0)
    configs = [options(axes, rows, weighting=weighting, train=TrainConfig(train_iters=3, global_batch_size=2))
               for weighting in (plain, nearly, WeightingOptions(weighting="sparse", sparsification=1.0))]  # fmt: skip
    uniform, *others = ranks(axes.world_size).run(run_steps, axes, configs)[0]
    assert all(other == uniform for other in others)


def test_scoring_micro_batch_does_not_change_the_scores(ranks, rows):
    configs = [
        options(Axes(), rows, weighting=LONGCE, windows=replace(WINDOWS, scoring_micro_batch=size),
                train=TrainConfig(train_iters=3, micro_batch_size=2, global_batch_size=4))
        for size in (None, 1, 3)
    ]  # fmt: skip
    whole, *parts = ranks(1).run(run_steps, Axes(), configs)[0]
    for part in parts:
        for key in METRICS:
            np.testing.assert_allclose(part[key], whole[key], rtol=2e-4, err_msg=key)


BF16_RELATIVE = 0.02
"""Of losses near 6 nats over 12 steps: bf16 has 8 bits, so one rounding is 0.4 %; NLLs average many of them."""


@pytest.mark.parametrize("steps", [5, pytest.param(12, marks=pytest.mark.full)])
@pytest.mark.parametrize("axes", [Axes(), Axes(tp=2, cp=2)], ids=lambda axes: axes.name)
def test_bf16_follows_fp32(axes, steps, ranks, rows):
    def config(weighting, bf16):
        return options(axes, rows, weighting=weighting, optimizer=OptimizationConfig(lr=1e-3),
                       train=TrainConfig(train_iters=steps, global_batch_size=2),
                       compute=ComputeConfig(bf16=bf16))  # fmt: skip

    weightings = [WeightingOptions(), DENSE, SPARSE_UNFROZEN] if axes == Axes() else [DENSE]
    results = ranks(axes.world_size).run(
        run_steps, axes, [config(w, bf16) for w in weightings for bf16 in (False, True)]
    )
    for fp32, bf16 in zip(results[0][::2], results[0][1::2], strict=True):
        np.testing.assert_allclose(bf16["lm_loss"], fp32["lm_loss"], rtol=BF16_RELATIVE)


def nan_in_the_weights(axes: Axes, config) -> str:
    inputs = open_inputs(config)
    with layout_of(axes) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        before = [parameter.clone() for chunk in run.chunks for parameter in chunk.parameters()]
        if layout.pp_rank == 0:
            embedding = run.chunks[0].embedding.word_embeddings.weight
            with torch.no_grad():
                embedding[5] = float("nan")
        try:
            run.step(next(run.loader), 0)
        except ValueError as error:
            after = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
            changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            release(run.step.model)
            return f"{error} [{changed} changed]"
    return "no error"


@pytest.mark.parametrize("axes", [Axes(), Axes(pp=2), Axes(cp=2), Axes(dp=2)], ids=lambda axes: axes.name)
def test_nan_is_named_on_every_rank_before_the_update(axes, ranks, rows):
    messages = ranks(axes.world_size).run(nan_in_the_weights, axes, options(axes, rows, weighting=DENSE))
    assert all("NaN or infinite" in message or "expected finite values" in message for message in messages), messages
    assert any("row " in message and "position " in message and "rank " in message for message in messages), messages
    # The embedding that was broken on purpose, and nothing else.
    assert all(int(message.rsplit("[")[1].split()[0]) <= 1 for message in messages), messages


def scores_of_two(axes: Axes, configs) -> list[torch.Tensor | None]:
    """On a rank: what the scorers of these runs say of the first step's rows."""
    results = []
    for config in configs:
        inputs = open_inputs(config)
        with layout_of(axes) as layout:
            run = Run.start(config, inputs, layout, prepare_device())
            batches = next(run.loader)
            rows_RN = torch.cat([batch.tokens for batch in batches])
            assert run.step.scorer is not None
            results.append(run.step.scorer.short_nll(rows_RN, torch.cat([batch.row_index for batch in batches])))
            release(run.step.model)
    return results


@pytest.mark.parametrize(
    "axes", [Axes(), Axes(tp=2), Axes(pp=2), Axes(cp=2), Axes(dp=2), Axes(tp=2, cp=2), Axes(pp=2, vpp_layers=1)],
    ids=lambda axes: axes.name,
)  # fmt: skip
def test_live_scores_equal_cached_scores(axes, ranks, rows, tmp_path):
    ranks(1).run(make_scores, scoring_options(rows, tmp_path / "scores"))
    live = ScorerConfig(scorer="frozen", scorer_hf=str(TINY_LLAMA))
    cached = ScorerConfig(scorer="frozen", scores=(str(tmp_path / "scores"),))
    configs = [options(axes, rows, weighting=DENSE, scorer=scorer) for scorer in (live, cached)]
    answered = 0
    for live_RT, cached_RT in ranks(axes.world_size).run(scores_of_two, axes, configs):
        assert (live_RT is None) == (cached_RT is None)
        if live_RT is not None:
            answered += 1
            np.testing.assert_allclose(live_RT, cached_RT, atol=1e-5, rtol=0)
    assert answered == axes.world_size // axes.pp


def test_vocabulary_of_the_live_scorer(ranks, rows, tmp_path):
    import json
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(TINY_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB + 1}))
    live = ScorerConfig(scorer="frozen", scorer_hf=str(folder))
    with pytest.raises(ValueError, match=r"--scorer-hf .*vocabulary of 321"):
        ranks(1).run(run_steps, Axes(), [options(Axes(), rows, weighting=DENSE, scorer=live)])
