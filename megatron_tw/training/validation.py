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
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation of one run: the first `num_rows` held-out rows, after every `interval` steps and the last one."""

    rows: TokenRows
    num_rows: int
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
        means = torch.full((len(self.edges),), torch.nan, dtype=torch.float64, device=self.device.device)
        if nlls is not None:
            assert nlls.long is not None
            nll_RT = nlls.long.numpy()
            mask_RT = np.ones_like(nll_RT, dtype=bool)
            buckets = nll_by_position(nll_RT, mask_RT, self.edges)
            means = means.new_tensor([mean_nll(nll_RT, mask_RT), *(bucket.nll for bucket in buckets)])
        if layout.pp_size > 1:
            dist.broadcast(means, layout.last_stage_rank, group=layout.pp_group)
        mean, *by_bucket = means.tolist()
        if not np.isfinite(mean):
            raise ValueError(f"--valid-data-path {self.rows.path}: the model's mean NLL there is {mean}")
        return {
            "valid_lm_loss": mean,
            "valid_by_position": [
                {"first": low, "last": high - 1, "targets": self.num_rows * (high - low), "lm_loss": nll}
                for low, high, nll in zip(self.edges, self.edges[1:], by_bucket, strict=False)
            ],
        }
