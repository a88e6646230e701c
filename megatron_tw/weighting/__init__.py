"""Token weighting on whole rows: windows, scores to weights, schedules. No process groups, no Megatron."""

from megatron_tw.weighting.documents import document_starts
from megatron_tw.weighting.schedule import WeightingSchedule, parse_schedule
from megatron_tw.weighting.schemes import PRESETS, ExactConfig, Scheme, Targets, WeightingConfig, register_scheme
from megatron_tw.weighting.weights import check_finite, token_weights, unfrozen_short_nll
from megatron_tw.weighting.windows import Window, plan_windows

Weighting = Scheme

__all__ = [
    "PRESETS",
    "ExactConfig",
    "Scheme",
    "Targets",
    "Weighting",
    "WeightingConfig",
    "WeightingSchedule",
    "Window",
    "check_finite",
    "document_starts",
    "parse_schedule",
    "plan_windows",
    "register_scheme",
    "token_weights",
    "unfrozen_short_nll",
]
