"""What stands between any trainer and the method: hidden states (or their NLL), head, labels and short NLL in; weighted
loss sum, count and statistics out. No Megatron; process groups are arguments.

    short_windows.py   short windows of rows as a batch for any model, and its NLLs put back
    loss.py            the objective
    rows.py            how tensors lie: [batch, seq] or [seq, batch], tensor and context parallelism
    report.py          sums and means of losses and weights, for logs
    zigzag.py          slices of a sequence over context-parallel ranks

Everything here is imported when it is first asked for: positions.py is used where there is no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tw.objective.loss import ShortNLL, WeightedLoss, weighted_cross_entropy, weighted_loss
    from megatron_tw.objective.report import StepReport
    from megatron_tw.objective.rows import RowLayout
    from megatron_tw.objective.short_windows import WindowBatch, lay_out_windows

_MODULES = {
    "RowLayout": "rows",
    "ShortNLL": "loss",
    "StepReport": "report",
    "WeightedLoss": "loss",
    "WindowBatch": "short_windows",
    "lay_out_windows": "short_windows",
    "weighted_cross_entropy": "loss",
    "weighted_loss": "loss",
}

__all__ = [
    "RowLayout",
    "ShortNLL",
    "StepReport",
    "WeightedLoss",
    "WindowBatch",
    "lay_out_windows",
    "weighted_cross_entropy",
    "weighted_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
