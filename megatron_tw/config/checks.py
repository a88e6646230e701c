"""Every check that needs more than one option, or an option's range: before a group is created or a byte allocated.

Each function raises ValueError with the option, what was expected and what was given. Those of the layout are in
layout_checks.py, those of the computation in compute_checks.py.
"""

from pathlib import Path

from megatron_tw.config.compute_checks import check_activations, check_compute, check_fp8_tokens, check_kernels
from megatron_tw.config.layout_checks import check_data_parallel, check_parallel, check_seq_length, num_microbatches
from megatron_tw.config.options import flag
from megatron_tw.config.ranges import above, at_least, at_most, outside, require, within
from megatron_tw.config.ruler import TASKS_WITHOUT_TEXT
from megatron_tw.config.schema import (
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)

LARGEST_BATCH = 10**6
"""Rows of a step; beyond it, somebody's slip."""
LARGEST_STEP = 10**9
LARGEST_FACTOR = 10**6


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Check a training run's options with each other, and with the number of ranks where that is known."""
    check_parallel(config.parallel, world_size)
    check_data_parallel(config.data_parallel)
    check_model(config.model)
    check_compute(config.compute, config.parallel)
    check_activations(config.activations, config.parallel)
    check_kernels(config.kernels, config.parallel, config.compute)
    if config.kernels.fp8_format is not None:
        check_fp8_tokens(config.kernels, config.parallel, config.data.seq_length, config.train.micro_batch_size)
    check_weighting(config.weighting)
    check_scorer(config.scorer)
    check_data(config.data, config.scorer)
    check_seq_length(config.parallel, config.data.seq_length)
    check_windows(config.windows, config.data.seq_length)
    if config.checkpoint.pretrained_checkpoint is None:  # else a window may come from there
        check_least_context(config.windows)
    check_optimizer(config.optimizer)
    check_checkpoint(config.checkpoint, config.model, config.data, config.train)
    at_least(1, train_iters=config.train.train_iters, micro_batch_size=config.train.micro_batch_size)
    at_least(1, global_batch_size=config.train.global_batch_size, exit_interval=config.train.exit_interval)
    at_least(1, exit_duration_in_mins=config.train.exit_duration_in_mins)
    at_most(LARGEST_STEP, train_iters=config.train.train_iters)
    at_most(
        LARGEST_BATCH, micro_batch_size=config.train.micro_batch_size, global_batch_size=config.train.global_batch_size
    )
    at_least(1, eval_interval=config.train.eval_interval, eval_iters=config.train.eval_iters)
    require(
        (config.train.eval_interval is None) == (config.data.valid_data_path is None),
        "--valid-data-path and --eval-interval: expected both or neither, got one",
    )
    require(
        config.train.eval_iters is None or config.train.eval_interval is not None,
        f"--eval-iters {config.train.eval_iters}: expected --eval-interval and --valid-data-path with it",
    )
    at_least(1, eval_ruler_samples=config.train.eval_ruler_samples)
    require(
        config.train.eval_ruler is not None or config.train.eval_ruler_samples == TrainConfig.eval_ruler_samples,
        f"--eval-ruler-samples {config.train.eval_ruler_samples}: expected --eval-ruler with it",
    )
    for name in config.train.eval_ruler or ():
        require(
            name in TASKS_WITHOUT_TEXT, f"--eval-ruler: expected some of {', '.join(TASKS_WITHOUT_TEXT)}, got {name}"
        )
    require(
        config.train.eval_ruler is None or config.train.eval_interval is not None,
        "--eval-ruler: expected --eval-interval and --valid-data-path with it",
    )
    check_faults(config.faults)
    at_least(0, seed=config.train.seed, bos_id=config.data.bos_id)
    check_logging(config.logging, config.checkpoint, world_size)
    if world_size is not None:
        num_microbatches(config.train, config.parallel, world_size)


