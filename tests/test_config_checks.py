"""Every check of options with each other, with the number of ranks and with the model; and the numbers that follow."""

import ast
import dataclasses
import inspect
import math
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_tw.config import (
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WindowsConfig,
    check_config,
    check_fp32_attention,
    check_model_shape,
    check_own_windows,
    check_packed,
    check_windows,
    checks,
    compute_checks,
    data_parallel_size,
    layout_checks,
    num_microbatches,
    padded_vocab_size,
    parse_options,
    ranges,
    virtual_pipeline_size,
)
from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation

BASE = RunConfig(
    data=DataConfig(data_path=("rows",), seq_length=256),
    train=TrainConfig(train_iters=3),
    model=ModelConfig(load_hf="model"),
)


def with_options(**options: Any) -> RunConfig:
    """BASE with some options changed, without the parser's time."""
    groups = {field.name: getattr(BASE, field.name) for field in dataclasses.fields(BASE)}
    for name, value in options.items():
        (group,) = [group for group, values in groups.items() if hasattr(values, name)]
        groups[group] = replace(groups[group], **{name: value})
    return RunConfig(**groups)


WINDOW: dict[str, Any] = {"weighting": "dense", "short_window": 64}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size: expected 1 or more, got 0"),
    ({"pipeline_model_parallel_size": -1}, "--pipeline-model-parallel-size: expected 1 or more"),
    ({"context_parallel_size": 0}, "--context-parallel-size: expected 1 or more"),
    ({"distributed_timeout_minutes": 10**9}, "--distributed-timeout-minutes: expected at most 525600"),
    ({"distributed_timeout_minutes": 0}, "--distributed-timeout-minutes: expected 1 or more"),
    ({"num_layers_per_virtual_pipeline_stage": 1}, "--pipeline-model-parallel-size above 1"),
    ({"ddp_bucket_size": 0}, "--ddp-bucket-size: expected 1 or more"),
    ({"ddp_bucket_size": 10**6, "overlap_grad_reduce": False}, "--ddp-bucket-size: expected --overlap-grad-reduce"),
    (
        {"overlap_param_gather": True, "overlap_grad_reduce": False},
        "--overlap-param-gather: expected --overlap-grad-reduce with it, got --no-overlap-grad-reduce",
    ),
    (
        {"context_parallel_size": 4, "cp_comm_type": "a2a+p2p"},
        "--hierarchical-context-parallel-sizes: expected two sizes whose product is --context-parallel-size 4",
    ),
    (
        {"context_parallel_size": 4, "cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": (2, 3)},
        "got (2, 3)",
    ),
    ({"hierarchical_context_parallel_sizes": (1, 1)}, "expected --cp-comm-type a2a+p2p, got p2p"),
    ({"cp_comm_type": "a2a", "transformer_impl": "local"}, "--cp-comm-type: a2a is Transformer Engine's"),
    ({"seq_length": 1}, "--seq-length: expected 2 or more, got 1"),
    ({"seq_length": 10**9}, "--seq-length: expected at most 100000000, got 1000000000"),
    ({"seq_length": 250, "context_parallel_size": 4}, "--seq-length: expected a multiple of 8"),
    ({"seq_length": 255, "tensor_model_parallel_size": 2}, "--seq-length: expected a multiple of 2"),
    (
        {"seq_length": 264, "tensor_model_parallel_size": 8, "context_parallel_size": 2},
        "--seq-length: expected a multiple of 16 for --context-parallel-size 2",
    ),
    ({"short_stride": 3}, "--short-stride: expected --short-window"),
    ({"min_short_context": 3}, "--min-short-context: expected --short-window with it, got none"),
    (WINDOW | {"short_window": 1}, "--short-window: expected 2 to 256, the tokens of a row, got 1"),
    (WINDOW | {"short_window": 257}, "--short-window: expected 2 to 256, the tokens of a row, got 257"),
    (
        WINDOW | {"short_stride": 65},
        "--short-stride: expected at most 48, got 65, which leaves some targets a context of 0 tokens",
    ),
    (WINDOW | {"short_stride": 0}, "--short-stride: expected 1 or more, got 0"),
    (WINDOW | {"short_stride": 49}, "--short-stride: expected at most 48, got 49, which leaves"),
    (WINDOW | {"short_stride": 48, "min_short_context": 17}, "--short-stride: expected at most 47, got 48"),
    (WINDOW | {"min_short_context": 0}, "--min-short-context: expected 1 to 63 (less than --short-window 64), got 0"),
    (WINDOW | {"min_short_context": 64}, "--min-short-context: expected 1 to 63"),
    (WINDOW | {"scoring_micro_batch": 0}, "--scoring-micro-batch: expected 1 or more"),
    ({"scorer_ema_decay": 1.5}, "--scorer-ema-decay: expected 0.0 to 1.0, got 1.5"),
    ({"eval_interval": 0, "valid_data_path": "held_out"}, "--eval-interval: expected 1 or more, got 0"),
    ({"eval_interval": 5}, "--valid-data-path and --eval-interval: expected both or neither"),
    ({"valid_data_path": "held_out"}, "--valid-data-path and --eval-interval: expected both or neither"),
    ({"eval_iters": 5}, "--eval-iters 5: expected --eval-interval"),
    ({"eval_ruler_samples": 0}, "--eval-ruler-samples: expected 1 or more, got 0"),
    ({"eval_ruler_samples": 4}, "--eval-ruler-samples 4: expected --eval-ruler with it"),
    ({"eval_ruler": ("cws",)}, "--eval-ruler: expected some of niah_single_1"),
    ({"eval_ruler": ("vt",)}, "--eval-ruler: expected --eval-interval and --valid-data-path with it"),
    ({"truncation": 0.0}, "--truncation: expected more than 0, got 0"),
    ({"shift": -1.0}, "--shift: expected more than 0"),
    ({"interpolation": 1.5}, "--interpolation: expected 0.0 to 1.0, got 1.5"),
    ({"sparsification": 0.0}, "--sparsification: expected more than 0"),
    ({"sparsification": 1.1}, "--sparsification: expected 0.0 to 1.0"),
    ({"recompute_granularity": "full"}, "--recompute-method: --recompute-granularity full needs it"),
    (
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        "--recompute-num-layers: --recompute-granularity full needs it",
    ),
    (
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        "--recompute-num-layers: expected --recompute-granularity full, got selective",
    ),
    ({"recompute_method": "block"}, "--recompute-method: expected --recompute-granularity full, got None"),
    ({"recompute_num_layers": 0}, "--recompute-num-layers: expected 1 or more"),
    (
        {"recompute_modules": ("mlp",)},
        "--recompute-modules: expected --recompute-granularity selective with it",
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe")},
        "--recompute-modules: expected some of core_attn, mlp, got core_attn, moe",
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ()},
        "--recompute-modules: expected some of core_attn",
    ),
    ({"recompute_cp_gather": True}, "--recompute-cp-gather: expected a --context-parallel-size above 1 with it, got 1"),
    ({"fp8_margin": -1}, "--fp8-margin: expected 0 or more"),
    ({"fp8_amax_history_len": 0}, "--fp8-amax-history-len: expected 1 or more"),
    ({"fp8_recipe": "blockwise"}, "--fp8-recipe: expected --fp8-format with it"),
    (
        {"fp8_format": "hybrid", "bf16": True, "fp8_recipe": "tensorwise", "fp8_amax_history_len": 16},
        "--fp8-amax-history-len: expected --fp8-recipe delayed, got tensorwise",
    ),
    ({"fp8_format": "hybrid"}, "--fp8-format: expected --bf16 and Transformer Engine's layers, got fp32"),
    (
        {"fp8_format": "hybrid", "bf16": True, "transformer_impl": "local"},
        "--fp8-format: expected --bf16 and Transformer Engine's layers, got --transformer-impl local",
    ),
    (
        {"fp8_format": "e4m3", "bf16": True, "seq_length": 264, "tensor_model_parallel_size": 2},
        "--fp8-format: expected a multiple of 16 tokens on a rank, got --seq-length 264 x --micro-batch-size 1 over 2",
    ),
    (
        {"fp8_format": "e4m3", "fp8_recipe": "mxfp8", "bf16": True, "seq_length": 272},
        "--fp8-recipe mxfp8: expected a multiple of 32 tokens on a rank, got --seq-length 272 x --micro-batch-size 1",
    ),
    (
        {"tp_comm_overlap": True, "bf16": True},
        "--tp-comm-overlap: expected --tensor-model-parallel-size above 1 with sequence parallelism, got 1",
    ),
    ({"tp_comm_bootstrap_backend": "mpi"}, "--tp-comm-bootstrap-backend: expected --tp-comm-overlap with it"),
    (
        {"tp_comm_overlap": True, "bf16": True, "tensor_model_parallel_size": 2, "deterministic_mode": True},
        "--deterministic-mode: expected --no-tp-comm-overlap with it",
    ),
    ({"exp_avg_dtype": "bf16"}, "--exp-avg-dtype: expected --use-precision-aware-optimizer with it"),
    ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload: expected --use-precision-aware-optimizer with it"),
    ({"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction: expected --optimizer-cpu-offload with it"),
    ({"optimizer_offload_fraction": 1.5}, "--optimizer-offload-fraction: expected 0.0 to 1.0, got 1.5"),
    ({"lr": 0.0}, "--lr: expected more than 0"),
    ({"lr": math.inf}, "--lr: expected more than 0, got inf"),
    ({"min_lr": 1.0}, "--min-lr: expected 0.0 to 2e-05, got 1"),
    ({"weight_decay": -1.0}, "--weight-decay: expected 0 or more"),
    ({"clip_grad": -1.0}, "--clip-grad: expected 0 or more"),
    ({"adam_beta1": 1.0}, "--adam-beta1: expected at least 0 and less than 1, got 1"),
    ({"adam_beta2": -0.1}, "--adam-beta2: expected at least 0 and less than 1"),
    ({"adam_eps": 0.0}, "--adam-eps: expected more than 0"),
    ({"lr_warmup_iters": -1}, "--lr-warmup-iters: expected 0 or more"),
    ({"lr_decay_iters": 0}, "--lr-decay-iters: expected 1 or more"),
    ({"lr_warmup_iters": 5, "lr_decay_iters": 5}, "--lr-warmup-iters: expected less than --lr-decay-iters 5"),
    ({"load_hf": None}, "--load-hf or --load: expected a model to start from, got neither"),
    ({"save_interval": 5}, "--save-interval: expected --save"),
    ({"save": "s", "save_interval": 0}, "--save-interval: expected 1 or more"),
    ({"async_save": True}, "--async-save: expected --save"),
    ({"keep_last": 2}, "--keep-last: expected --save"),
    ({"auto_resume": True}, "--auto-resume: expected --save"),
    ({"save": "s", "keep_last": 0}, "--keep-last: expected 1 or more"),
    ({"save": "s", "save_interval": 4, "save_retain_interval": 0}, "--save-retain-interval: expected 1 or more"),
    ({"save": "s", "save_interval": 4, "save_retain_interval": 6}, "--save-retain-interval: expected a multiple of"),
    ({"save": "s", "save_retain_interval": 6}, "--save-retain-interval: expected a multiple of --save-interval None"),
    ({"on_bad_step": "skip", "max_bad_steps": 0}, "--max-bad-steps: expected 1 or more"),
    ({"max_bad_steps": 5}, "--max-bad-steps 5: expected --on-bad-step skip"),
    ({"loss_spike_sigmas": 0.0}, "--loss-spike-sigmas: expected more than 0"),
    ({"hang_timeout_in_mins": 0.0}, "--hang-timeout-in-mins: expected more than 0"),
    ({"exit_interval": 5}, "--exit-interval: expected --save"),
    ({"exit_signal_handler": True}, "--exit-signal-handler: expected --save"),
    ({"save": "s", "exit_duration_in_mins": 0}, "--exit-duration-in-mins: expected 1 or more"),
    ({"save": "s", "exit_interval": 0}, "--exit-interval: expected 1 or more"),
    ({"save": "rows"}, "--save: expected another folder than --data-path, got rows for both"),
    (
        {"save": "more", "data_path": ("0.7", "rows", "0.3", "more")},
        "--save: expected another folder than --data-path, got more for both",
    ),
    ({"data_path": ()}, "--data-path: expected one folder or more, got none"),
    ({"data_path": ("rows", "0.3", "more")}, "--data-path: expected folders, or WEIGHT FOLDER WEIGHT FOLDER ..., got"),
    ({"data_path": ("rows", "2")}, "--data-path: expected folders, or WEIGHT FOLDER WEIGHT FOLDER ..., got rows 2"),
    ({"data_path": ("nan", "rows", "1", "more")}, "--data-path: expected positive weights, got nan"),
    ({"data_path": ("1", "rows", "inf", "more")}, "--data-path: expected positive weights, got inf"),
    ({"data_path": ("rows", "./rows")}, "--data-path: expected each folder once, got rows 2 times"),
    (
        {"data_path": ("rows", "more"), "scores": ("scores",)},
        "--scores: expected 2 folders, one for each of --data-path in their order, got 1",
    ),
    ({"save": "./model"}, "--save: expected another folder than --load-hf"),
    ({"save": "out", "pretrained_checkpoint": "out"}, "--save: expected another folder than the run of --pretrained"),
    ({"save_hf": "./model"}, "--save-hf: expected another folder than --load-hf"),
    ({"save": "out", "save_hf": "out"}, "--save-hf: expected another folder than --save"),
    ({"load": "out", "save_hf": "out"}, "--save-hf: expected another folder than --load"),
    ({"train_iters": 0}, "--train-iters: expected 1 or more"),
    ({"micro_batch_size": 0}, "--micro-batch-size: expected 1 or more"),
    ({"global_batch_size": 0}, "--global-batch-size: expected 1 or more"),
    ({"seed": -1}, "--seed: expected 0 or more"),
    ({"bos_id": -1}, "--bos-id: expected 0 or more"),
    ({"make_vocab_size_divisible_by": 2**20}, "--make-vocab-size-divisible-by: expected at most 65536"),
    ({"global_batch_size": 999_999_999_999}, "--global-batch-size: expected at most 1000000, got 999999999999"),
    ({"train_iters": 10**10}, "--train-iters: expected at most 1000000000"),
    ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by: expected 1 or more"),
    ({"loss_chunk_tokens": 0}, "--loss-chunk-tokens: expected 1 or more"),
    ({"loss_keep_logits_mib": -1}, "--loss-keep-logits-mib: expected 0 or more"),
    ({"log_interval": 0}, "--log-interval: expected 1 or more"),
    ({"wandb_entity": "team"}, "--wandb-entity: expected --wandb-project with it"),
    ({"profile_ranks": (1,)}, "--profile-ranks: expected --profile with it"),
    ({"save_hf": "hf", "tensorboard_dir": "hf/tb"}, "--tensorboard-dir: expected a folder outside --save-hf hf, which"),
    ({"save_hf": "hf", "wandb_project": "p", "wandb_save_dir": "./hf"}, "--wandb-save-dir: expected a folder outside"),
    ({"profile": True}, "--profile: expected --save with it"),
    ({"profile": True, "save": "run", "profile_step_start": -1}, "--profile-step-start: expected 0 or more, got -1"),
    (
        {"profile": True, "save": "run", "profile_step_start": 12},
        "--profile-step-end: expected more than",
    ),
    ({"profile": True, "save": "run", "profile_ranks": (-1,)}, "--profile-ranks: expected ranks of 0 to ..., got -1"),
    ({"rotary_base": 0.0}, "--rotary-base: expected more than 0"),
    ({"rope_scaling_type": "yarn", "rope_scaling_factor": 0.5}, "--rope-scaling-factor: expected 1 or more, got 0.5"),
    ({"rope_scaling_type": "ntk", "rope_scaling_factor": 1e7}, "--rope-scaling-factor: expected at most 1000000"),
    ({"rope_scaling_factor": 2.0}, "--rope-scaling-factor: expected a --rope-scaling-type to scale with, got None"),
    ({"rope_scaling_type": "none", "rope_scaling_factor": 2.0}, "--rope-scaling-type to scale with, got none"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_each_check_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_config(with_options(**options))
    assert message in str(caught.value)


BAD_FOR_RANKS: list[tuple[dict[str, Any], int, str]] = [
    ({"tensor_model_parallel_size": 2, "context_parallel_size": 2}, 6, "a multiple of 4, got 6"),
    ({"pipeline_model_parallel_size": 2}, 1, "a multiple of 2, got 1"),
    ({"global_batch_size": 3}, 2, "--global-batch-size: expected a multiple of --micro-batch-size 1 x data-"),
    (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 3},
        2,
        "takes micro-batches in multiples of --pipeline-model-parallel-size 2, got 3",
    ),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seq_length": 255},
        {"seq_length": 248, "context_parallel_size": 4},
        {"seq_length": 249, "tensor_model_parallel_size": 2, "sequence_parallel": False},
        {"sequence_parallel": True, "seq_length": 255},  # means nothing with TP 1
        WINDOW,
        WINDOW | {"short_stride": 48},
        WINDOW | {"short_window": 256, "weighting": "dense", "scorer": "ema"},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"lr_warmup_iters": 20},  # a short run of a recipe with a longer warm-up
        {"save": "out", "load": "out", "save_interval": 5, "exit_interval": 2, "save_hf": "hf"},
        {"context_parallel_size": 4, "cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": (2, 2)},
        {"fp8_format": "hybrid", "bf16": True, "seq_length": 272},
        {"fp8_format": "hybrid", "fp8_recipe": "mxfp8", "bf16": True},
    ],
)
def test_good_combinations_pass(options: dict[str, Any]) -> None:
    check_config(with_options(**options))


