"""Rho-1: the targets with the largest excess loss over the scorer's."""

from megatron_tw.weighting.schemes.pipeline import Preset
from megatron_tw.weighting.schemes.registry import register_scheme

register_scheme("rho1")(Preset(settings={"normalization": "l1"}, numbers={"sparsification": 0.6}))
