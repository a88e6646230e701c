"""Long-context training with a token-weighted loss: for any trainer as a library, and on Megatron-Core as programs.

What a trainer of one's own needs is here under its name (docs/library.md), and imported when it is first asked for;
it needs torch and numpy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tw.losses import linear_cross_entropy, vocab_parallel_cross_entropy
    from megatron_tw.objective import (
        RowLayout,
        StepReport,
        WeightedLoss,
        lay_out_windows,
        weighted_cross_entropy,
        weighted_loss,
    )
    from megatron_tw.weighting import (
        WeightingConfig,
        parse_schedule,
        plan_windows,
        token_weights,
        unfrozen_short_nll,
    )

__version__ = "0.1.0"

__all__ = [
    "RowLayout",
    "StepReport",
    "WeightedLoss",
    "WeightingConfig",
    "lay_out_windows",
    "linear_cross_entropy",
    "parse_schedule",
    "plan_windows",
    "token_weights",
    "unfrozen_short_nll",
    "vocab_parallel_cross_entropy",
    "weighted_cross_entropy",
    "weighted_loss",
]

_FOLDERS = {
    "losses": ("linear_cross_entropy", "vocab_parallel_cross_entropy"),
    "weighting": ("WeightingConfig", "parse_schedule", "plan_windows", "token_weights", "unfrozen_short_nll"),
}
"""Where the names are; the others are in objective."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = next((folder for folder, names in _FOLDERS.items() if name in names), "objective")
    return getattr(import_module(f"{__name__}.{folder}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