MODEL = {"num_layers": 8, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64}
BAD_FOR_MODEL: list[tuple[dict[str, Any], dict[str, int], str]] = [
    (
        {"tensor_model_parallel_size": 8},
        {},
        "--tensor-model-parallel-size: expected a divisor of the model's 4 atten",
    ),
    (
        {"tensor_model_parallel_size": 4},
        {"num_attention_heads": 12, "num_query_groups": 3},
        "divisor or a multiple of the model's 3 key-value heads, got 4",
    ),
    ({"tensor_model_parallel_size": 2}, {"ffn_hidden_size": 65}, "divisor of the model's 65 MLP columns, got 2"),
    (
        {"pipeline_model_parallel_size": 3},
        {},
        "--pipeline-model-parallel-size: expected a divisor of the model's 8",
    ),
    (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        {},
        "--num-layers-per-virtual-pipeline-stage: expected a divisor of the 4 layers of a pipeline stage, got 3",
    ),
    ({"context_parallel_size": 4, "cp_comm_type": "a2a"}, {}, "--cp-comm-type a2a: shares the 2 key-value heads"),
    (
        {
            "tensor_model_parallel_size": 2,
            "context_parallel_size": 4,
            "cp_comm_type": "a2a+p2p",
            "hierarchical_context_parallel_sizes": (2, 2),
        },
        {},
        "--cp-comm-type a2a+p2p: shares the 1 key-value heads of a TP rank among 2 ranks",
    ),
]