def check_windows(windows: WindowsConfig, seq_length: int) -> None:
    """The short windows of a row of `seq_length` tokens, or that without them there is no stride."""
    at_least(1, scoring_micro_batch=windows.scoring_micro_batch)
    decided = windows.of_rows(seq_length)
    if decided is None:
        require(windows.short_stride is None, "--short-stride: expected --short-window with it, got none")
        return
    window, stride, least = decided.tokens, decided.stride, decided.least_context
    at_least(1, short_stride=windows.short_stride)
    require(2 <= window <= seq_length, f"--short-window: expected 2 to {seq_length}, the tokens of a row, got {window}")
    require(
        1 <= least < window,
        f"--min-short-context: expected 1 to {window - 1} (less than --short-window {window}), got {least}",
    )
    largest = window - least
    even = [fit for fit in range(largest, 0, -1) if (seq_length - window) % fit == 0][:3]
    require(
        stride <= largest,
        f"--short-stride: expected at most {largest}, got {stride}, which leaves some targets a context of "
        f"{max(0, window - stride)} tokens; --min-short-context, here {least}, says how few may be. Strides without a "
        f"ragged last window: {', '.join(map(str, even))}",
    )


def check_least_context(windows: WindowsConfig) -> None:
    """That there are windows, where something is said of their targets."""
    require(
        windows.min_short_context is None or windows.short_window is not None,
        "--min-short-context: expected --short-window with it, got none",
    )


def check_own_windows(windows: WindowsConfig, seq_length: int) -> None:
    """The windows in which a model sees a short context of its own: they must be shorter than the row."""
    check_windows(windows, seq_length)
    window = windows.short_window
    require(
        window is None or window < seq_length,
        f"--short-window: expected less than {seq_length}, the tokens of a row, where a model is compared with itself, "
        f"got {window}",
    )


def check_weighting(weighting: WeightingOptions) -> None:
    """Ranges of the weighting's numbers."""
    above(0, truncation=weighting.truncation, shift=weighting.shift)
    within(0.0, 1.0, interpolation=weighting.interpolation)
    above(0, sparsification=weighting.sparsification)
    within(0.0, 1.0, sparsification=weighting.sparsification)


def check_scorer(scorer: ScorerConfig) -> None:
    """Ranges of the scorer's numbers; what a scorer of this name needs, the scorer itself checks."""
    within(0.0, 1.0, scorer_ema_decay=scorer.scorer_ema_decay)


def check_model(model: ModelConfig) -> None:
    """Ranges of what becomes another in the model."""
    above(0, rotary_base=model.rotary_base)
    at_least(1, rope_scaling_factor=model.rope_scaling_factor)
    at_most(LARGEST_FACTOR, rope_scaling_factor=model.rope_scaling_factor)
    require(
        model.rope_scaling_factor is None or model.rope_scaling_type not in (None, "none"),
        f"--rope-scaling-factor: expected a --rope-scaling-type to scale with, got {model.rope_scaling_type}",
    )


def check_optimizer(optimizer: OptimizationConfig) -> None:
    """Ranges of the optimizer's numbers and of the schedule's steps."""
    above(0, lr=optimizer.lr, adam_eps=optimizer.adam_eps)
    within(0.0, optimizer.lr, min_lr=optimizer.min_lr)
    at_least(
        0, weight_decay=optimizer.weight_decay, clip_grad=optimizer.clip_grad, lr_warmup_iters=optimizer.lr_warmup_iters
    )
    at_least(1, lr_decay_iters=optimizer.lr_decay_iters)
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(optimizer, name)
        require(0 <= beta < 1, f"{flag(name)}: expected at least 0 and less than 1, got {beta}")
    within(0.0, 1.0, optimizer_offload_fraction=optimizer.optimizer_offload_fraction)
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_cpu_offload"):
        require(
            getattr(optimizer, name) == getattr(OptimizationConfig, name) or optimizer.use_precision_aware_optimizer,
            f"{flag(name)}: expected --use-precision-aware-optimizer with it",
        )
    require(
        optimizer.optimizer_offload_fraction == 1.0 or optimizer.optimizer_cpu_offload,
        "--optimizer-offload-fraction: expected --optimizer-cpu-offload with it",
    )
    require(
        optimizer.lr_decay_iters is None or optimizer.lr_warmup_iters < optimizer.lr_decay_iters,
        f"--lr-warmup-iters: expected less than --lr-decay-iters {optimizer.lr_decay_iters}, got "
        f"{optimizer.lr_warmup_iters}",
    )


def check_data(data: DataConfig, scorer: ScorerConfig) -> None:
    """That --data-path makes sense (`split_blend`), and that --scores names as many folders."""
    folders, scores = len(data.folders), scorer.scores
    require(
        scores is None or len(scores) == folders,
        f"--scores: expected {folders} folders, one for each of --data-path in their order, got {len(scores or ())}",
    )


