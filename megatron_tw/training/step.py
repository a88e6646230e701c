"""One optimizer step: the rows' NLL in short windows, weights, forward and backward, update.

R = rows, N = tokens of a row, T = N - 1 targets of a row, S = tokens of a row that this rank holds, M = rows of a
micro-batch.

    rows -> short-window NLL (one forward-only pipeline pass for all micro-batches)
         -> long NLL of a micro-batch -> the objective: weights of whole rows, sum(weight * NLL), count of valid targets
         -> gradients / global count
"""

import math
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

from megatron_tw.data.loader import Batch, documents_of
from megatron_tw.model.flops import Work
from megatron_tw.model.forward import Sequences, call_model, long_sequences, row_layout, run_schedule
from megatron_tw.objective import ShortNLL, StepReport, weighted_loss
from megatron_tw.parallel.devices import Device, synchronize
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.clock import Clock
from megatron_tw.training.bad_steps import BadSteps, on_any_rank
from megatron_tw.training.flops import StepFlops
from megatron_tw.training.scorers import Scorer
from megatron_tw.weighting import Scheme, check_finite, document_starts
from megatron_tw.weighting.schedule import WeightingSchedule


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch on the device: whole rows for the weights, this rank's slice of them for the model."""

    sequences: Sequences
    row_index_M: Tensor
    valid_MT: Tensor
    short_nll_MT: Tensor | None
    documents_D3: Tensor | None = None
    """Of packed rows, see `Batch.documents`."""
    starts_MT: Tensor | None = None
    """And the position where the document of each target begins, on the device."""