BAD_FOR_ITSELF: list[tuple[dict[str, Any], str]] = [
    ({"short_stride": 5}, "--short-stride: expected --short-window with it"),
    ({"short_window": 256}, "--short-window: expected less than 256, the tokens of a row, where a model is compared"),
]


BAD_FOR_PACKED: list[tuple[dict[str, Any], str]] = [
    (
        {"parallel": ParallelConfig(tensor_model_parallel_size=4, context_parallel_size=4)},
        "--data-path: packed with --pack-multiple 16, expected a multiple of 32 for --context-parallel-size 4",
    ),
    ({"parallel": ParallelConfig(context_parallel_size=16)}, "expected a multiple of 32 for"),
    ({"parallel": ParallelConfig(), "micro_batch_size": 2}, "--micro-batch-size: expected 1 with packed rows"),
    ({"parallel": ParallelConfig(), "fp8_format": "hybrid"}, "--fp8-format: expected none with packed rows"),
    ({"parallel": ParallelConfig(cp_comm_type="a2a")}, "--cp-comm-type: expected p2p with packed rows"),
]


@pytest.mark.parametrize(("options", "message"), BAD_FOR_PACKED)
def test_checks_of_packed_rows(options: dict[str, Any], message: str) -> None:
    check_packed("--data-path", 16, ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4))
    check_packed("--data-path", 1, ParallelConfig())
    with pytest.raises(ValueError, match=message):
        check_packed("--data-path", 16, **options)


