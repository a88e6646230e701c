"""Negative pointwise mutual information, shifted by log S: the targets that the whole context makes less likely."""

from megatron_tw.weighting.schemes.pipeline import Preset
from megatron_tw.weighting.schemes.registry import register_scheme

register_scheme("npmi")(
    Preset(
        settings={"transforms": ["shift", "max"], "normalization": "l1"},
        numbers={"shift": 2.0, "sparsification": None},
    )
)
