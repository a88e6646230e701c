"""One optimizer step: score the rows in short windows, make weights, forward and backward, update.

R = rows, N = tokens of a row, T = N - 1 targets of a row, S = tokens of a row that this rank holds, M = rows of a
micro-batch.

    rows -> short-window NLL (one forward-only pipeline pass for all micro-batches)
         -> long NLL of a micro-batch, gathered over the context-parallel group (4 bytes a target)
         -> weights of whole rows -> this rank's slice -> sum(weight * NLL), count of valid targets -> gradients /
         global count
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_tw.data.loader import Batch
from megatron_tw.model.forward import Sequences, call_model, long_sequences, run_schedule
from megatron_tw.parallel.devices import Device, synchronize
from megatron_tw.parallel.layout import Layout, gather_over_context, same_on_tensor_ranks
from megatron_tw.parallel.zigzag import zigzag_shard
from megatron_tw.training.scorers import Scorer
from megatron_tw.weighting import Weighting, check_finite, token_weights
from megatron_tw.weighting.schedule import WeightingSchedule

_SUMS = (
    "weighted_nll",
    "nll",
    "targets",
    "weights",
    "weight_beyond_window",
    "zero_weights",
    "weight_std",
    "weight_entropy",
    "effective_targets",
    "rows",
    "nonfinite",
)
"""What a micro-batch reports, as sums over its targets or rows; summed over micro-batches and data-parallel ranks
before
any division."""


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch on the device: whole rows for the weights, this rank's slice of them for the model."""

    sequences: Sequences
    row_index_M: Tensor
    valid_MT: Tensor
    short_nll_MT: Tensor | None


