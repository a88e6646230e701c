"""Every check that needs more than one option, or an option's range: before a group is created or a byte allocated.

Each function raises ValueError with the option, what was expected and what was given. What needs the shape of the
model takes plain numbers.
"""

import math
from pathlib import Path

from megatron_tw.config.options import flag
from megatron_tw.config.ruler import TASKS_WITHOUT_TEXT
from megatron_tw.config.schema import (
    ActivationConfig,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    DataParallelConfig,
    FaultConfig,
    KernelConfig,
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)

LARGEST_BATCH = 10**6
"""Rows of a step; beyond it, somebody's slip."""
LARGEST_STEP = 10**9
LARGEST_TIMEOUT = 60 * 24 * 365
"""Minutes: a year. What the system's clocks take ends not far above."""
LARGEST_VOCABULARY_MULTIPLE = 2**16
RECOMPUTE_MODULES = ("core_attn", "mlp")
"""Of Megatron-Core's, those that a dense layer has. Not layernorm: Megatron-Core recomputes it with Transformer Engine
alone, whose layers have none by itself."""


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Check a training run's options with each other, and with the number of ranks where that is known."""
    check_parallel(config.parallel, world_size)
    check_data_parallel(config.data_parallel)
    check_model(config.model)
    check_compute(config.compute, config.parallel)
    check_activations(config.activations, config.parallel)
    check_kernels(config.kernels, config.parallel, config.compute)
    if config.kernels.fp8_format is not None:
        check_fp8_tokens(config.parallel, config.data.seq_length, config.train.micro_batch_size)
    check_weighting(config.weighting)
    check_scorer(config.scorer)
    check_data(config.data, config.scorer)
    check_seq_length(config.parallel, config.data.seq_length)
    check_windows(config.windows, config.data.seq_length)
    check_optimizer(config.optimizer)
    check_checkpoint(config.checkpoint, config.model, config.data, config.train)
    _at_least(1, train_iters=config.train.train_iters, micro_batch_size=config.train.micro_batch_size)
    _at_least(1, global_batch_size=config.train.global_batch_size, exit_interval=config.train.exit_interval)
    _at_least(1, exit_duration_in_mins=config.train.exit_duration_in_mins)
    _at_most(LARGEST_STEP, train_iters=config.train.train_iters)
    _at_most(
        LARGEST_BATCH, micro_batch_size=config.train.micro_batch_size, global_batch_size=config.train.global_batch_size
    )
    _at_least(1, eval_interval=config.train.eval_interval, eval_iters=config.train.eval_iters)
    _require(
        (config.train.eval_interval is None) == (config.data.valid_data_path is None),
        "--valid-data-path and --eval-interval: expected both or neither, got one",
    )
    _require(
        config.train.eval_iters is None or config.train.eval_interval is not None,
        f"--eval-iters {config.train.eval_iters}: expected --eval-interval and --valid-data-path with it",
    )
    _at_least(1, eval_ruler_samples=config.train.eval_ruler_samples)
    for name in config.train.eval_ruler or ():
        _require(
            name in TASKS_WITHOUT_TEXT, f"--eval-ruler: expected some of {', '.join(TASKS_WITHOUT_TEXT)}, got {name}"
        )
    _require(
        config.train.eval_ruler is None or config.train.eval_interval is not None,
        "--eval-ruler: expected --eval-interval and --valid-data-path with it",
    )
    check_faults(config.faults)
    _at_least(0, seed=config.train.seed, bos_id=config.data.bos_id)
    check_logging(config.logging, config.checkpoint, world_size)
    if world_size is not None:
        num_microbatches(config.train, config.parallel, world_size)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model that `world_size` ranks hold. Raises ValueError when ranks are left over."""
    _require(
        world_size > 0 and world_size % parallel.model_parallel_size == 0,
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
        f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size}: "
        f"expected a number of ranks that is a multiple of {parallel.model_parallel_size}, got {world_size}",
    )
    return world_size // parallel.model_parallel_size


def num_microbatches(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> int:
    """Micro-batches that each copy of the model goes through in one optimizer step."""
    copies = data_parallel_size(parallel, world_size)
    rows, global_batch = train.micro_batch_size * copies, train.batch_size(copies)
    _require(
        global_batch % rows == 0,
        f"--global-batch-size: expected a multiple of --micro-batch-size {train.micro_batch_size} x data-parallel size "
        f"{copies} = {rows}, got {global_batch}",
    )
    count, stages = global_batch // rows, parallel.pipeline_model_parallel_size
    _require(
        parallel.num_layers_per_virtual_pipeline_stage is None or count % stages == 0,
        f"--global-batch-size {global_batch}: the interleaved schedule (--num-layers-per-virtual-pipeline-stage) "
        f"takes micro-batches in multiples of --pipeline-model-parallel-size {stages}, got {count}",
    )
    return count


def check_parallel(parallel: ParallelConfig, world_size: int | None = None) -> None:
    """The axes by themselves, and that they make up `world_size`."""
    _at_least(
        1,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    _at_most(LARGEST_TIMEOUT, distributed_timeout_minutes=parallel.distributed_timeout_minutes)
    _require(
        parallel.num_layers_per_virtual_pipeline_stage is None or parallel.pipeline_model_parallel_size > 1,
        "--num-layers-per-virtual-pipeline-stage: expected a --pipeline-model-parallel-size above 1 with it, got 1",
    )
    sizes = parallel.hierarchical_context_parallel_sizes
    if parallel.cp_comm_type == "a2a+p2p":
        _require(
            sizes is not None
            and len(sizes) == 2
            and min(sizes) > 0
            and math.prod(sizes) == parallel.context_parallel_size,
            f"--hierarchical-context-parallel-sizes: expected two sizes whose product is --context-parallel-size "
            f"{parallel.context_parallel_size} for --cp-comm-type a2a+p2p, got {sizes}",
        )
    else:
        _require(
            sizes is None,
            f"--hierarchical-context-parallel-sizes: expected --cp-comm-type a2a+p2p, got {parallel.cp_comm_type}",
        )
    if world_size is not None:
        data_parallel_size(parallel, world_size)


def check_data_parallel(data_parallel: DataParallelConfig) -> None:
    """What needs --overlap-grad-reduce, and its range."""
    _at_least(1, ddp_bucket_size=data_parallel.ddp_bucket_size)
    for name, given in (
        ("ddp_bucket_size", data_parallel.ddp_bucket_size is not None),
        ("overlap_param_gather", data_parallel.overlap_param_gather),
    ):
        _require(
            data_parallel.overlap_grad_reduce is not False or not given,
            f"{flag(name)}: expected --overlap-grad-reduce with it, got --no-overlap-grad-reduce",
        )


def check_seq_length(parallel: ParallelConfig, seq_length: int) -> None:
    """That a row can be cut into the slices of the CP ranks, and those into the parts of sequence parallelism."""
    _at_least(2, seq_length=seq_length)
    _require(
        seq_length % parallel.seq_length_multiple == 0,
        f"--seq-length: expected a multiple of {parallel.seq_length_multiple} for --context-parallel-size "
        f"{parallel.context_parallel_size} (two slices a rank) and --tensor-model-parallel-size "
        f"{parallel.tensor_model_parallel_size} ({'with' if parallel.uses_sequence_parallel else 'without'} sequence "
        f"parallelism), got {seq_length}",
    )


def check_packed(
    option: str, multiple: int, parallel: ParallelConfig, *, micro_batch_size: int = 1, fp8_format: str | None = None
) -> None:
    """What packed rows, whose documents begin at multiples of `multiple` tokens, ask of a run. option: names them."""
    _require(
        multiple % parallel.document_multiple == 0,
        f"{option}: packed with --pack-multiple {multiple}, expected a multiple of {parallel.document_multiple} for "
        f"--context-parallel-size {parallel.context_parallel_size} (two slices of each document a rank) and "
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}; prepare the rows again",
    )
    _require(
        micro_batch_size == 1,
        f"--micro-batch-size: expected 1 with packed rows ({option}), which are a batch of documents already, got "
        f"{micro_batch_size}",
    )
    _require(
        parallel.cp_comm_type == "p2p",
        f"--cp-comm-type: expected p2p with packed rows ({option}), got {parallel.cp_comm_type}",
    )
    _require(fp8_format is None, f"--fp8-format: expected none with packed rows ({option}), got {fp8_format}")


def check_windows(windows: WindowsConfig, seq_length: int) -> None:
    """The short windows of a row of `seq_length` tokens, or that without them there is no stride."""
    _at_least(1, scoring_micro_batch=windows.scoring_micro_batch)
    decided = windows.of_rows(seq_length)
    if decided is None:
        _require(windows.short_stride is None, "--short-stride: expected --short-window with it, got none")
        return
    window, stride, least = decided.tokens, decided.stride, decided.least_context
    _at_least(1, short_stride=windows.short_stride)
    _require(
        2 <= window <= seq_length, f"--short-window: expected 2 to {seq_length}, the tokens of a row, got {window}"
    )
    _require(
        1 <= least < window,
        f"--min-short-context: expected 1 to {window - 1} (less than --short-window {window}), got {least}",
    )
    largest = window - least
    even = [fit for fit in range(largest, 0, -1) if (seq_length - window) % fit == 0][:3]
    _require(
        stride <= largest,
        f"--short-stride: expected at most {largest}, got {stride}, which leaves some targets a context of "
        f"{max(0, window - stride)} tokens; --min-short-context, here {least}, says how few may be. Strides without a "
        f"ragged last window: {', '.join(map(str, even))}",
    )


def check_own_windows(windows: WindowsConfig, seq_length: int) -> None:
    """The windows in which a model sees a short context of its own: they must be shorter than the row."""
    check_windows(windows, seq_length)
    window = windows.short_window
    _require(
        window is None or window < seq_length,
        f"--short-window: expected less than {seq_length}, the tokens of a row, where a model is compared with itself, "
        f"got {window}",
    )


def check_weighting(weighting: WeightingOptions) -> None:
    """Ranges of the weighting's numbers."""
    _above(0, truncation=weighting.truncation, shift=weighting.shift)
    _within(0.0, 1.0, interpolation=weighting.interpolation)
    _above(0, sparsification=weighting.sparsification)
    _within(0.0, 1.0, sparsification=weighting.sparsification)


