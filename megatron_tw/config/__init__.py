"""Options: frozen dataclasses, read from YAML and flags, checked before anything is allocated."""

from megatron_tw.config.errors import user_errors
from megatron_tw.config.load import (
    describe_difference,
    flat_options,
    load_config,
    load_options,
    parse_options,
    save_config,
)
from megatron_tw.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizationConfig",
    "ParallelConfig",
    "RunConfig",
    "ScorerConfig",
    "TrainConfig",
    "WeightingOptions",
    "describe_difference",
    "flat_options",
    "load_config",
    "load_options",
    "parse_options",
    "save_config",
    "user_errors",
]
