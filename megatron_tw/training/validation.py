"""The loss on held-out rows while a model is trained: plain cross-entropy with the whole context, by position too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tw.config import RunConfig
from megatron_tw.data.rows import TokenRows
from megatron_tw.evaluation.loss import nll_of_rows
from megatron_tw.evaluation.position import mean_nll, nll_by_position, position_edges
from megatron_tw.evaluation.targets import RowTargets
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation of one run: the first `num_rows` held-out rows, after every `interval` steps and the last one."""

    rows: TokenRows
    num_rows: int
    targets: RowTargets
    interval: int
    micro_batch_size: int
    edges: tuple[int, ...]
    layout: Layout
    device: Device

    @staticmethod
    def create(
        config: RunConfig, settings: Settings, rows: TokenRows | None, *, layout: Layout, device: Device
    ) -> "Validation | None":
        """What --eval-interval, --eval-iters and --valid-data-path ask for; None without them."""
        train = config.train
        if rows is None or train.eval_interval is None:
            return None
        num_rows = len(rows)
        if train.eval_iters is not None:
            num_rows = min(num_rows, train.eval_iters * settings.global_batch_size)
        return Validation(
            rows=rows,
            num_rows=num_rows,
            targets=RowTargets.of_rows(rows, num_rows),
            interval=train.eval_interval,
            micro_batch_size=train.micro_batch_size,
            edges=position_edges(config.data.seq_length, old_context=settings.old_context),
            layout=layout,
            device=device,
        )

    def metrics(self, model: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """valid_lm_loss and valid_by_position (as `by_position` of `StepReport.metrics`), on every rank. Collective
        over the world; nothing of the model changes.

        Raises:
            ValueError: the mean is NaN or infinite; on every rank.
        """
        layout = self.layout
        nlls = nll_of_rows(
            model,
            self.rows,
            self.num_rows,
            layout,
            self.device,
            micro_batch_size=self.micro_batch_size,
            what="validating",
            keep_bar=False,
        )
        mask_RT, position_RT = self.targets.valid, self.targets.position
        nll_RT = np.zeros(mask_RT.shape, np.float32) if nlls is None or nlls.long is None else nlls.long.numpy()
        buckets = nll_by_position(nll_RT, mask_RT, self.edges, position_RT=position_RT)
        found = [mean_nll(nll_RT, mask_RT), *(bucket.nll for bucket in buckets)]
        means = torch.tensor([torch.nan if mean is None else mean for mean in found], dtype=torch.float64)
        means = means.to(self.device.device)
        if layout.pp_size > 1:
            dist.broadcast(means, layout.last_stage_rank, group=layout.pp_group)
        mean, *of_buckets = means.tolist()
        if not np.isfinite(mean):
            raise ValueError(f"--valid-data-path {self.rows.path}: the model's mean NLL there is {mean}")
        return {
            "valid_lm_loss": mean,
            "valid_by_position": [
                {
                    "first": bucket.first,
                    "last": bucket.last,
                    "targets": bucket.targets,
                    "lm_loss": nll if bucket.targets else None,
                }
                for bucket, nll in zip(buckets, of_buckets, strict=True)
            ],
        }
