"""Every option of a run, in frozen dataclasses: one class a concern, one line under each field.

A field `seq_length` is the flag `--seq-length` and the YAML key `seq_length`; the line under it is its help text.
Names that Megatron has are Megatron's. `None` means "decided from the rest", as the line says; the methods here are
the only place that decides it.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Literal

from megatron_tw.config.blend import split_blend
from megatron_tw.config.options import PATHS


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Parallelism: how the ranks share the model."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers (PP)."""
    distributed_timeout_minutes: int = 60
    """Minutes after which a collective that hangs ends the run."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(ShardingConfig):
    """Parallelism: how the ranks share the model and the rows. What is left over is data parallel."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one chunk of the interleaved pipeline schedule (needs PP > 1; null: not interleaved)."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each row (CP)."""
    sequence_parallel: bool | None = None
    """Share the activations between the TP regions as well (null: on when TP > 1; means nothing with TP 1)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How Transformer Engine moves keys and values under CP; without it they are always gathered."""
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = None
    """Sizes of the a2a and the p2p level of a2a+p2p; their product is CP."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one copy of the model takes: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def uses_sequence_parallel(self) -> bool:
        """`sequence_parallel` with its default filled in: never with TP 1, else on unless it was switched off."""
        return self.tensor_model_parallel_size > 1 and self.sequence_parallel is not False

    @property
    def loss_shards(self) -> int:
        """Parts into which sequence parallelism cuts a rank's tokens before the loss."""
        return self.tensor_model_parallel_size if self.uses_sequence_parallel else 1

    @property
    def seq_length_multiple(self) -> int:
        """What a row's length must be a multiple of: each CP rank holds two slices of equal length, and sequence
        parallelism cuts its tokens into TP equal parts."""
        return self.context_parallel_size * lcm(self._slices, self.loss_shards)

    @property
    def document_multiple(self) -> int:
        """Likewise, the length of a document in a packed row: 2 x CP x TP with both, so that neither changes it."""
        return self.context_parallel_size * self._slices * self.loss_shards

    @property
    def _slices(self) -> int:
        return 2 if self.context_parallel_size > 1 else 1