@pytest.mark.parametrize(("options", "message"), BAD_FOR_ITSELF)
def test_checks_of_a_models_own_windows(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_own_windows(WindowsConfig(**options), 256)


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    BAD_FOR_RANKS,
)
def test_checks_against_the_number_of_ranks(options: dict[str, Any], world_size: int, message: str) -> None:
    config = with_options(**options)
    check_config(config)
    with pytest.raises(ValueError) as caught:
        check_config(config, world_size)
    assert message in str(caught.value)


def test_sizes_that_follow() -> None:
    config = with_options(tensor_model_parallel_size=2, global_batch_size=24, micro_batch_size=2)
    check_config(config, 8)
    assert data_parallel_size(config.parallel, 8) == 4
    assert num_microbatches(config.train, config.parallel, 8) == 3
    assert num_microbatches(replace(config.train, global_batch_size=None), config.parallel, 8) == 1
    assert config.parallel.uses_sequence_parallel
    assert not ParallelConfig(sequence_parallel=True).uses_sequence_parallel


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    BAD_FOR_MODEL,
)
def test_checks_against_the_model(options: dict[str, Any], shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_model_shape(ParallelConfig(**options), **MODEL | shape)
    assert message in str(caught.value)


READ_BY_NONE: list[tuple[str, str]] = [
    ("--tasks vt --key-tokens x", "--key-tokens x: expected --tasks loss with it"),
    (
        "--tasks longppl --longppl-context 64 --longppl-stride 32 --short-window 64",
        "--short-window 64: expected",
    ),
    ("--tasks vt --short-stride 48", "--short-stride 48: expected --tasks loss with it"),
    ("--tasks vt --min-short-context 8", "--min-short-context 8: expected --tasks loss with it"),
    ("--tasks mmlu --eval-rows 1", "--eval-rows 1: expected --tasks loss or longppl with it"),
    ("--tasks vt --scoring-micro-batch 2", "--scoring-micro-batch 2: expected --tasks loss or longppl with it"),
    ("--tasks vt --longppl-evaluator x", "--longppl-evaluator x: expected --tasks longppl with it"),
    ("--tasks loss --longppl-cache x", "--longppl-cache x: expected --tasks longppl with it"),
    ("--tasks loss --longppl-context 64", "--longppl-context 64: expected --tasks longppl with it"),
    ("--tasks loss --longppl-stride 64", "--longppl-stride 64: expected --tasks longppl with it"),
    ("--tasks mmlu longppl --bos-id 1", "--bos-id 1: expected --tasks loss or ruler with it"),
    ("--tasks loss --ruler-lengths 64 128", "--ruler-lengths 64 128: expected --tasks ruler with it"),
    ("--tasks loss --ruler-scoring generation", "--ruler-scoring generation: expected --tasks ruler with it"),
    ("--tasks loss --ruler-essay x", "--ruler-essay x: expected --tasks ruler with it"),
    ("--tasks vt loss --eval-data x", "--eval-data x: expected --tasks mmlu or bbh or longbench or longbench2 with it"),
    ("--tasks vt --eval-limit 1", "--eval-limit 1: expected --tasks mmlu or bbh or longbench or longbench2 with it"),
    (
        "--tasks vt --ruler-backend vllm",
        "--ruler-backend vllm: expected --ruler-scoring generation with it",
    ),
]


@pytest.mark.parametrize(("options", "message"), READ_BY_NONE)
def test_options_that_no_task_reads_are_refused(options: str, message: str) -> None:
    given = [*options.split(), "--output", "out", "--seq-length", "256", "--data-path", "rows"]
    with pytest.raises(ValueError) as caught:
        check_evaluation(parse_options(given, EvaluationConfig), 1)
    assert str(caught.value).startswith(message)


def test_options_that_some_task_reads_are_taken() -> None:
    """And those of the model, its layout and the rows with any task."""
    for options in (
        "--tasks loss vt mmlu --short-window 64 --eval-rows 1 --bos-id 1 --ruler-seed 1 --eval-data x --eval-limit 1",
        "--tasks niah_single_1 --ruler-scoring generation --ruler-backend vllm --ruler-essay x --ruler-samples 500",
        "--tasks longppl --longppl-context 64 --longppl-stride 32 --scoring-micro-batch 2 --eval-rows 1",
        "--tasks bbh --bf16 --micro-batch-size 2 --rotary-base 5e5 --seq-length 512 --data-path other",
    ):
        given = ["--output", "out", "--seq-length", "256", "--data-path", "rows", *options.split()]
        check_evaluation(parse_options(given, EvaluationConfig), 1)


def test_models_that_can_be_cut() -> None:
    check_model_shape(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4), **MODEL)
    check_model_shape(ParallelConfig(context_parallel_size=2, cp_comm_type="a2a"), **MODEL)
    check_model_shape(ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2), **MODEL)


