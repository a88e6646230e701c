"""LongCE (ICLR 2025): how much likelier the whole context makes a target, clipped."""

from megatron_tw.weighting.schemes.pipeline import Preset
from megatron_tw.weighting.schemes.registry import register_scheme

register_scheme("longce")(Preset(settings={"transforms": ["minus", "exp"]}, numbers={"truncation": 5.0}))