@dataclass(frozen=True, kw_only=True)
class DataParallelConfig:
    """Data parallelism: when the copies of the model exchange gradients and weights."""

    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass still runs (null: on where data- and context-parallel ranks are more
    than one)."""
    overlap_param_gather: bool | None = None
    """Gather updated weights while the next forward pass runs, which needs --overlap-grad-reduce (null: on where that
    is on, but off with --scorer ema, which averages the weights before)."""
    ddp_bucket_size: int | None = None
    """Parameters whose gradients are reduced at a time under --overlap-grad-reduce (null: Megatron-Core's default, 40
    million or a million for each data- and context-parallel rank)."""

    def decided(self, ranks: int, *, weights_used_at_once: bool) -> "DataParallelConfig":
        """With its overlaps filled in.

        ranks: data- x context-parallel ranks, over which gradients are summed. weights_used_at_once: something reads
        the whole updated weights before the next forward pass.
        """
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        if reduce is None:
            reduce = ranks > 1 or bool(gather)
        if gather is None:
            gather = reduce and ranks > 1 and not weights_used_at_once
        return replace(self, overlap_grad_reduce=reduce, overlap_param_gather=gather)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: where it comes from, and what becomes another in it."""

    load_hf: str | None = None
    """Local Hugging Face folder of the model (a checkpoint under --load wins)."""
    rotary_base: float | None = None
    """New base of the rotary embedding (null: the checkpoint's)."""
    rope_scaling_type: Literal["none", "linear", "ntk", "yarn", "llama3"] | None = None
    """How the rotary embedding is stretched to a longer context: positions divided by the factor (linear, PI), a base
    times factor^(d / (d - 2)) (ntk), frequency by frequency (yarn, llama3), or no longer (none). Not dynamic NTK: its
    frequencies depend on each input's length (null: as the checkpoint's)."""
    rope_scaling_factor: float | None = None
    """Factor by which it is stretched (null: new length over that of the first checkpoint, before any stage)."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Computation: in what precision, with whose layers, in what portions."""

    bf16: bool = False
    """Compute in bfloat16 (a training keeps fp32 main weights); otherwise everything is fp32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers: Transformer Engine's or our own (auto: Transformer Engine's with --bf16 where it is installed and
    there is a GPU)."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times TP; exports are stripped again."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at once in the loss (null: chosen from the vocabulary size)."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Kernels: what Transformer Engine, Apex and NVIDIA's libraries compute and send, where they are."""

    gradient_accumulation_fusion: bool | None = None
    """Weight gradients are added up by the matrix product itself (null: on where there is a GPU and Apex's
    fused_weight_gradient_mlp_cuda)."""
    rope_fusion: bool | None = None
    """Queries and keys are rotated by one kernel (null: on with Transformer Engine's layers, but off where cos and sin
    are multiplied by a factor, as with yarn)."""
    bias_swiglu_fusion: bool | None = None
    """SwiGLU is compiled into one kernel (null: on where there is a GPU and a compiler, for models with SwiGLU)."""
    bias_dropout_fusion: bool | None = None
    """Bias and residual are added by one compiled kernel (null: on where there is a GPU and a compiler)."""
    deterministic_mode: bool = False
    """The same numbers in every run on the same ranks: deterministic algorithms of PyTorch, cuBLAS, NCCL (Ring) and
    Transformer Engine; slower."""
    tp_comm_overlap: bool = False
    """Tensor-parallel communication beside the matrix products, in Transformer Engine's user buffers (needs TP > 1 with
    sequence parallelism); off in forward passes with another number of tokens, such as short windows."""
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = "nccl"
    """By which the ranks find each other when the user buffers are made."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the layers in FP8 with Transformer Engine: e4m3 everywhere, or hybrid, e5m2 for gradients
    (null: in bf16). Scoring and held-out losses stay in bf16."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "delayed"
    """How numbers are scaled for FP8: by the current tensor's largest, by those of steps before, or in blocks (mxfp8:
    Blackwell alone)."""
    fp8_margin: int = 0
    """For delayed: powers of two that are left free above the largest number."""
    fp8_amax_history_len: int = 1
    """For delayed: steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """For delayed: which of the remembered numbers counts."""