def check_scorer(scorer: ScorerConfig) -> None:
    """Ranges of the scorer's numbers; what a scorer of this name needs, the scorer itself checks."""
    _within(0.0, 1.0, scorer_ema_decay=scorer.scorer_ema_decay)


def check_model(model: ModelConfig) -> None:
    """Ranges of what becomes another in the model."""
    _above(0, rotary_base=model.rotary_base)
    _at_least(1, rope_scaling_factor=model.rope_scaling_factor)
    _require(
        model.rope_scaling_factor is None or model.rope_scaling_type not in (None, "none"),
        f"--rope-scaling-factor: expected a --rope-scaling-type to scale with, got {model.rope_scaling_type}",
    )


def check_compute(compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Ranges of the computation's options, and whose layers know what --cp-comm-type asks for."""
    _at_least(1, make_vocab_size_divisible_by=compute.make_vocab_size_divisible_by)
    _at_most(LARGEST_VOCABULARY_MULTIPLE, make_vocab_size_divisible_by=compute.make_vocab_size_divisible_by)
    _at_least(1, loss_chunk_tokens=compute.loss_chunk_tokens)
    _require(
        compute.transformer_impl != "local" or parallel.cp_comm_type == "p2p",
        f"--cp-comm-type: {parallel.cp_comm_type} is Transformer Engine's; --transformer-impl local always gathers",
    )


def check_activations(activations: ActivationConfig, parallel: ParallelConfig) -> None:
    """The combinations of recompute options that Megatron-Core knows, and the range of what the loss keeps."""
    modules = activations.recompute_modules
    _require(
        modules is None or activations.recompute_granularity == "selective",
        f"--recompute-modules: expected --recompute-granularity selective with it, got "
        f"{activations.recompute_granularity}",
    )
    _require(
        modules is None or (len(modules) > 0 and set(modules) <= set(RECOMPUTE_MODULES)),
        f"--recompute-modules: expected some of {', '.join(RECOMPUTE_MODULES)}, got "
        f"{', '.join(modules or ()) or 'none'}",
    )
    _require(
        not activations.recompute_cp_gather or parallel.context_parallel_size > 1,
        "--recompute-cp-gather: expected a --context-parallel-size above 1 with it, got 1",
    )
    _at_least(0, loss_keep_logits_mib=activations.loss_keep_logits_mib)
    _at_least(1, recompute_num_layers=activations.recompute_num_layers)
    for name in ("recompute_method", "recompute_num_layers"):
        given = getattr(activations, name) is not None
        wanted = activations.recompute_granularity == "full"
        _require(not wanted or given, f"{flag(name)}: --recompute-granularity full needs it, got none")
        _require(
            not given or wanted,
            f"{flag(name)}: expected --recompute-granularity full, got {activations.recompute_granularity}",
        )


def check_kernels(kernels: KernelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> None:
    """What FP8 and user buffers need of other options, and what deterministic mode excludes."""
    _at_least(0, fp8_margin=kernels.fp8_margin)
    _at_least(1, fp8_amax_history_len=kernels.fp8_amax_history_len)
    for name in ("fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
        value, default = getattr(kernels, name), getattr(KernelConfig, name)
        _require(value == default or kernels.fp8_format is not None, f"{flag(name)}: expected --fp8-format with it")
        _require(
            value == default or name == "fp8_recipe" or kernels.fp8_recipe == "delayed",
            f"{flag(name)}: expected --fp8-recipe delayed, got {kernels.fp8_recipe}",
        )
    for name, given in (
        ("fp8_format", kernels.fp8_format is not None),
        ("tp_comm_overlap", kernels.tp_comm_overlap),
    ):
        _require(
            not given or (compute.bf16 and compute.transformer_impl != "local"),
            f"{flag(name)}: expected --bf16 and Transformer Engine's layers, got "
            f"{'--transformer-impl local' if compute.bf16 else 'fp32'}",
        )
    _require(
        not kernels.tp_comm_overlap or parallel.uses_sequence_parallel,
        "--tp-comm-overlap: expected --tensor-model-parallel-size above 1 with sequence parallelism, got "
        f"{parallel.tensor_model_parallel_size}",
    )
    _require(
        kernels.tp_comm_bootstrap_backend == KernelConfig.tp_comm_bootstrap_backend or kernels.tp_comm_overlap,
        "--tp-comm-bootstrap-backend: expected --tp-comm-overlap with it",
    )
    _require(
        not (kernels.deterministic_mode and kernels.tp_comm_overlap),
        "--deterministic-mode: expected --no-tp-comm-overlap with it",
    )


FP8_MULTIPLE = 16
"""What Transformer Engine wants the dimensions of a matrix product in FP8 to be a multiple of."""


def check_fp8_tokens(parallel: ParallelConfig, seq_length: int, micro_batch_size: int) -> None:
    """That the tokens which a rank multiplies are as many as FP8 kernels take."""
    ranks = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    tokens = seq_length * micro_batch_size // ranks
    _require(
        tokens % FP8_MULTIPLE == 0,
        f"--fp8-format: expected a multiple of {FP8_MULTIPLE} tokens on a rank, got --seq-length {seq_length} x "
        f"--micro-batch-size {micro_batch_size} over {ranks} ranks = {tokens}",
    )


LONGEST_MATERIALIZED = 8192
"""Tokens of a row for which all scores of a head may exist at once."""


def check_fp32_attention(
    option: str, *, on_gpu: bool, bf16: bool, num_attention_heads: int, num_query_groups: int, seq_length: int
) -> None:
    """Refuse what would end in memory: on a GPU, PyTorch has no kernel for fp32 with fewer key-value heads than query
    heads. It then makes a mask and all scores, tokens x tokens."""
    _require(
        not on_gpu or bf16 or num_attention_heads == num_query_groups or seq_length <= LONGEST_MATERIALIZED,
        f"{option}: expected at most {LONGEST_MATERIALIZED} in fp32 on a GPU, where the attention of "
        f"{num_attention_heads} heads with {num_query_groups} key-value heads holds tokens x tokens scores, got "
        f"{seq_length}; --bf16 holds none",
    )


def check_optimizer(optimizer: OptimizationConfig) -> None:
    """Ranges of the optimizer's numbers and of the schedule's steps."""
    _above(0, lr=optimizer.lr, adam_eps=optimizer.adam_eps)
    _within(0.0, optimizer.lr, min_lr=optimizer.min_lr)
    _at_least(
        0, weight_decay=optimizer.weight_decay, clip_grad=optimizer.clip_grad, lr_warmup_iters=optimizer.lr_warmup_iters
    )
    _at_least(1, lr_decay_iters=optimizer.lr_decay_iters)
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(optimizer, name)
        _require(0 <= beta < 1, f"{flag(name)}: expected at least 0 and less than 1, got {beta}")
    _within(0.0, 1.0, optimizer_offload_fraction=optimizer.optimizer_offload_fraction)
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_cpu_offload"):
        _require(
            getattr(optimizer, name) == getattr(OptimizationConfig, name) or optimizer.use_precision_aware_optimizer,
            f"{flag(name)}: expected --use-precision-aware-optimizer with it",
        )
    _require(
        optimizer.optimizer_offload_fraction == 1.0 or optimizer.optimizer_cpu_offload,
        "--optimizer-offload-fraction: expected --optimizer-cpu-offload with it",
    )
    _require(
        optimizer.lr_decay_iters is None or optimizer.lr_warmup_iters < optimizer.lr_decay_iters,
        f"--lr-warmup-iters: expected less than --lr-decay-iters {optimizer.lr_decay_iters}, got "
        f"{optimizer.lr_warmup_iters}",
    )


def check_data(data: DataConfig, scorer: ScorerConfig) -> None:
    """That --data-path makes sense (`split_blend`), and that --scores names as many folders."""
    folders, scores = len(data.folders), scorer.scores
    _require(
        scores is None or len(scores) == folders,
        f"--scores: expected {folders} folders, one for each of --data-path in their order, got {len(scores or ())}",
    )


def check_logging(logging: LoggingConfig, checkpoint: CheckpointConfig, world_size: int | None = None) -> None:
    """Ranges, what needs --wandb-project or --profile, and the ranks and place of traces."""
    _at_least(1, log_interval=logging.log_interval)
    for switch, names in (
        ("wandb_project", ("wandb_entity", "wandb_exp_name", "wandb_save_dir")),
        ("profile", ("profile_step_start", "profile_step_end", "profile_ranks")),
    ):
        for name in names:
            _require(
                getattr(logging, switch) or getattr(logging, name) == getattr(LoggingConfig, name),
                f"{flag(name)}: expected {flag(switch)} with it",
            )
    _require(not logging.profile or checkpoint.save is not None, "--profile: expected --save with it")
    _at_least(0, profile_step_start=logging.profile_step_start)
    _require(
        logging.profile_step_end > logging.profile_step_start,
        f"--profile-step-end: expected more than --profile-step-start {logging.profile_step_start}, got "
        f"{logging.profile_step_end}",
    )
    for rank in logging.profile_ranks:
        _require(
            rank >= 0 and (world_size is None or rank < world_size),
            f"--profile-ranks: expected ranks of 0 to {'...' if world_size is None else world_size - 1}, got {rank}",
        )


def check_checkpoint(checkpoint: CheckpointConfig, model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """That there is something to start from, and that what is asked to be written has its own place."""
    pretrained = checkpoint.pretrained_checkpoint
    _require(
        model.load_hf is not None or checkpoint.load is not None or pretrained is not None,
        "--load-hf or --load: expected a model to start from, got neither",
    )
    _require(
        checkpoint.save is None
        or pretrained is None
        or Path(checkpoint.save).resolve() not in (Path(pretrained).resolve(), Path(pretrained).resolve().parent),
        f"--save: expected another folder than the run of --pretrained-checkpoint {pretrained}, got {checkpoint.save}",
    )
    every, retain = checkpoint.save_interval, checkpoint.save_retain_interval
    _at_least(1, save_interval=every, save_retain_interval=retain, keep_last=checkpoint.keep_last)
    _require(
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
        _require(value is None or checkpoint.save is not None, f"{flag(name)}: expected --save with it")
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
            _require(
                folder is None or other is None or Path(folder).resolve() != Path(other).resolve(),
                f"{flag(target)}: expected another folder than {flag(name)}, got {folder} for both",
            )


def check_faults(faults: FaultConfig) -> None:
    """Ranges of the numbers of bad steps, and that nothing is said of those that end the run at once."""
    _at_least(1, max_bad_steps=faults.max_bad_steps)
    _above(0, loss_spike_sigmas=faults.loss_spike_sigmas, hang_timeout_in_mins=faults.hang_timeout_in_mins)
    _require(
        faults.on_bad_step == "skip" or faults.max_bad_steps == FaultConfig.max_bad_steps,
        f"--max-bad-steps {faults.max_bad_steps}: expected --on-bad-step skip with it",
    )


def check_model_shape(
    parallel: ParallelConfig,
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int | None = None,
) -> None:
    """That a model of this shape can be cut as `parallel` says.

    Args:
        num_query_groups: number of key-value heads.
        ffn_hidden_size: inner width of the MLP, checked when given.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for what, count in (
        ("attention heads", num_attention_heads),
        ("MLP columns", ffn_hidden_size),
    ):
        _require(
            count is None or count % tensor == 0,
            f"--tensor-model-parallel-size: expected a divisor of the model's {count} {what}, got {tensor}",
        )
    _require(
        num_query_groups % tensor == 0 or tensor % num_query_groups == 0,
        f"--tensor-model-parallel-size: expected a divisor or a multiple of the model's {num_query_groups} key-value "
        f"heads, got {tensor}",
    )
    _require(
        num_layers % pipeline == 0,
        f"--pipeline-model-parallel-size: expected a divisor of the model's {num_layers} layers, got {pipeline}",
    )
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    _require(
        chunk is None or (num_layers // pipeline) % chunk == 0,
        f"--num-layers-per-virtual-pipeline-stage: expected a divisor of the {num_layers // pipeline} layers of a "
        f"pipeline stage, got {chunk}",
    )
    if parallel.cp_comm_type in ("a2a", "a2a+p2p"):
        sizes = parallel.hierarchical_context_parallel_sizes
        ranks = sizes[0] if sizes is not None else parallel.context_parallel_size
        for what, count in (("attention heads", num_attention_heads), ("key-value heads", num_query_groups)):
            per_rank = max(1, count // tensor)  # a key-value head is had by several ranks where there are more of these
            _require(
                per_rank % ranks == 0,
                f"--cp-comm-type {parallel.cp_comm_type}: shares the {per_rank} {what} of a TP rank among {ranks} "
                f"ranks, expected a divisor of {per_rank}",
            )


def virtual_pipeline_size(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Chunks of layers that each pipeline stage holds under the interleaved schedule; None without it, or with one."""
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return None
    size = num_layers // parallel.pipeline_model_parallel_size // chunk
    return size if size > 1 else None


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding as Megatron pads it: the next multiple of `divisible_by` x TP.

    >>> padded_vocab_size(320, 128, 2)
    512
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _at_least(low: float, **values: float | None) -> None:
    for name, value in values.items():
        _require(value is None or low <= value < math.inf, f"{flag(name)}: expected {low} or more, got {value}")


def _at_most(high: float, **values: float | None) -> None:
    for name, value in values.items():
        _require(value is None or value <= high, f"{flag(name)}: expected at most {high}, got {value}")


def _above(low: float, **values: float | None) -> None:
    for name, value in values.items():
        _require(value is None or low < value < math.inf, f"{flag(name)}: expected more than {low}, got {value}")


def _within(low: float, high: float, **values: float | None) -> None:
    for name, value in values.items():
        _require(value is None or low <= value <= high, f"{flag(name)}: expected {low} to {high}, got {value}")