@dataclass(kw_only=True)
class TrainingStep:
    """The step of one run. Calling it with this rank's micro-batches updates the model and returns the step's metrics.

    report: what it says of losses and weights. flops: what it costs. bad_steps: what follows where it goes wrong.
    clock: where its time goes.
    """

    model: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout
    device: Device
    schedule: WeightingSchedule
    scorer: Scorer | None
    report: StepReport
    flops: StepFlops
    seed: int
    bad_steps: BadSteps = field(default_factory=BadSteps)
    clock: Clock = field(init=False)
    _seen: list[tuple[StepBatch, Tensor, Tensor | None]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        for chunk in self.model:
            chunk.config.timers = self.clock

    def __call__(self, batches: Sequence[Batch], iteration: int) -> dict[str, Any]:
        """Run the step that `iteration` steps have gone before on `batches`, this data-parallel rank's micro-batches of
        the same size.

        Returns metrics on every rank: those of `StepReport.metrics`; grad_norm (before clipping), learning_rate,
        step_seconds, tokens, masked_targets (that do not count, padding included); model_flops and hardware_flops, of
        all ranks; skipped_steps, of the whole run; skipped, why this step made no update, None where it did.

        Raises:
            BadStepError: it is bad, and ends the run; the weights are as they were. On every rank.
        """
        synchronize()
        started = time.perf_counter()
        self._seen.clear()
        weighting = self.schedule.at(iteration)
        step_batches = self._prepare(batches, weighting)
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
        scored = self.scorer is not None and weighting.needs_scorer
        metrics = self.report.metrics(self._sum_over_run(reports), scored=scored)
        nonfinite, rows, targets = (metrics.pop(name) for name in ("nonfinite", "rows", "targets"))
        cost = {name: metrics.pop(name) for name in ("loss_rows", "labelled_rows", "attended")}
        why = self._nonfinite() if nonfinite else self.bad_steps.too_high(metrics["lm_loss"])
        why = on_any_rank(why, self.device.device)
        learning_rate, grad_norm = self.scheduler.get_lr(self.optimizer.param_groups[0]), math.nan
        if why is None:
            with self.clock.part("optimizer"):
                _, grad_norm, _ = self.optimizer.step()
            why = None if math.isfinite(grad_norm) else f"gradients: a norm of {grad_norm}"
        self.bad_steps.count(why, metrics["lm_loss"], iteration)
        self.scheduler.step(increment=1)
        if self.scorer is not None and why is None:
            self.scorer.after_update()
        synchronize()
        return {
            **metrics,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "tokens": rows * batches[0].tokens.shape[1],
            "masked_targets": int(rows * self.report.num_targets - targets),
            **self.flops.of_step(int(rows), scoring=self._scoring_work(int(rows), batches) if scored else None, **cost),
            "step_seconds": time.perf_counter() - started,
            "skipped_steps": self.bad_steps.skipped,
            "skipped": why,
        }

    def _prepare(self, batches: Sequence[Batch], weighting: Scheme) -> list[StepBatch]:
        """Rows onto the device, and their short NLL by the scorer as it is before this step."""
        rows_RN = torch.cat([batch.tokens for batch in batches]).to(self.device.device)
        size = len(batches[0].tokens)
        row_index_R = torch.cat([batch.row_index for batch in batches])
        short_RT = None
        if self.scorer is not None and weighting.needs_scorer:
            with self.clock.part("scoring"):
                short_RT = self.scorer.short_nll(rows_RN, row_index_R, documents_of(batches))
        prepared = []
        for index, (batch, rows_MN) in enumerate(zip(batches, rows_RN.split(size), strict=True)):
            valid_MT = None if batch.valid is None else batch.valid.to(rows_MN.device)
            documents_D3, starts_MT = batch.documents, None
            if documents_D3 is not None:
                starts_MT = document_starts(documents_D3, (size, self.report.num_targets)).to(rows_MN.device)
            prepared.append(
                StepBatch(
                    long_sequences(rows_MN, self.layout, valid_RT=valid_MT, documents_D3=documents_D3),
                    batch.row_index.to(rows_MN.device),
                    torch.ones_like(rows_MN[:, 1:], dtype=torch.bool) if valid_MT is None else valid_MT,
                    None if short_RT is None else short_RT[index * size : (index + 1) * size],
                    documents_D3,
                    starts_MT,
                )
            )
        return prepared

    def _scoring_work(self, rows: int, batches: Sequence[Batch]) -> Work:
        """FLOPs of scoring the step's `rows` rows, on all ranks."""
        assert self.scorer is not None
        documents_D3 = documents_of(batches)
        work = self.scorer.work(rows, documents_D3)
        if documents_D3 is None:
            return work
        both = torch.tensor([work.gemm, work.attention], dtype=torch.float64, device=self.device.device)
        dist.all_reduce(both, group=self.layout.dp_group)  # each replica's documents are its own
        return Work(*both.tolist())

    def _forward_step(
        self, weighting: Scheme, iterator: Iterator[StepBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return call_model(model, batch.sequences), partial(self._loss, weighting, batch)

    def _loss(self, weighting: Scheme, batch: StepBatch, nll_SM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum over this rank's targets, its count of valid targets (an integer, free of weights), and the
        report."""
        short_nll: ShortNLL = None
        if batch.short_nll_MT is not None:
            assert self.scorer is not None
            short_nll = partial(self.scorer.complete, batch.short_nll_MT, document_starts_RT=batch.starts_MT)
        loss = weighted_loss(
            nll_SM,
            short_nll,
            weighting,
            valid=batch.valid_MT,
            layout=row_layout(self.layout, batch.sequences.shard.packed),
            row_ids=batch.row_index_M,
            seed=self.seed,
            document_starts=batch.starts_MT,
            documents=batch.documents_D3,
            report=self.report,
        )
        self._seen.append((batch, loss.long_nll, loss.short_nll))
        assert loss.statistics is not None
        return loss.sum, loss.count, loss.statistics

    def _nonfinite(self) -> str | None:
        """Of the targets that this rank holds: a row and a position whose NLL is NaN or infinite."""
        for batch, long_MT, short_MT in self._seen:
            for name, nll_MT in (("long NLL", long_MT), ("short NLL", short_MT)):
                if nll_MT is not None:
                    try:
                        check_finite(
                            nll_MT, valid=batch.valid_MT, row_ids=batch.row_index_M, name=name, rank=self.layout.rank
                        )
                    except ValueError as error:
                        return str(error)
        return None

    def _sum_over_run(self, reports: Sequence[Tensor]) -> list[float]:
        """Sums over micro-batches and data-parallel ranks, on every rank: the last pipeline stage has them and tells
        the others."""
        sums = torch.zeros(self.report.size, dtype=torch.float64, device=self.device.device)
        if self.layout.is_last_stage:
            sums += torch.stack(list(reports)).sum(0)
            dist.all_reduce(sums, group=self.layout.dp_group)
        if self.layout.pp_size > 1:
            dist.broadcast(sums, self.layout.last_stage_rank, group=self.layout.pp_group)
        return [float(number) for number in sums.tolist()]
