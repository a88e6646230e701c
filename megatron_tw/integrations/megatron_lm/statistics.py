"""A step's statistics as Megatron-LM's loggers take them: (sum, count) of a micro-batch, which it adds up over
micro-batches and over data- and context-parallel ranks before it divides."""

import torch
from torch import Tensor

from megatron_tw.objective import StepReport


def logged(report: StepReport, sums: Tensor, *, scored: bool, seconds: float) -> dict[str, Tensor]:
    """By the name in the log, [2] fp32; the seconds [1], of which it takes the mean.

    sums: of whole rows, as `StepReport.sums` makes them. Every context-parallel rank reports the same, which the
    division takes out again.
    """
    pairs = report.fractions(sums, scored=scored)
    values = {name.replace("_", " "): torch.stack(pair).float() for name, pair in pairs.items()}
    if scored:
        values["scoring seconds"] = torch.tensor([seconds])
    return values
