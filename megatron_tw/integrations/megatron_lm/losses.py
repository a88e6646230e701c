"""What a micro-batch's loss function gets and reports: the user's own, given weighted losses.

M = rows of a micro-batch, S = positions (and targets) of a row, L = those that this rank holds, R = rows of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tw.integrations.megatron_lm.micro_batches import MicroBatches
from megatron_tw.integrations.megatron_lm.statistics import logged
from megatron_tw.objective import RowLayout, StepReport, WeightedLoss, weighted_loss
from megatron_tw.weighting import Scheme, WeightingConfig, unfrozen_short_nll

UNIFORM = WeightingConfig.preset("uniform")
LossFunction = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(kw_only=True)
class MicroBatchLosses:
    """The losses of a step's micro-batches, in their order, on a rank that holds the model's end.

    short_RS, window: NLL in short windows of `window` tokens; None without. compare: whether to compare the user's loss
    function with what is expected of one (it waits for the device).
    """

    scheme: Scheme
    batches: MicroBatches
    short_RS: Tensor | None
    window: int | None
    micro_batch_size: int
    row_ids_R: Tensor
    seed: int
    layout: RowLayout
    report: StepReport
    scoring_seconds: float
    compare: bool
    _given: int = field(default=0, init=False)

    def next(self, own: LossFunction) -> Callable[..., Any]:
        """The loss function of the next micro-batch, from the user's."""
        start = self._given * self.micro_batch_size
        self._given += 1
        return partial(self._loss, slice(start, start + self.micro_batch_size), own)

    def _loss(self, rows: slice, own: LossFunction, losses: Tensor, **given: Any) -> Any:
        """The user's loss function on weighted losses: (sum, count, report), as --calculate-per-token-loss has it.

        losses: what the model returned, [M, L] NLLs. With uniform weights they are not touched.
        """
        nll_ML = losses.reshape(self.micro_batch_size, -1)
        result = self._weigh(rows, nll_ML.detach())
        if self.scheme == UNIFORM:
            answer = own(losses, **given)
        else:
            valid_ML, weights_ML = (self.layout.slice(x) for x in (result.valid, result.weights))
            # A masked target may hold anything: 0 * NaN must not reach the sum.
            answer = own((weights_ML * torch.where(valid_ML, nll_ML, 0.0)).view_as(losses), **given)
        if self.compare:
            _check_answer(answer, result)
            self.compare = False
        loss, count, report = answer
        assert result.statistics is not None
        sums = logged(self.report, result.statistics, scored=self.short_RS is not None, seconds=self.scoring_seconds)
        if self.scheme != UNIFORM and "lm loss" in report:
            report = {**report, "lm loss": sums.pop("lm loss")}  # as unweighted as in a run without weights
        else:
            sums.pop("lm loss")
        return loss, count, {**report, **{name: value.to(loss.device) for name, value in sums.items()}}

    def _weigh(self, rows: slice, nll_ML: Tensor) -> WeightedLoss:
        assert self.batches.valid is not None
        short: Any = None
        if self.short_RS is not None and self.window is not None:
            short = partial(unfrozen_short_nll, short_nll=self.short_RS[rows], window=self.window)
        return weighted_loss(
            nll_ML,
            short,
            self.scheme,
            valid=self.batches.valid[rows],
            layout=self.layout,
            row_ids=self.row_ids_R[rows],
            seed=self.seed,
            report=self.report,
        )


def _check_answer(answer: Any, expected: WeightedLoss) -> None:
    """That a loss function sums the losses of the targets in the loader's loss mask, and counts them.

    Raises:
        ValueError: it does something else, which weights would not fit.
    """
    what = "--token-weighting: expected a loss function that answers (sum of losses, count of targets, report)"
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise ValueError(f"{what}, got {len(answer) if isinstance(answer, tuple) else type(answer).__name__} values")
    loss, count, _ = answer
    if int(count) != int(expected.count):
        raise ValueError(f"{what}, got a count of {int(count)} where the data's loss_mask has {int(expected.count)}")
    if not torch.allclose(loss.detach().double(), expected.sum.double(), rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"{what}, got {float(loss)} where the losses in the data's loss_mask sum to {expected.sum:.6g}"
        )
