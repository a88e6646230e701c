"""The long forward and the short-window forward of whole rows, through Megatron's pipeline schedules.

R = rows, N = tokens of a row, n = tokens of a window, S = tokens of a sequence that this rank holds, M = sequences of
a micro-batch.

The short windows are views of the rows that every rank of a replica already has. With K windows a row and C
context-parallel ranks, the ranks form the largest number of equal sub-groups that is at most K (C of them, single
ranks, when K >= C); the windows are dealt out to the sub-groups, each of which runs its own as ordinary sequences.
What is exchanged is one fp32 NLL a target.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_tw.model.kernels import as_in_scoring
from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.packed import PackedSequence
from megatron_tw.objective.rows import RowLayout
from megatron_tw.objective.short_windows import IGNORED, lay_out_windows
from megatron_tw.parallel.layout import Layout, split_context_group
from megatron_tw.weighting import Window, plan_windows


def row_layout(layout: Layout, packed: PackedSequence | None = None) -> RowLayout:
    """How the NLLs of `call_model` lie: [seq, batch], in zigzag over the context-parallel group; packed: of the
    SequenceShard that it was called with."""
    return RowLayout(batch_first=False, tp_group=layout.tp_group, cp_group=layout.cp_group, packed=packed)


@dataclass(frozen=True)
class Sequences:
    """One micro-batch as the model takes it: ids and labels [M, S] of the local tokens, and the layout that made
    them."""

    ids_MS: Tensor
    labels_MS: Tensor
    shard: SequenceShard


def long_sequences(
    rows_RN: Tensor, layout: Layout, *, valid_RT: Tensor | None = None, documents_D3: Tensor | None = None
) -> Sequences:
    """Whole rows [R, N] as sequences over the context-parallel group; position i predicts token i + 1, the last has
    no target.

    valid_RT: which targets count; others get no label. documents_D3: of one packed row, see `Batch.documents`.
    """
    length = rows_RN.shape[1]
    if documents_D3 is None:
        shard = SequenceShard.over(layout.cp_group, length)
    else:
        assert len(rows_RN) == 1, "a packed row is a micro-batch of its own"
        ends_D = torch.cat((documents_D3[1:, 1], torch.tensor([length])))
        shard = SequenceShard.of_documents(layout.cp_group, (ends_D - documents_D3[:, 1]).tolist(), rows_RN.device)
    labels_RT = rows_RN[:, 1:] if valid_RT is None else rows_RN[:, 1:].masked_fill(~valid_RT, IGNORED)
    return shard_sequences(rows_RN, torch.nn.functional.pad(labels_RT, (0, 1), value=IGNORED), shard)


def shard_sequences(ids_MN: Tensor, labels_MN: Tensor, shard: SequenceShard) -> Sequences:
    """This rank's slice of ids and labels: context-parallel slicing happens here and nowhere else."""
    ids_MS, labels_MS = (shard.slice(x, 1).contiguous() for x in (ids_MN, labels_MN))
    return Sequences(ids_MS, labels_MS, shard)


def call_model(model: torch.nn.Module, sequences: Sequences, **asked: bool) -> Any:
    """One forward of a model chunk: NLL [S, M] fp32 on the last stage, hidden states on others. asked: `top1=True`,
    see TokenWeightedGPT."""
    return model(
        input_ids=sequences.ids_MS,
        position_ids=None,
        attention_mask=None,
        labels=sequences.labels_MS,
        packed_seq_params=sequences.shard,
        **asked,
    )


def run_schedule(
    model: Sequence[torch.nn.Module],
    forward_step: Any,
    micro_batches: Sequence[Any],
    *,
    local_length: int,
    micro_batch_size: int,
    layout: Layout,
    forward_only: bool,
    pipelined: bool = True,
) -> list[Any]:
    """Megatron's schedule for this layout over `micro_batches`; returns what the loss function reported, on the last
    stage.

    local_length: tokens of a sequence that one context-parallel rank holds. The schedules are given a whole length,
    which they divide by the context-parallel size. pipelined=False: `model` is whole on these ranks, whatever the
    run's pipeline.
    """
    iterators: list[Iterator[Any]] = [iter(micro_batches) for _ in model]
    schedule = get_forward_backward_func() if pipelined else get_forward_backward_func(pp_size=1, vp_size=None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model),
        num_microbatches=len(micro_batches),
        seq_length=local_length * layout.cp_size,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def forward_nll(
    model: Sequence[torch.nn.Module], micro_batches: Sequence[Sequences], layout: Layout, *, pipelined: bool = True
) -> list[Tensor]:
    """Forward-only pass: local NLL [M, S] fp32 of every micro-batch on the last pipeline stage, an empty list on
    others.

    Nothing is left behind: train or eval mode is restored, nothing is saved for backward.
    """
    return _forward_only(model, _nll_step, micro_batches, layout, pipelined)


