"""Weighting schemes, one file each: what training asks of one (base.py), and which there are (registry.py).

docs/extending.md adds one.
"""

# ruff: noqa: I001 (schemes are registered in this order, in which errors list them)
from megatron_tw.weighting.schemes import uniform, dense, sparse, longce, ppmi, npmi, rho1  # noqa: F401
from megatron_tw.weighting.schemes.base import Scheme, Targets, check_choice, check_number
from megatron_tw.weighting.schemes.exact import ExactConfig
from megatron_tw.weighting.schemes import custom  # noqa: F401
from megatron_tw.weighting.schemes.pipeline import WeightingConfig
from megatron_tw.weighting.schemes.registry import SCHEMES, SchemeKind, preset, register_scheme, scheme_kind

PRESETS = {name: SCHEMES[name] for name in ("uniform", "dense", "sparse", "longce", "ppmi", "npmi", "rho1", "exact")}
"""The published schemes, which can be had by their name alone."""

__all__ = [
    "PRESETS",
    "SCHEMES",
    "ExactConfig",
    "Scheme",
    "SchemeKind",
    "Targets",
    "WeightingConfig",
    "check_choice",
    "check_number",
    "preset",
    "register_scheme",
    "scheme_kind",
]
