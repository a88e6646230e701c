"""Dense weights (arXiv 2503.09202): magnitudes of the scores, with uniform weights mixed in."""

from megatron_tw.weighting.schemes.pipeline import Preset
from megatron_tw.weighting.schemes.registry import register_scheme

register_scheme("dense")(
    Preset(settings={"transforms": ["absolute"], "normalization": "l1"}, numbers={"interpolation": 0.75})
)
