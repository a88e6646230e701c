"""A pipeline made of the options alone."""

from dataclasses import dataclass
from typing import Any

from megatron_tw.weighting.schemes.pipeline import Preset, WeightingConfig
from megatron_tw.weighting.schemes.registry import register_scheme


@dataclass(frozen=True, kw_only=True)
class Custom(Preset):
    """Takes every step; without any it is none."""

    def create(self, **settings: Any) -> WeightingConfig:
        if not settings:
            raise ValueError("`name` custom: expected `transforms` or other steps with it, got none")
        return super().create(**settings)


register_scheme("custom")(
    Custom(
        settings={},
        refusals={
            "shift": 'a custom scheme says it in `transforms`, for example `transforms` minus "shift 2.0" max',
            **dict.fromkeys(("alpha", "gamma", "tau"), "a custom scheme does not have this option"),
        },
    )
)