DEFAULT_KEEP_LOGITS_MIB = 1024
"""--loss-keep-logits-mib where it is not given and no weights are sparse."""


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Activations: what is kept from the forward pass to the backward pass, and what is made again."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """Activations computed again in the backward pass: of --recompute-modules (selective) or of whole layers (full)."""
    recompute_modules: tuple[str, ...] | None = None
    """For selective: the parts of a layer whose activations are computed again, of core_attn and mlp (null:
    core_attn)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """For full: layers in equal chunks (uniform), or only the first ones of each stage (block)."""
    recompute_num_layers: int | None = None
    """For full: layers of a chunk (uniform), or how many layers (block)."""
    recompute_cp_gather: bool = False
    """Under CP without Transformer Engine: gather the keys and values of other ranks again in the backward pass instead
    of keeping them, without computing the attention again (nothing to gain where that is computed again anyway)."""
    loss_keep_logits_mib: int | None = None
    """MiB in which the loss keeps logits from forward to backward instead of making them again; tokens kept = MiB x
    2^20 / (padded vocabulary / TP x bytes of a number). (null: 1024, and 0 where weights are sparse)."""

    @property
    def modules_run_again(self) -> frozenset[str]:
        """The parts of a layer that the backward pass computes again where it does not do so with whole layers."""
        if self.recompute_granularity != "selective":
            return frozenset()
        return frozenset(self.recompute_modules or ("core_attn",))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: the rows, as tools/preprocess_data.py wrote them."""

    data_path: tuple[str, ...] = field(metadata=PATHS)
    """Folder that tools/preprocess_data.py wrote; or several, in proportion to their rows, or each behind its weight
    (0.7 DIR 0.3 DIR), which is its share of the samples."""
    valid_data_path: str | None = None
    """Folder of held-out rows, as tools/preprocess_data.py wrote them, whose loss is reported every --eval-interval."""
    seq_length: int
    """Tokens of a row; a row has one target less."""
    shuffle: bool = True
    """Visit the rows in an order drawn from --seed, another one in each epoch; else as they are stored."""
    bos_id: int | None = None
    """Id of the token that rows begin with, which the short windows then begin with too (null: that of the rows'
    tokenizer, else the checkpoint's bos_token_id)."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Those of --data-path."""
        return split_blend(self.data_path)[0]

    @property
    def weights(self) -> tuple[Fraction, ...] | None:
        """Those of --data-path, None without."""
        return split_blend(self.data_path)[1]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: how long, and in what portions."""

    train_iters: int
    """Optimizer steps of the whole run, the resumed ones included."""
    micro_batch_size: int = 1
    """Rows of one forward pass of one copy of the model."""
    global_batch_size: int | None = None
    """Rows of one optimizer step (null: one micro-batch for each data-parallel rank)."""
    seed: int = 1234
    """Seed of the order of the rows and of the tie-breaks of sparse weights."""
    eval_interval: int | None = None
    """Steps between two reports of the loss on the rows of --valid-data-path; there is one after the last step too."""
    eval_iters: int | None = None
    """Global batches of held-out rows of one such report (null: all rows)."""
    eval_ruler: tuple[str, ...] | None = None
    """RULER tasks, of those that need no outside text, whose exactness such a report tells, in prompts of --seq-length
    (docs/ruler.md)."""
    eval_ruler_samples: int = 16
    """Examples of each of them."""
    exit_interval: int | None = None
    """Stop, with a checkpoint, after an iteration that this divides."""
    exit_duration_in_mins: int | None = None
    """Stop, with a checkpoint, after the step in which so many minutes are over since the start, loading included."""
    exit_signal_handler: bool = False
    """On SIGTERM, finish the step and stop, with a checkpoint."""
    check: bool = False
    """Find out all that can be known without a training step, on these ranks: files and every checksum, room on the
    disk, memory, the bandwidth within each group. Prints a table and ends, with exit status 0 or 2."""

    def batch_size(self, dp_size: int) -> int:
        """`global_batch_size` with its default filled in, for `dp_size` copies of the model."""
        return self.micro_batch_size * dp_size if self.global_batch_size is None else self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization: AdamW and its learning rate."""

    lr: float = 2e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """For linear and cosine: learning rate that the decay ends at."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_decay_iters: int | None = None
    """For linear and cosine: step at which the decay ends (null: --train-iters)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices; norms and biases have none."""
    clip_grad: float = 1.0
    """Global gradient norm to clip to (0: no clipping)."""
    adam_beta1: float = 0.9
    """Decay of the running mean of the gradients."""
    adam_beta2: float = 0.95
    """Decay of the running mean of their squares."""
    adam_eps: float = 1e-8
    """Added to the denominator of the update."""
    use_precision_aware_optimizer: bool = False
    """Let main weights, gradients and moments have other types than fp32 (needs Transformer Engine with its AdamW)."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the gradients that are summed and reduced."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the main weights."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Type of the running mean of the gradients."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Type of the running mean of their squares."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state in the host's memory and update there (needs --use-precision-aware-optimizer)."""
    optimizer_offload_fraction: float = 1.0
    """For --optimizer-cpu-offload: the share that is kept there."""

    def decay_iters(self, train_iters: int) -> int:
        """Step at which the decay ends. Megatron's scheduler wants more of them than warm-up steps, so a run that ends
        within its warm-up gets as many as that takes; it never reaches them."""
        return self.lr_decay_iters or max(train_iters, self.lr_warmup_iters + 1)


@dataclass(frozen=True, kw_only=True)
class WeightingOptions:
    """Token weights: a scheme and what differs from it. Null is the scheme's value, or no such step if custom."""

    weighting: str = "uniform"
    """Scheme: uniform, dense, sparse, longce, ppmi, npmi, rho1, exact, or custom for one made of the options below."""
    weighting_schedule: str | None = None
    """Stages "STEP: SCHEME NAME=NUMBER ..." separated by ";", "STEP linear: ..." or "STEP cosine: ..." to move there;
    SCHEME is a name as above, or base for the scheme of the other options. Example: "0: uniform; 100 linear: base; 300:
    sparse"."""
    comparison: Literal["difference", "quotient"] | None = None
    """Score from long and short NLL: their difference or their quotient."""
    transforms: tuple[str, ...] | None = None
    """Applied to the score in this order: absolute, minus, exp, max, "shift S"."""
    truncation: float | None = None
    """Highest score that is let through."""
    sparsification: float | None = None
    """Share of a row's targets, the highest scores, that get weight 1; the others get 0."""
    normalization: Literal["l1", "softmax"] | None = None
    """Weights of a row made to average 1: divided by their mean (l1), or by softmax."""
    interpolation: float | None = None
    """Share of uniform weights mixed in (1: plain cross-entropy)."""
    shift: float | None = None
    """The S of ppmi and npmi."""
    alpha: float | None = None
    """Mean extra weight of the long-context targets of exact."""
    gamma: float | None = None
    """How much exact favours rare context lengths."""
    tau: float | None = None
    """Least context, in tokens, of the targets that exact favours."""
    weighting_parameters: tuple[str, ...] | None = None
    """The scheme's numbers that have no flag, each as NAME=NUMBER; in YAML also a mapping."""


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Scorer: who says what a target's NLL is in a short window."""

    scorer: str = "unfrozen"
    """unfrozen: the model in training itself, in short windows; frozen: a fixed model (--scores or --scorer-hf); ema: a
    moving average of the model in training."""
    scores: tuple[str, ...] | None = field(default=None, metadata=PATHS)
    """Frozen, cached: folder that tools/score_tokens.py wrote for these rows; one for each folder of --data-path, in
    their order."""
    scorer_hf: str | None = None
    """Frozen, live: Hugging Face folder of a second model, kept beside the one in training on the last pipeline
    stage."""
    scorer_ema_decay: float = 0.999
    """Of the moving average: what a step keeps of it."""


@dataclass(frozen=True, kw_only=True)
class WindowsConfig:
    """Windows: the short contexts, in which a target's NLL is made once more."""

    short_window: int | None = None
    """Tokens of a short window (needed by every weighting with a scorer, by tools/score_tokens.py, and to choose key
    tokens; null: none, or after --pretrained-checkpoint, where a scorer needs them, the rows' length of that run)."""
    short_stride: int | None = None
    """Tokens from one window to the next (null: (1 - window/seq) x window, or less to keep the least context)."""
    min_short_context: int | None = None
    """Least context that a target beyond the first window must have, in tokens (null: a quarter of the window)."""
    scoring_micro_batch: int | None = None
    """Windows of one forward pass on a rank (null: all that a micro-batch gives it)."""

    def of_rows(self, seq_length: int) -> "ShortWindows | None":
        """The windows of rows of `seq_length` tokens, with the defaults filled in; None without --short-window.

        Default stride: s = (1 - n/N) n as published (arXiv 2503.09202), which makes the windows after the first hold
        N tokens in all, but at most n - least_context.
        """
        if self.short_window is None:
            return None
        least = max(1, self.short_window // 4) if self.min_short_context is None else self.min_short_context
        stride = self.short_stride
        if stride is None:
            published = (seq_length - self.short_window) * self.short_window // seq_length
            stride = max(1, min(published, self.short_window - least))
        return ShortWindows(
            tokens=self.short_window,
            stride=stride,
            least_context=least,
            micro_batch=self.scoring_micro_batch,
        )


@dataclass(frozen=True, kw_only=True)
class ShortWindows:
    """The short windows of a row, decided.

    tokens: n, of a window. stride: s, tokens from one window to the next. least_context: the least context of a target
    beyond the first window. micro_batch: windows of one forward pass on a rank, None for all that there are.
    """

    tokens: int
    stride: int
    least_context: int
    micro_batch: int | None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: what a run leaves, and what it goes on from."""

    save: str | None = None
    """Folder of the run: checkpoints, metrics.jsonl, the resolved options."""
    save_interval: int | None = None
    """Steps between two checkpoints (null: only at the end)."""
    async_save: bool = False
    """Go on with the training while a checkpoint is written, by a process beside each rank, from a copy in the host's
    memory; it is there when all of it is written."""
    save_retain_interval: int | None = None
    """Steps between two checkpoints that are kept; of the others only the last is, or --keep-last (null: all are)."""
    keep_last: int | None = None
    """How many of the newest checkpoints are kept, besides those of --save-retain-interval and the one that the run was
    resumed from (null: all, or one with --save-retain-interval)."""
    load: str | None = None
    """Folder of a run to resume; without a checkpoint in it the run starts fresh and says so."""
    auto_resume: bool = False
    """Without --load: as --load with the folder of --save, so that the same command starts a run and resumes it."""
    pretrained_checkpoint: str | None = None
    """Folder of an earlier run, or one checkpoint of it, whose weights alone a fresh run starts from, at iteration 0;
    the old context is then its rows' length (a checkpoint under --load wins; --load-hf may be left out)."""
    dist_ckpt_optim_fully_reshardable: bool = True
    """Save the optimizer's state so that any layout can load it; else as its ranks hold it, without gathering it on the
    hosts, and only a run of the same TP, PP and layers a stage can resume it."""
    ckpt_fully_parallel_load: bool = False
    """Share the reading of a checkpoint among data-parallel ranks, which then send each other what they read."""
    verify_checkpoint: bool = True
    """Compare the files of a checkpoint or an export with their checksums before it is read."""
    save_hf: str | None = None
    """Folder for the final model in Hugging Face format."""

    def resuming(self) -> "CheckpointConfig":
        """With --load filled in by --auto-resume."""
        return replace(self, load=self.save) if self.auto_resume and self.load is None else self


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Faults: what becomes of a step that goes wrong, and of a rank that stops."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    """What follows a step whose losses or gradients are NaN or infinite, or whose loss is one of --loss-spike-sigmas:
    the run ends (stop), or goes on without an update of the weights (skip)."""
    max_bad_steps: int = 3
    """For skip: bad steps in a row after which another one ends the run."""
    loss_spike_sigmas: float | None = None
    """A step is bad, too, whose lm_loss is above the mean of the last 100 good ones (20 at least) by so many of their
    standard deviations (null: none is)."""
    hang_timeout_in_mins: float = 30.0
    """Minutes without progress of a rank (a step, a save, a pass over held-out rows) after which the job ends, with a
    line that names the rank, its host and its step. With a shorter --distributed-timeout-minutes that ends it first."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard (null: tensorboard/ under --save)."""
    log_interval: int = 10
    """Steps between two reports by position in metrics.jsonl and TensorBoard, and between two lines of the log where it
    is no terminal (a terminal shows a progress bar)."""
    wandb_project: str | None = None
    """Project in Weights & Biases that gets the metrics too (null: none). WANDB_MODE=offline in the environment keeps
    them in files for `wandb sync`."""
    wandb_entity: str | None = None
    """For --wandb-project: user or team (null: the default of who is logged in)."""
    wandb_exp_name: str | None = None
    """For --wandb-project: name of the run (null: W&B makes one)."""
    wandb_save_dir: str | None = None
    """For --wandb-project: folder of W&B's own files (null: --save)."""
    profile: bool = False
    """Write a trace of some steps by PyTorch's profiler, to profile/ under --save."""
    profile_step_start: int = 10
    """For --profile: steps of the run before the first one that is traced."""
    profile_step_end: int = 12
    """For --profile: the last step that is traced."""
    profile_ranks: tuple[int, ...] = (0,)
    """For --profile: ranks that write a trace."""
    log_row_ids: bool = False
    """Write into metrics.jsonl the numbers of the rows that a step trained on, as its ranks took them (row_ids)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All options of a training run."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data_parallel: DataParallelConfig = field(default_factory=DataParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizationConfig = field(default_factory=OptimizationConfig)
    weighting: WeightingOptions = field(default_factory=WeightingOptions)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def tensorboard_dir(self) -> Path | None:
        """Where TensorBoard files go, with the default filled in; None when nothing is saved."""
        if self.logging.tensorboard_dir is not None:
            return Path(self.logging.tensorboard_dir)
        return Path(self.checkpoint.save) / "tensorboard" if self.checkpoint.save is not None else None