@dataclass(kw_only=True)
class TrainingStep:
    """The step of one run. Calling it with this rank's micro-batches updates the model and returns the step's metrics.

    window: tokens of the scorer's short window, None for schemes without a scorer.
    """

    model: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout
    device: Device
    schedule: WeightingSchedule
    scorer: Scorer | None
    window: int | None
    seed: int
    _seen: list[tuple[StepBatch, Tensor, Tensor | None]] = field(default_factory=list, init=False)

    def __call__(self, batches: Sequence[Batch], iteration: int) -> dict[str, float]:
        """Run the step that `iteration` steps have gone before on `batches`, this data-parallel rank's micro-batches of
        the same size.

        Returns metrics on every rank: weighted_loss, lm_loss (unweighted); of the weights mean, std, entropy (nats,
        of a row's weights as shares), effective sample size ((sum w)^2 / sum w^2, as a share of the targets), shares of
        zeros and beyond the old context; grad_norm (before clipping), learning_rate, scoring_seconds, step_seconds,
        tokens.

        Raises:
            ValueError: a NaN or infinite NLL, before the optimizer sees it; on every rank.
        """
        synchronize()
        started = time.perf_counter()
        self._seen.clear()
        weighting = self.schedule.at(iteration)
        step_batches = self._prepare(batches, weighting)
        scored = time.perf_counter()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = run_schedule(
            self.model,
            partial(self._forward_step, weighting),
            step_batches,
            local_length=step_batches[0].sequences.ids_MS.shape[1],
            micro_batch_size=len(step_batches[0].row_index_M),
            layout=self.layout,
            forward_only=False,
        )
        sums = self._sum_over_run(reports)
        if sums["nonfinite"]:
            self._raise_nonfinite(sums["nonfinite"])
        learning_rate = self.scheduler.get_lr(self.optimizer.param_groups[0])
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise ValueError("gradients: NaN or infinite; no update was made. A lower --lr or --clip-grad may help")
        self.scheduler.step(increment=1)
        if self.scorer is not None:
            self.scorer.after_update()
        synchronize()
        tokens = sums["rows"] * (batches[0].tokens.shape[1])
        return {
            "weighted_loss": sums["weighted_nll"] / sums["targets"],
            "lm_loss": sums["nll"] / sums["targets"],
            "weight_mean": sums["weights"] / sums["targets"],
            "weight_std": sums["weight_std"] / sums["rows"],
            "weight_entropy": sums["weight_entropy"] / sums["rows"],
            "effective_sample_size": sums["effective_targets"] / sums["targets"],
            "zero_weight_share": sums["zero_weights"] / sums["targets"],
            "weight_share_beyond_window": sums["weight_beyond_window"] / sums["weights"] if sums["weights"] else 0.0,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "tokens": tokens,
            "scoring_seconds": scored - started if self.scorer is not None else 0.0,
            "step_seconds": time.perf_counter() - started,
        }

    def _prepare(self, batches: Sequence[Batch], weighting: Weighting) -> list[StepBatch]:
        """Rows onto the device, and their short NLL by the scorer as it is before this step."""
        rows_RN = torch.cat([batch.tokens for batch in batches]).to(self.device.device)
        size = len(batches[0].tokens)
        row_index_R = torch.cat([batch.row_index for batch in batches])
        short_RT = None
        if self.scorer is not None and weighting.needs_scorer:
            short_RT = self.scorer.score(rows_RN, row_index_R)
            synchronize()
        prepared = []
        for index, (batch, rows_MN) in enumerate(zip(batches, rows_RN.split(size), strict=True)):
            valid = (
                torch.ones_like(rows_MN[:, 1:], dtype=torch.bool)
                if batch.valid is None
                else batch.valid.to(rows_MN.device)
            )
            prepared.append(
                StepBatch(
                    long_sequences(rows_MN, self.layout),
                    batch.row_index.to(rows_MN.device),
                    valid,
                    None if short_RT is None else short_RT[index * size : (index + 1) * size],
                )
            )
        return prepared

    def _forward_step(
        self, weighting: Weighting, iterator: Iterator[StepBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return call_model(model, batch.sequences), partial(self._loss, weighting, batch)

    def _loss(self, weighting: Weighting, batch: StepBatch, nll_SM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum over this rank's targets, its count of valid targets (an integer, free of weights), and the
        report."""
        nll_MS = nll_SM.transpose(0, 1)
        long_MT = gather_over_context(nll_MS.detach(), self.layout)[:, :-1]
        short_MT = batch.short_nll_MT
        if short_MT is not None:
            assert self.scorer is not None
            short_MT = self.scorer.complete(short_MT, long_MT)
        weights_MT = token_weights(
            long_MT, short_MT, weighting, valid=batch.valid_MT, row_ids=batch.row_index_M, seed=self.seed
        )
        weights_MT = same_on_tensor_ranks(weights_MT, self.layout)
        shard = batch.sequences.shard
        weights_MS, valid_MS = (
            zigzag_shard(torch.nn.functional.pad(x, (0, 1)), 1, rank=shard.rank, size=shard.size)
            for x in (weights_MT, batch.valid_MT)
        )
        # A masked target may hold anything: 0 * NaN must not reach the sum.
        loss = (weights_MS * torch.where(valid_MS, nll_MS, 0.0)).sum()
        self._seen.append((batch, long_MT, short_MT))
        return loss, valid_MS.sum().int(), self._report(batch.valid_MT, long_MT, short_MT, weights_MT)

    def _report(self, valid_MT: Tensor, long_MT: Tensor, short_MT: Tensor | None, weights_MT: Tensor) -> Tensor:
        """The sums named in _SUMS over whole rows, fp64, without waiting for the device."""
        finite_MT = long_MT.isfinite() if short_MT is None else long_MT.isfinite() & short_MT.isfinite()
        long_MT, weights_MT = torch.where(valid_MT, long_MT, 0.0).double(), weights_MT.double()
        count_M, total_M = valid_MT.sum(1), weights_MT.sum(1)
        mean_M1 = (total_M / count_M.clamp(min=1))[:, None]
        variance_M = torch.where(valid_MT, (weights_MT - mean_M1) ** 2, 0.0).sum(1) / (count_M - 1).clamp(min=1)
        shares_MT = weights_MT / torch.where(total_M == 0, 1.0, total_M)[:, None]
        squares_M = (shares_MT**2).sum(1)
        sums = {
            "weighted_nll": (weights_MT * long_MT).sum(),
            "nll": long_MT.sum(),
            "targets": count_M.sum(),
            "weights": total_M.sum(),
            "weight_beyond_window": weights_MT[:, self.window or weights_MT.shape[1] :].sum(),
            "zero_weights": (valid_MT & (weights_MT == 0)).sum(),
            "weight_std": variance_M.sqrt().sum(),
            "weight_entropy": -torch.xlogy(shares_MT, shares_MT).sum(),
            "effective_targets": torch.where(squares_M > 0, 1.0 / squares_M.clamp(min=1e-300), 0.0).sum(),
            "rows": torch.tensor(len(weights_MT), device=weights_MT.device),
            "nonfinite": (valid_MT & ~finite_MT).sum(),
        }
        return torch.stack([sums[name].double() for name in _SUMS])

    def _raise_nonfinite(self, count: float) -> None:
        """Every rank raises; one that holds such a target names its row and position."""
        for batch, long_MT, short_MT in self._seen:
            for name, nll_MT in (("long NLL", long_MT), ("short NLL", short_MT)):
                if nll_MT is not None:
                    check_finite(
                        nll_MT, valid=batch.valid_MT, row_ids=batch.row_index_M, name=name, rank=self.layout.rank
                    )
        raise ValueError(f"NLL: {count:.0f} targets on other ranks are NaN or infinite; no update was made")

    def _sum_over_run(self, reports: Sequence[Tensor]) -> dict[str, float]:
        """Sums over micro-batches and data-parallel ranks, on every rank: the last pipeline stage has them and tells
        the others."""
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device.device)
        if self.layout.is_last_stage:
            sums += torch.stack(list(reports)).sum(0)
            dist.all_reduce(sums, group=self.layout.dp_group)
        if self.layout.pp_size > 1:
            dist.broadcast(sums, self.layout.last_stage_rank, group=self.layout.pp_group)
        return dict(zip(_SUMS, sums.tolist(), strict=True))