def check_logging(logging: LoggingConfig, checkpoint: CheckpointConfig, world_size: int | None = None) -> None:
    """Ranges, what needs --wandb-project or --profile, the ranks and place of traces, and that no logs are in the way
    of the export."""
    at_least(1, log_interval=logging.log_interval)
    for switch, names in (
        ("wandb_project", ("wandb_entity", "wandb_exp_name", "wandb_save_dir")),
        ("profile", ("profile_step_start", "profile_step_end", "profile_ranks")),
    ):
        for name in names:
            require(
                getattr(logging, switch) or getattr(logging, name) == getattr(LoggingConfig, name),
                f"{flag(name)}: expected {flag(switch)} with it",
            )
    outside(
        "--save-hf",
        checkpoint.save_hf,
        tensorboard_dir=logging.tensorboard_dir,
        wandb_save_dir=logging.wandb_save_dir,
    )
    require(not logging.profile or checkpoint.save is not None, "--profile: expected --save with it")
    at_least(0, profile_step_start=logging.profile_step_start)
    require(
        logging.profile_step_end > logging.profile_step_start,
        f"--profile-step-end: expected more than --profile-step-start {logging.profile_step_start}, got "
        f"{logging.profile_step_end}",
    )
    for rank in logging.profile_ranks:
        require(
            rank >= 0 and (world_size is None or rank < world_size),
            f"--profile-ranks: expected ranks of 0 to {'...' if world_size is None else world_size - 1}, got {rank}",
        )


def check_checkpoint(checkpoint: CheckpointConfig, model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """That there is something to start from, and that what is asked to be written has its own place."""
    pretrained = checkpoint.pretrained_checkpoint
    require(
        model.load_hf is not None or checkpoint.load is not None or pretrained is not None,
        "--load-hf or --load: expected a model to start from, got neither",
    )
    require(
        checkpoint.save is None
        or pretrained is None
        or Path(checkpoint.save).resolve() not in (Path(pretrained).resolve(), Path(pretrained).resolve().parent),
        f"--save: expected another folder than the run of --pretrained-checkpoint {pretrained}, got {checkpoint.save}",
    )
    every, retain = checkpoint.save_interval, checkpoint.save_retain_interval
    at_least(1, save_interval=every, save_retain_interval=retain, keep_last=checkpoint.keep_last)
    require(
        retain is None or (every is not None and retain % every == 0),
        f"--save-retain-interval: expected a multiple of --save-interval {every}, got {retain}",
    )
    for name, value in (
        ("async_save", checkpoint.async_save or None),
        ("keep_last", checkpoint.keep_last),
        ("auto_resume", checkpoint.auto_resume or None),
        ("save_interval", checkpoint.save_interval),
        ("exit_interval", train.exit_interval),
        ("exit_duration_in_mins", train.exit_duration_in_mins),
        ("exit_signal_handler", train.exit_signal_handler or None),
    ):
        require(value is None or checkpoint.save is not None, f"{flag(name)}: expected --save with it")
    sources = [("load_hf", model.load_hf), ("valid_data_path", data.valid_data_path)]
    sources += [("data_path", folder) for folder in data.folders]
    for target, folder, others in (
        ("save", checkpoint.save, sources),
        (
            "save_hf",
            checkpoint.save_hf,
            [*sources, ("save", checkpoint.save), ("load", checkpoint.load), ("pretrained_checkpoint", pretrained)],
        ),
    ):
        for name, other in others:
            require(
                folder is None or other is None or Path(folder).resolve() != Path(other).resolve(),
                f"{flag(target)}: expected another folder than {flag(name)}, got {folder} for both",
            )


def check_faults(faults: FaultConfig) -> None:
    """Ranges of the numbers of bad steps, and that nothing is said of those that end the run at once."""
    at_least(1, max_bad_steps=faults.max_bad_steps)
    above(0, loss_spike_sigmas=faults.loss_spike_sigmas, hang_timeout_in_mins=faults.hang_timeout_in_mins)
    require(
        faults.on_bad_step == "skip" or faults.max_bad_steps == FaultConfig.max_bad_steps,
        f"--max-bad-steps {faults.max_bad_steps}: expected --on-bad-step skip with it",
    )
