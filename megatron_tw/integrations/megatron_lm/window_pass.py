"""The short-window pass of a step: the model in training, limited to short windows, through Megatron's own
forward-only schedule. No gradients, nothing drawn at random, no logits.

R = rows, S = positions of a row, T = S targets, L = windows of all rows, n = tokens of a window.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_tw.config import ShortWindows
from megatron_tw.integrations.megatron_lm.hidden_loss import loss_from_hidden_states
from megatron_tw.integrations.megatron_lm.own_attention import SequenceShard
from megatron_tw.model.forward import deal_windows, num_window_groups
from megatron_tw.objective import RowLayout, lay_out_windows
from megatron_tw.parallel.layout import Layout, split_context_group
from megatron_tw.weighting import Window, plan_windows


@dataclass(frozen=True, kw_only=True)
class WindowPass:
    """How the windows of a row are run.

    windows: those of this rank's context-parallel sub-group. rows, window: how rows and windows lie over
    context-parallel ranks. padded_length: of a window; padding stands behind it, which nothing before it sees.
    at_once: windows of one forward pass. multiple: forward passes come in multiples of it. own_attention: windows lie
    on as few ranks as can be; else, with Megatron's attention, each lies over the whole context-parallel group.
    """

    windows: tuple[Window, ...]
    rows: RowLayout
    window: RowLayout
    padded_length: int
    at_once: int
    multiple: int
    bos_id: int | None
    own_attention: bool

    @staticmethod
    def create(
        seq_length: int,
        windows: ShortWindows,
        *,
        bos_id: int | None,
        layout: Layout,
        sequence_parallel: bool,
        own_attention: bool,
        micro_batch_size: int,
        multiple: int,
    ) -> "WindowPass":
        """Collective over the world (it may create groups).

        multiple: micro-batches come in multiples of it (interleaved pipelines).
        """
        planned = list(plan_windows(seq_length, windows.tokens, windows.stride, include_first=False))
        planned[-1] = planned[-1]._replace(last_target=seq_length)  # labels reach one further than tokens
        num_groups = num_window_groups(len(planned), layout.cp_size) if own_attention else 1
        group, index = split_context_group(layout, num_groups)
        if num_groups == 1 and layout.cp_size > 1:
            group = layout.cp_group
        window = RowLayout(cp_group=group)
        tp_multiple = layout.tp_size if sequence_parallel else 1
        shards = (2 * window.cp_size if window.cp_size > 1 else 1) * tp_multiple
        mine = deal_windows(planned, index, num_groups)
        return WindowPass(
            windows=mine,
            rows=RowLayout(cp_group=layout.cp_group),
            window=window,
            padded_length=-(-windows.tokens // shards) * shards,
            at_once=windows.micro_batch or max(1, len(mine) * micro_batch_size),
            multiple=multiple,
            bos_id=bos_id,
            own_attention=own_attention,
        )

    @torch.no_grad()
    def short_nll(
        self,
        schedule: Callable[..., Any],
        model: Sequence[nn.Module],
        tokens_RS: Tensor | None,
        labels_RS: Tensor | None,
        *,
        shape: tuple[int, int],
        device: Any,
        **groups: Any,
    ) -> Tensor | None:
        """Short NLL [R, T] fp32 of whole rows, 0 where no window scores the target; None before the last stage.

        tokens_RS, labels_RS: int64, None between the first and the last stage. shape: R, S. groups: what the schedule
        is given besides.
        """
        blank = torch.zeros(shape, dtype=torch.int64, device=device)  # nobody reads tokens or labels there
        batch = lay_out_windows(
            blank if tokens_RS is None else tokens_RS,
            self.windows,
            labels=blank if labels_RS is None else labels_RS,
            bos_id=self.bos_id,
            length=self.padded_length,
            multiple=self.at_once * self.multiple,
        )
        parts = [
            (self.window.slice(ids).contiguous(), self.window.slice(labels).contiguous())
            for ids, labels in zip(batch.ids.split(self.at_once), batch.labels.split(self.at_once), strict=True)
        ]
        with _evaluating(model), loss_from_hidden_states(model):
            nlls = schedule(
                forward_step_func=self._forward,
                data_iterator=[iter(parts) for _ in model] if len(model) > 1 else iter(parts),
                model=list(model),
                num_microbatches=len(parts),
                seq_length=parts[0][0].shape[1] * self.rows.cp_size,  # which the schedule divides by
                micro_batch_size=self.at_once,
                forward_only=True,
                collect_non_loss_data=True,
                **groups,
            )
        if not nlls:
            return None
        positions = self.window.positions(self.padded_length, device)
        return self.rows.sum_(batch.put_back(torch.cat(nlls).float(), positions))

    def _forward(self, iterator: Iterator[tuple[Tensor, Tensor]], model: nn.Module, *unused: Any) -> tuple[Tensor, Any]:
        ids, labels = next(iterator)
        positions = self.window.positions(self.padded_length, ids.device).expand_as(ids)
        given: dict[str, Any] = {"labels": labels}
        if self.own_attention:
            given["packed_seq_params"] = SequenceShard.over(self.window.cp_group, self.padded_length)
        return model(ids, positions, None, **given), _collect


def _collect(nll: Tensor, non_loss_data: bool = True) -> Tensor:
    return nll


@contextmanager
def _evaluating(model: Sequence[nn.Module]) -> Iterator[None]:
    """In evaluation mode, in which nothing is dropped, and without the schedule's timers, which are the long pass's."""
    modes = [chunk.training for chunk in model]
    config = get_model_config(model[0])
    timers, config.timers = config.timers, None
    try:
        for chunk in model:
            chunk.eval()
        yield
    finally:
        config.timers = timers
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