@torch.no_grad()
def _forward_only(
    model: Sequence[torch.nn.Module],
    forward_step: Any,
    micro_batches: Sequence[Sequences],
    layout: Layout,
    pipelined: bool = True,
) -> list[Any]:
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with as_in_scoring(model, micro_batches[0].ids_MS.numel()):
            reports = run_schedule(
                model,
                forward_step,
                micro_batches,
                local_length=micro_batches[0].ids_MS.shape[1],
                micro_batch_size=micro_batches[0].ids_MS.shape[0],
                layout=layout,
                forward_only=True,
                pipelined=pipelined,
            )
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
    return reports


def _nll_step(iterator: Iterator[Sequences], model: torch.nn.Module) -> tuple[Tensor, Any]:
    return call_model(model, next(iterator)), _report_nll


def _report_nll(nll_SM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nll_SM.sum(), torch.zeros((), dtype=torch.int, device=nll_SM.device), nll_SM.transpose(0, 1).contiguous()


def _top1_step(iterator: Iterator[Sequences], model: torch.nn.Module) -> tuple[Any, Any]:
    return call_model(model, next(iterator), top1=True), _report_nll_and_top1


def _report_nll_and_top1(both_SM: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    total, count, nll_MS = _report_nll(both_SM[0])
    return total, count, (nll_MS, both_SM[1].transpose(0, 1).contiguous())


def long_nll(
    model: Sequence[torch.nn.Module],
    rows_RN: Tensor,
    layout: Layout,
    *,
    micro_batch_size: int,
    valid_RT: Tensor | None = None,
    documents_D3: Tensor | None = None,
) -> Tensor | None:
    """NLL [R, N-1] fp32 of every target with its full context, forward only; None before the last pipeline stage.

    rows_RN: int64 on the device, R a multiple of micro_batch_size (and R / micro_batch_size of the pipeline size
    under interleaving). valid_RT, documents_D3: see `Batch`; of packed rows micro_batch_size is 1, and targets that do
    not count get 0.
    """
    batches = _micro_batches(rows_RN, layout, micro_batch_size, valid_RT, documents_D3)
    nlls = forward_nll(model, batches, layout)
    if not nlls:
        return None
    whole = [row_layout(layout, batch.shard.packed).gather(nll_MS) for batch, nll_MS in zip(batches, nlls, strict=True)]
    return torch.cat(whole)[:, :-1]


def long_nll_and_top1(
    model: Sequence[torch.nn.Module],
    rows_RN: Tensor,
    layout: Layout,
    *,
    micro_batch_size: int,
    valid_RT: Tensor | None = None,
    documents_D3: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`long_nll`, and [R, N-1] bool: whether the target is the model's first choice, which is the argmax of the whole
    vocabulary (of equal logits: any)."""
    both = nll_and_top1(model, _micro_batches(rows_RN, layout, micro_batch_size, valid_RT, documents_D3), layout)
    return None if both is None else (both[0][:, :-1], both[1][:, :-1])


def _micro_batches(
    rows_RN: Tensor, layout: Layout, size: int, valid_RT: Tensor | None, documents_D3: Tensor | None
) -> list[Sequences]:
    batches = []
    for first in range(0, len(rows_RN), size):
        some = slice(first, first + size)
        batches.append(
            long_sequences(
                rows_RN[some],
                layout,
                valid_RT=None if valid_RT is None else valid_RT[some],
                documents_D3=None if documents_D3 is None else documents_D3[documents_D3[:, 0] == first],
            )
        )
    return batches


def nll_and_top1(
    model: Sequence[torch.nn.Module], batches: Sequence[Sequences], layout: Layout
) -> tuple[Tensor, Tensor] | None:
    """NLL [R, N] fp32 and whether the label is the model's first choice [R, N] bool, at every position of sequences
    that are sharded over the context-parallel group; 0 and False without a label. None before the last stage."""
    reports = _forward_only(model, _top1_step, batches, layout)
    if not reports:
        return None
    rows = [row_layout(layout, batch.shard.packed) for batch in batches]
    nll_RN = torch.cat([row.gather(nll_MS) for row, (nll_MS, _) in zip(rows, reports, strict=True)])
    top1_RN = torch.cat([row.gather(top1_MS.to(torch.uint8)) for row, (_, top1_MS) in zip(rows, reports, strict=True)])
    return nll_RN, top1_RN.bool()


@dataclass(frozen=True)
class ShortWindowForward:
    """The short-window forward of one run: which windows this rank runs, and in which sub-group.

    windows: all windows of a row. mine: those of this rank's sub-group. group: the sub-group (None: this rank alone).
    padded_length: tokens of a window with the padding that sharding wants; padding stands behind the last token,
    which no earlier token sees. bos_id: replaces a window's first token where the row begins with it; None never does.
    scoring_micro_batch: windows that run at once. micro_batch: the option, None where all of a row run at once.
    pipelined: the scoring model lies over the run's pipeline stages; else it is whole on the ranks that call (those of
    the last stage).
    """

    seq_length: int
    windows: tuple[Window, ...]
    mine: tuple[Window, ...]
    group: Any
    padded_length: int
    bos_id: int | None
    scoring_micro_batch: int
    micro_batch: int | None
    layout: Layout
    pipelined: bool

    @staticmethod
    def create(
        seq_length: int,
        window: int,
        stride: int,
        *,
        include_first: bool,
        bos_id: int | None,
        layout: Layout,
        sequence_parallel: bool,
        scoring_micro_batch: int | None = None,
        pipelined: bool = True,
    ) -> "ShortWindowForward":
        """Deal the windows out. Collective over the world (it may create groups).

        include_first: whether window 0 is run (a frozen scorer) or targets 1..n are left to the long NLL (the
        unfrozen one).
        scoring_micro_batch: None runs all of this rank's windows of a row at once.
        """
        return ShortWindowForward.over(
            tuple(plan_windows(seq_length, window, stride, include_first=include_first)),
            seq_length=seq_length,
            longest=window,
            bos_id=bos_id,
            layout=layout,
            sequence_parallel=sequence_parallel,
            scoring_micro_batch=scoring_micro_batch,
            pipelined=pipelined,
        )

    @staticmethod
    def over(
        windows: tuple[Window, ...],
        *,
        seq_length: int,
        longest: int,
        bos_id: int | None,
        layout: Layout,
        sequence_parallel: bool,
        scoring_micro_batch: int | None = None,
        pipelined: bool = True,
    ) -> "ShortWindowForward":
        """As `create`, with windows that were planned otherwise; `longest`: tokens of the longest. Collective over the
        world."""
        num_groups = num_window_groups(len(windows), layout.cp_size)
        group, index = split_context_group(layout, num_groups)
        share = layout.cp_size // num_groups
        mine = deal_windows(windows, index, num_groups)
        return ShortWindowForward(
            seq_length=seq_length,
            windows=windows,
            mine=mine,
            group=group,
            padded_length=padded_window(longest, share, layout.tp_size if sequence_parallel else 1),
            bos_id=bos_id,
            scoring_micro_batch=scoring_micro_batch or max(1, len(mine)),
            micro_batch=scoring_micro_batch,
            layout=layout,
            pipelined=pipelined,
        )

    @property
    def micro_batches_multiple(self) -> int:
        """Of which the micro-batches of a rank are."""
        return micro_batches_multiple(self.layout, pipelined=self.pipelined)

    def short_nll(
        self, model: Sequence[torch.nn.Module], rows_RN: Tensor, documents_D3: Tensor | None = None
    ) -> Tensor | None:
        """Short NLL [R, N-1] fp32 of whole rows, zero where no window scores the target; None before the last
        pipeline stage.

        rows_RN: int64 on the device, the same on every rank of the replica; each is one document. One forward-only
        pipeline pass for all rows.
        """
        assert documents_D3 is None, "windows of packed rows are PackedWindowForward's"
        if not self.windows:
            return (
                torch.zeros(len(rows_RN), self.seq_length - 1, device=rows_RN.device)
                if self.layout.is_last_stage
                else None
            )
        laid_out = lay_out_windows(
            rows_RN,
            self.mine,
            bos_id=self.bos_id,
            length=self.padded_length,
            # whole micro-batches, of the number that the pipeline demands
            multiple=self.scoring_micro_batch * self.micro_batches_multiple,
        )
        shard = SequenceShard.over(self.group, self.padded_length)
        batches = [
            shard_sequences(ids, labels, shard)
            for ids, labels in zip(
                laid_out.ids.split(self.scoring_micro_batch),
                laid_out.labels.split(self.scoring_micro_batch),
                strict=True,
            )
        ]
        nlls = forward_nll(model, batches, self.layout, pipelined=self.pipelined)
        if not nlls:
            return None
        return row_layout(self.layout).sum_(laid_out.put_back(torch.cat(nlls), shard.positions(rows_RN.device)))


def micro_batches_multiple(layout: Layout, *, pipelined: bool) -> int:
    """Of which a rank's micro-batches are: an interleaved pipeline wants as many as it has stages. pipelined: the model
    lies over the run's pipeline."""
    return layout.pp_size if layout.vpp_size and pipelined else 1


def num_window_groups(num_windows: int, cp_size: int) -> int:
    """Sub-groups among which a row's windows are dealt: the largest divisor of cp_size that is at most num_windows.

    >>> [num_window_groups(4, c) for c in (1, 2, 4, 8)]
    [1, 2, 4, 4]
    >>> num_window_groups(3, 8), num_window_groups(20, 8)
    (2, 8)
    """
    return max(size for size in range(1, cp_size + 1) if cp_size % size == 0 and size <= max(1, num_windows))


def padded_window(window: int, share: int, shards: int) -> int:
    """Tokens of a window with its padding, where `share` context-parallel ranks share it and each cuts its part into
    `shards` (sequence parallelism).

    >>> padded_window(100, 1, 1), padded_window(100, 2, 2), padded_window(100, 4, 2)
    (100, 104, 112)
    """
    multiple = (2 * share if share > 1 else 1) * shards
    return -(-window // multiple) * multiple


def deal_windows(windows: Sequence[Window], index: int, num_groups: int) -> tuple[Window, ...]:
    """The windows of sub-group `index`: as even as whole numbers allow, so no one has two more than another."""
    return tuple(windows[index::num_groups])
