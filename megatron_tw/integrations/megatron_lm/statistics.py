"""A step's statistics as Megatron-LM's loggers take them: (sum, count) of a micro-batch, which it adds up over
micro-batches and over data- and context-parallel ranks before it divides."""

import torch
from torch import Tensor

from megatron_tw.objective import StepReport

_WITH_WINDOWS = ("lm_loss_beyond", "weight_share_beyond_context")
"""What takes a context to be beyond, which is that of a window."""


def logged(report: StepReport, sums: Tensor, *, scored: bool, seconds: float) -> dict[str, Tensor]:
    """By the name in the log, [2] fp32; the seconds [1], of which it takes the mean.

    sums: of whole rows, as `StepReport.sums` makes them. Every context-parallel rank reports the same, which the
    division takes out again. scored: whether the run has short windows.
    """
    pairs = report.fractions(sums, scored=scored)
    if not scored:
        pairs = {name: pair for name, pair in pairs.items() if name not in _WITH_WINDOWS}
    values = {name.replace("_", " "): torch.stack(pair).float() for name, pair in pairs.items()}
    if scored:
        values["scoring seconds"] = torch.tensor([seconds])
    return values
