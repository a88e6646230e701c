"""Steps that should not reach the weights: with losses or gradients that are NaN or infinite, or far too high a loss.

step -> NLL finite? loss among the last ones? -> optimizer, which leaves out gradients that are not finite
     -> fine: the loss joins the last ones -> bad: --on-bad-step stop ends the run, skip goes on
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.config import FaultConfig

LAST_LOSSES, LEAST_LOSSES = 100, 20
"""Losses of good steps with which another one is compared, and how many there must be."""


class BadStepError(ValueError):
    """A bad step that ends the run; raised on every rank, with the weights as they were before it."""


@dataclass
class BadSteps:
    """What follows bad steps, and what must be known for it; the same on every rank.

    losses: of the last good steps. in_a_row: bad steps since the last good one. skipped: of the whole run.
    """

    options: FaultConfig = field(default_factory=FaultConfig)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_LOSSES))
    in_a_row: int = 0
    skipped: int = 0

    def too_high(self, loss: float) -> str | None:
        """Whether a loss is one of --loss-spike-sigmas, in words; None where it is not, or where too few are known."""
        sigmas = self.options.loss_spike_sigmas
        if sigmas is None or len(self.losses) < LEAST_LOSSES:
            return None
        mean, deviation = mean_and_deviation(self.losses)
        if loss <= mean + sigmas * deviation:
            return None
        return (
            f"lm_loss: {loss:.4f}, above --loss-spike-sigmas {sigmas:g}: the last {len(self.losses)} had a mean of "
            f"{mean:.4f} and a standard deviation of {deviation:.4f}"
        )

    def count(self, why: str | None, loss: float, iteration: int) -> None:
        """Take note of a step, the one after `iteration` others. why: it is bad, in words; None where it is good.

        Raises:
            BadStepError: the run ends here.
        """
        if why is None:
            self.in_a_row = 0
            self.losses.append(loss)
            return
        options = self.options
        what = f"step {iteration + 1}: {why}; no update was made"
        if options.on_bad_step == "stop":
            raise BadStepError(f"{what} (--on-bad-step skip would go on)")
        if self.in_a_row >= options.max_bad_steps:
            raise BadStepError(f"{what}, nor in the {self.in_a_row} steps before it (--max-bad-steps)")
        self.in_a_row += 1
        self.skipped += 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, so that a resumed run decides alike."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; {} is that of a run from before there was one."""
        self.losses = deque((float(loss) for loss in state.get("losses", ())), maxlen=LAST_LOSSES)
        self.in_a_row, self.skipped = int(state.get("in_a_row", 0)), int(state.get("skipped", 0))


def mean_and_deviation(numbers: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Of a population.

    >>> mean_and_deviation([1.0, 3.0])
    (2.0, 1.0)
    """
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))


def on_any_rank(why: str | None, device: torch.device) -> str | None:
    """The reason of the first rank that has one to call the step bad, on every rank: what ranks compute alike may
    differ in its last bits, or on one of them by a fault. None where no rank has one. Collective over the world."""
    votes = torch.tensor([why is not None], dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    if not votes.item():
        return None
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, why)
    return next(text for text in everywhere if text is not None)