LONG_FP32: dict[str, Any] = {
    "on_gpu": True, "bf16": False, "num_attention_heads": 32, "num_query_groups": 8, "seq_length": 8193
}  # fmt: skip


@pytest.mark.parametrize(
    "mended", [{"on_gpu": False}, {"bf16": True}, {"num_query_groups": 32}, {"seq_length": 8192}], ids=str
)
def test_attention_that_would_hold_all_scores_is_refused(mended):
    with pytest.raises(
        ValueError, match=r"^--seq-length: expected at most 8192 in fp32 on a GPU, where the attention of 32"
    ):
        check_fp32_attention("--seq-length", **LONG_FP32)
    check_fp32_attention("--seq-length", **LONG_FP32 | mended)


def test_every_check_is_tested() -> None:
    """The cases above fail at every statement of the modules of checks that can raise."""
    helpers = {name for name, _ in inspect.getmembers(ranges, inspect.isfunction)}
    modules = {str(module.__file__): module for module in (checks, compute_checks, layout_checks)}
    calls = {
        (file, node.lineno, node.end_lineno or node.lineno)
        for file, module in modules.items()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in helpers - {"flag"}
    }
    cases = [partial(check_config, with_options(**options)) for options, _ in BAD]
    cases += [partial(check_config, with_options(**options), ranks) for options, ranks, _ in BAD_FOR_RANKS]
    cases += [partial(check_model_shape, ParallelConfig(**o), **MODEL | shape) for o, shape, _ in BAD_FOR_MODEL]
    cases += [partial(check_fp32_attention, "--seq-length", **LONG_FP32)]
    cases += [partial(check_own_windows, WindowsConfig(**options), 256) for options, _ in BAD_FOR_ITSELF]
    cases += [partial(check_packed, "--data-path", 16, **options) for options, _ in BAD_FOR_PACKED]
    failed_at = set()
    for case in cases:
        with pytest.raises(ValueError) as caught:
            case()
        frames = [frame for frame in traceback.extract_tb(caught.tb) if frame.filename in modules]
        failed_at.add((frames[-1].filename, frames[-1].lineno or 0))
    untested = [
        f"{Path(file).name}:{first}"
        for file, first, last in calls
        if not any(where == file and first <= line <= last for where, line in failed_at)
    ]
    assert len(calls) > 70
    assert not untested, f"checks without a case: {untested}"


