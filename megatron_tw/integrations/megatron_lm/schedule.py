"""The seam: a function in place of Megatron's schedule. It scores a step's micro-batches in short windows, then runs
the schedule on them with weighted losses. Forward-only passes (evaluation) go through as they are.

R = rows of a step, M = rows of a micro-batch, S = positions (and targets) of a row, L = those that this rank holds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_tw.integrations.megatron_lm.hidden_loss import language_model, loss_from_hidden_states
from megatron_tw.integrations.megatron_lm.losses import UNIFORM, MicroBatchLosses
from megatron_tw.integrations.megatron_lm.micro_batches import fetch
from megatron_tw.integrations.megatron_lm.options import TokenWeightingOptions
from megatron_tw.integrations.megatron_lm.own_attention import has_own_attention, own_attention_of_rows
from megatron_tw.integrations.megatron_lm.window_pass import WindowPass
from megatron_tw.objective import RowLayout, StepReport
from megatron_tw.parallel.devices import synchronize
from megatron_tw.parallel.layout import Layout, current_layout


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a run is. iteration: steps that have gone before. consumed: rows that they took. seed: of ties."""

    iteration: int
    consumed: int
    seed: int


class TokenWeightedSchedule:
    """Stands in for what `get_forward_backward_func` gives.

    own: that. options: of the run. step: tells where the run is, asked at every call.
    """

    def __init__(self, own: Callable[..., Any], options: TokenWeightingOptions, step: Callable[[], Step]) -> None:
        self.own, self.options, self.step = own, options, step
        self.schemes = options.schedule()
        self._own_attention: bool | None = None
        self._windows: WindowPass | None = None
        self._compared = False

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
        **others: Any,
    ) -> Any:
        chunks: list[nn.Module] = model if isinstance(model, list) else [model]
        layout = current_layout(len(chunks) if len(chunks) > 1 else None)
        given = {"model": model, "num_microbatches": num_microbatches, "seq_length": seq_length,
                 "micro_batch_size": micro_batch_size, "forward_only": forward_only, **others}  # fmt: skip
        with ExitStack() as stack:
            if self._own_attention is None:
                self._own_attention = has_own_attention(chunks, layout.pp_group)
            own_attention = self._own_attention
            if own_attention:
                stack.enter_context(own_attention_of_rows(chunks, layout.cp_group, seq_length))
            if forward_only:
                return self.own(forward_step_func=forward_step_func, data_iterator=data_iterator, **given)
            step = self.step()
            scheme = self.schemes.at(step.iteration)
            windows = self.options.windows_of_rows(seq_length)
            if scheme == UNIFORM and windows is None:
                return self.own(forward_step_func=forward_step_func, data_iterator=data_iterator, **given)
            batches = fetch(
                data_iterator,
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                seq_length=seq_length,
                layout=layout,
                device=_device_of(chunks),
            )
            shape, seconds, short_RS = (num_microbatches * micro_batch_size, seq_length), 0.0, None
            if windows is not None:
                started = _now()
                self._windows = self._windows or self._plan(chunks, layout, seq_length, micro_batch_size, own_attention)
                groups = {name: others[name] for name in ("p2p_communicator", "pg_collection") if name in others}
                short_RS = self._windows.short_nll(
                    self.own, chunks, batches.tokens, batches.labels, shape=shape, device=_device_of(chunks), **groups
                )
                seconds = _now() - started
            if scheme != UNIFORM:
                stack.enter_context(loss_from_hidden_states(chunks))
            losses = MicroBatchLosses(
                scheme=scheme,
                batches=batches,
                short_RS=short_RS,
                window=None if windows is None else windows.tokens,
                micro_batch_size=micro_batch_size,
                row_ids_R=_row_ids(step.consumed, num_microbatches, micro_batch_size, layout),
                seed=step.seed,
                layout=RowLayout(tp_group=layout.tp_group, cp_group=layout.cp_group),
                report=StepReport.of_rows(seq_length + 1, seq_length if windows is None else windows.tokens),
                scoring_seconds=seconds,
                compare=not self._compared,
            )
            self._compared = True
            return self.own(
                forward_step_func=partial(_forward_step, forward_step_func, losses),
                data_iterator=batches.iterators,
                **given,
            )

    def _plan(
        self, model: Sequence[nn.Module], layout: Layout, seq_length: int, micro_batch_size: int, own_attention: bool
    ) -> WindowPass:
        config = get_model_config(model[0])
        windows = self.options.windows_of_rows(seq_length)
        assert windows is not None
        return WindowPass.create(
            seq_length,
            windows,
            bos_id=self.options.bos_id,
            layout=layout,
            sequence_parallel=config.sequence_parallel,
            own_attention=own_attention,
            micro_batch_size=micro_batch_size,
            multiple=(config.microbatch_group_size_per_vp_stage or layout.pp_size) if len(model) > 1 else 1,
        )


def _forward_step(
    own: Callable[..., Any], losses: MicroBatchLosses, iterator: Iterator[Any], model: nn.Module, *others: Any
) -> tuple[Any, Any]:
    """The user's forward step; where the model ends, its loss function gets weighted losses."""
    output, loss_func = own(iterator, model, *others)
    if not language_model(model).post_process:
        return output, loss_func
    return output, losses.next(loss_func)


def _device_of(model: Sequence[nn.Module]) -> torch.device:
    return next(parameter.device for chunk in model for parameter in chunk.parameters())


def _row_ids(consumed: int, num_microbatches: int, micro_batch_size: int, layout: Layout) -> Tensor:
    """Names [R] int64 of this rank's rows: their places in the order in which Megatron's sampler takes the data."""
    batch = torch.arange(num_microbatches)[:, None] * layout.dp_size + layout.dp_rank
    return (consumed + batch * micro_batch_size + torch.arange(micro_batch_size)).flatten()


def _now() -> float:
    synchronize()
    return time.perf_counter()
