"""Sparse weights (arXiv 2503.09202): the targets whose scores are largest in magnitude, and no others."""

from megatron_tw.weighting.schemes.pipeline import Preset
from megatron_tw.weighting.schemes.registry import register_scheme

register_scheme("sparse")(
    Preset(settings={"transforms": ["absolute"], "normalization": "l1"}, numbers={"sparsification": 0.2})
)
