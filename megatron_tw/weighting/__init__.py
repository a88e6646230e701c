"""Token weighting on whole rows: short windows, scores to weights. Pure math, without process groups or Megatron."""

from megatron_tw.weighting.config import PRESETS, ExactConfig, Weighting, WeightingConfig
from megatron_tw.weighting.weights import check_finite, token_weights, unfrozen_short_nll
from megatron_tw.weighting.windows import Window, check_stride, default_stride, plan_windows

__all__ = [
    "PRESETS",
    "ExactConfig",
    "Weighting",
    "WeightingConfig",
    "Window",
    "check_finite",
    "check_stride",
    "default_stride",
    "plan_windows",
    "token_weights",
    "unfrozen_short_nll",
]
