"""Options: frozen dataclasses, read from YAML and flags, checked before anything is allocated.

What reads them (load.py) needs jsonargparse and PyYAML, and is imported when it is first asked for: the integrations,
whose programs are other people's, need the dataclasses and the checks alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_tw.config.checks import (
    check_checkpoint,
    check_config,
    check_model,
    check_optimizer,
    check_own_windows,
    check_scorer,
    check_weighting,
    check_windows,
)
from megatron_tw.config.compute_checks import check_activations, check_compute, check_fp32_attention, check_kernels
from megatron_tw.config.errors import user_errors
from megatron_tw.config.layout_checks import (
    check_data_parallel,
    check_model_shape,
    check_packed,
    check_parallel,
    check_seq_length,
    data_parallel_size,
    num_microbatches,
    padded_vocab_size,
    virtual_pipeline_size,
)
from megatron_tw.config.schema import (
    DEFAULT_KEEP_LOGITS_MIB,
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
    ShardingConfig,
    ShortWindows,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)

if TYPE_CHECKING:
    from megatron_tw.config.load import (
        differences,
        flat_options,
        load_config,
        load_options,
        parse_options,
        save_config,
    )

__all__ = [
    "DEFAULT_KEEP_LOGITS_MIB",
    "ActivationConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "DataConfig",
    "DataParallelConfig",
    "FaultConfig",
    "KernelConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizationConfig",
    "ParallelConfig",
    "RunConfig",
    "ScorerConfig",
    "ShardingConfig",
    "ShortWindows",
    "TrainConfig",
    "WeightingOptions",
    "WindowsConfig",
    "check_activations",
    "check_checkpoint",
    "check_compute",
    "check_config",
    "check_data_parallel",
    "check_fp32_attention",
    "check_kernels",
    "check_model",
    "check_model_shape",
    "check_optimizer",
    "check_own_windows",
    "check_packed",
    "check_parallel",
    "check_scorer",
    "check_seq_length",
    "check_weighting",
    "check_windows",
    "data_parallel_size",
    "differences",
    "flat_options",
    "load_config",
    "load_options",
    "num_microbatches",
    "padded_vocab_size",
    "parse_options",
    "save_config",
    "user_errors",
    "virtual_pipeline_size",
]

_OF_LOAD = ("differences", "flat_options", "load_config", "load_options", "parse_options", "save_config")


def __getattr__(name: str) -> Any:
    if name not in _OF_LOAD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.load"), name)