def stride(seq_length: int, window: int, least_context: int | None = None) -> int:
    windows = WindowsConfig(short_window=window, min_short_context=least_context).of_rows(seq_length)
    assert windows is not None
    return windows.stride


def test_published_strides() -> None:
    assert stride(32768, 8192) == 6144  # (1 - 8192/32768) * 8192
    assert stride(131072, 8192) == 6144  # published: 7680, which leaves 512 tokens of context
    assert stride(131072, 8192, 512) == 7680
    assert stride(32768, 2048, 128) == 1920  # Phi-2
    assert stride(32768, 2048) == 1536  # n/4 = 512 tokens of context are the default
    assert stride(256, 64) == 48
    assert stride(64, 64) == 1  # no window to place
    for seq_length in range(17, 200, 7):
        for window in (2, 3, 16):
            check_windows(WindowsConfig(short_window=window), seq_length)
    with pytest.raises(ValueError, match="--short-stride: expected at most 1536, got 1920"):
        check_windows(WindowsConfig(short_window=2048, short_stride=1920), 32768)
    with pytest.raises(ValueError, match=r"context of 512 tokens; .*here 2048.*ragged last window: 6144, 5120, 4096$"):
        check_windows(WindowsConfig(short_window=8192, short_stride=7680), 131072)


def test_decay_ends_after_the_warm_up() -> None:
    assert OptimizationConfig(lr_warmup_iters=20).decay_iters(240) == 240
    assert OptimizationConfig(lr_warmup_iters=20).decay_iters(3) == 21
    assert OptimizationConfig(lr_warmup_iters=2, lr_decay_iters=100).decay_iters(3) == 100


def test_vocabulary_is_padded_as_megatron_pads_it() -> None:
    assert padded_vocab_size(320, 128, 1) == 384
    assert padded_vocab_size(128256, 128, 8) == 129024
    assert padded_vocab_size(512, 128, 4) == 512


def test_one_chunk_is_no_interleaving() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert virtual_pipeline_size(parallel, 8) == 2
    assert virtual_pipeline_size(parallel, 4) is None
    assert virtual_pipeline_size(ParallelConfig(), 4) is None
