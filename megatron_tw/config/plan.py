"""Options of tools/plan.py: those of a training run, and which GPUs it is to run on."""

from dataclasses import dataclass, field, fields, replace

from megatron_tw.config.checks import check_config
from megatron_tw.config.options import PATHS, flag
from megatron_tw.config.ranges import at_most
from megatron_tw.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

LARGEST_WORLD = 10**6
"""GPUs; beyond it, somebody's slip."""
DOES_NOT_FIT = 3
"""Exit status of tools/plan.py where the layout does not fit the GPU."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan: what is planned, for which GPUs."""

    world_size: int
    """Number of GPUs."""
    model: str | None = None
    """A published model by name instead of --load-hf: llama3-8b, llama3.1-70b, qwen3-8b, phi-2, ... (another name lists
    them all)."""
    gpu: str = "h100"
    """Kind of GPU: a100, h100, h200 or b200, as SXM boards in nodes with NVLink."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins; beyond them there is InfiniBand. Tensor parallelism stays within."""
    find_layout: bool = False
    """Search the layout, the recomputation and the micro-batch size, instead of taking those of the options."""
    finalists: int = 3
    """Layouts that --find-layout simulates, the best ones by an estimate."""
    processes: int = 2
    """Processes that simulate at a time, of half a GB or more each."""
    output: str | None = None
    """New folder for plan.json, memory.png and, after --find-layout, layout.yaml for tools/train.py."""
    calibrate: str | None = None
    """metrics.jsonl of a measured run, with its newest checkpoint beside it: times are scaled by what it took."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU (null: as the kind has it, and so for the following ones)."""
    peak_tflops: float | None = None
    """Its peak in bf16, of which the utilization is a share."""
    gemm_tflops: float | None = None
    """TFLOP/s that large matrix products reach."""
    attention_tflops: float | None = None
    """TFLOP/s that causal attention reaches, forward and backward together."""
    memory_gbytes_per_second: float | None = None
    """GB/s that elementwise operations reach in its memory."""
    nvlink_gbytes_per_second: float | None = None
    """GB/s of a GPU to the others of its node, in one direction, that collectives reach."""
    network_gbytes_per_second: float | None = None
    """GB/s of a GPU to other nodes, in one direction, that collectives reach."""


@dataclass(frozen=True, kw_only=True)
class PlannedDataConfig(DataConfig):
    """Data: the rows' length. A plan opens no rows."""

    data_path: tuple[str, ...] = field(default=("rows",), metadata=PATHS)
    """Not opened."""


@dataclass(frozen=True, kw_only=True)
class PlannedTrainConfig(TrainConfig):
    """Training: in what portions."""

    train_iters: int | None = None  # type: ignore[assignment]
    """Optimizer steps; of a --weighting-schedule the dearest stage before it is planned (null: of all stages)."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """All options of a plan: those of a training, and its own."""

    plan: PlanOptions
    data: PlannedDataConfig
    train: PlannedTrainConfig = field(default_factory=PlannedTrainConfig)

    def run_config(self) -> RunConfig:
        """The options of the training, without what it reads and writes: a plan has no use for that. One step where
        --train-iters is not given."""
        groups = {group.name: getattr(self, group.name) for group in fields(RunConfig)}
        train = replace(
            self.train,
            train_iters=1 if self.train.train_iters is None else self.train.train_iters,
            eval_interval=None,
            eval_iters=None,
            eval_ruler=None,
            eval_ruler_samples=TrainConfig.eval_ruler_samples,
            exit_interval=None,
            exit_duration_in_mins=None,
            exit_signal_handler=False,
        )
        groups |= {
            "model": replace(self.model, load_hf=self.model.load_hf or self.plan.model),
            "data": DataConfig(**vars(replace(self.data, valid_data_path=None))),
            "train": TrainConfig(**vars(train)),
            "checkpoint": CheckpointConfig(),
            "logging": LoggingConfig(),
        }
        return RunConfig(**groups)


@dataclass(frozen=True, kw_only=True)
class OwnPlanOptions:
    """The options that a plan has and a training has not."""

    plan: PlanOptions


def check_plan(config: PlanConfig) -> None:
    """Check the options with each other; with --find-layout those of the layout are left aside.

    Raises:
        ValueError: names the option.
    """
    plan = config.plan
    for name in ("world_size", "gpus_per_node", "finalists", "processes"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{flag(name)}: expected 1 or more, got {getattr(plan, name)}")
    at_most(LARGEST_WORLD, world_size=plan.world_size, gpus_per_node=plan.gpus_per_node)
    rates = ("gpu_memory_gib", "peak_tflops", "gemm_tflops", "attention_tflops", "memory_gbytes_per_second")
    for name in (*rates, "nvlink_gbytes_per_second", "network_gbytes_per_second"):
        value = getattr(plan, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag(name)}: expected more than 0, got {value}")
    if (plan.model is None) == (config.model.load_hf is None):
        got = "neither" if plan.model is None else "both"
        raise ValueError(f"--model and --load-hf: expected one of them, got {got}")
    tensor = config.parallel.tensor_model_parallel_size
    if tensor > plan.gpus_per_node and not plan.find_layout:
        raise ValueError(
            f"--tensor-model-parallel-size: expected at most --gpus-per-node {plan.gpus_per_node}, got {tensor}"
        )
    run = config.run_config()
    if plan.find_layout:
        if config.train.global_batch_size is None:
            raise ValueError("--global-batch-size: --find-layout needs it: without it each layout would have another")
        run = replace(run, parallel=ParallelConfig(), train=replace(run.train, micro_batch_size=1))
    check_config(run, None if plan.find_layout else plan.world_size)
