"""The short-window forward of packed rows.

R = rows, N = tokens of a row, D = documents, L = tokens of a bin.

The windows of a document are those of a row of its length; of a document shorter than a window there is only window 0,
which is all of it. Windows go into bins of one fixed length, in which they are the documents of a packed sequence: one
of full length fills a bin, shorter ones share one. Whole bins are dealt out to the context-parallel ranks, so attention
stays on a rank, and sequences have the same shape however the documents fall.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_tw.data.rows_format import RowsHeader
from megatron_tw.model.forward import (
    ShortWindowForward,
    forward_nll,
    micro_batches_multiple,
    padded_window,
    row_layout,
    shard_sequences,
)
from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.short_windows import IGNORED
from megatron_tw.parallel.layout import Layout
from megatron_tw.weighting import Window, plan_windows

OPEN_BINS = 64


class DocumentWindow(NamedTuple):
    """A window of one document. Positions are those of all rows, one after the other.

    start, length, first_target, last_target: as of `Window`. document: where its document begins.
    """

    start: int
    length: int
    first_target: int
    last_target: int
    document: int


@dataclass(frozen=True, kw_only=True)
class PackedWindowForward:
    """The short-window forward of one run on packed rows; see `ShortWindowForward` for what is alike.

    window, stride, include_first: see `plan_windows`. bin_length: L. bins_at_once: bins of one forward pass.
    loss_shards: parts into which sequence parallelism cuts a sequence.
    """

    seq_length: int
    window: int
    stride: int
    include_first: bool
    bin_length: int
    bins_at_once: int
    loss_shards: int
    bos_id: int | None
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
    ) -> "PackedWindowForward":
        """scoring_micro_batch: bins of one forward pass; None: as many as are at most this rank's part of a row."""
        shards = layout.tp_size if sequence_parallel else 1
        length = padded_window(window, 1, shards)
        return PackedWindowForward(
            seq_length=seq_length,
            window=window,
            stride=stride,
            include_first=include_first,
            bin_length=length,
            bins_at_once=scoring_micro_batch or max(1, seq_length // layout.cp_size // length),
            loss_shards=shards,
            bos_id=bos_id,
            layout=layout,
            pipelined=pipelined,
        )

    def bins(self, documents_D3: Tensor) -> list[list[DocumentWindow]]:
        """All windows of these documents (see `Batch.documents`) in bins, in order."""
        windows = []
        for row, start, tokens in documents_D3.tolist():
            first = row * self.seq_length + start
            for place, length, target, last in self._windows_of(tokens):
                windows.append(DocumentWindow(first + place, length, first + target, first + last, first))
        return in_bins(windows, self.bin_length)

    def _windows_of(self, tokens: int) -> tuple[Window, ...]:
        return document_windows(tokens, self.window, self.stride, include_first=self.include_first)

    def batches_of(self, num_bins: int) -> int:
        """Forward passes of a rank with so many bins: at least one, and as many as an interleaved pipeline takes."""
        multiple = micro_batches_multiple(self.layout, pipelined=self.pipelined)
        return -(-max(1, -(-num_bins // self.bins_at_once)) // multiple) * multiple

    def short_nll(
        self, model: Sequence[torch.nn.Module], rows_RN: Tensor, documents_D3: Tensor | None = None
    ) -> Tensor | None:
        """Short NLL [R, N-1] fp32 of packed rows, zero where no window scores the target; None before the last pipeline
        stage.

        rows_RN: int64 on the device, the same on every rank of the replica. One forward-only pipeline pass for all
        rows.
        """
        assert documents_D3 is not None, "rows of one document are ShortWindowForward's"
        mine = self.bins(documents_D3)[self.layout.cp_rank :: self.layout.cp_size]
        laid_out = lay_out_bins(mine, self.bin_length, self.batches_of(len(mine)) * self.bins_at_once)
        ids_L, labels_L = laid_out.ids_and_labels(rows_RN.flatten(), self.bos_id)
        batches, size = [], self.bins_at_once * self.bin_length
        for first in range(0, len(ids_L), size):
            lengths = laid_out.lengths(first, first + size)
            shard = SequenceShard.of_documents(None, lengths, rows_RN.device)
            batches.append(
                shard_sequences(ids_L[None, first : first + size], labels_L[None, first : first + size], shard)
            )
        nlls = forward_nll(model, batches, self.layout, pipelined=self.pipelined)
        if not nlls:
            return None
        short_RN = rows_RN.new_zeros(rows_RN.shape, dtype=torch.float32)
        place_K, position_K = laid_out.scored_on(rows_RN.device)
        short_RN.view(-1)[position_K] = torch.cat(nlls, dim=1)[0, place_K]
        return row_layout(self.layout).sum_(short_RN[:, 1:].contiguous())


WindowForward = ShortWindowForward | PackedWindowForward


def window_forward(rows: RowsHeader, window: int, stride: int, **how: Any) -> WindowForward:
    """The short-window forward of rows with this header; `how`: see `ShortWindowForward.create`. Collective over the
    world."""
    kind = ShortWindowForward if rows.packing is None else PackedWindowForward
    return kind.create(rows.seq_length, window, stride, **how)


def document_windows(tokens: int, window: int, stride: int, *, include_first: bool) -> tuple[Window, ...]:
    """The windows of a document of `tokens` tokens.

    >>> document_windows(9, 8, 4, include_first=False)
    (Window(start=1, length=8, first_target=8, last_target=8),)
    >>> document_windows(5, 8, 4, include_first=True), document_windows(5, 8, 4, include_first=False)
    ((Window(start=0, length=5, first_target=1, last_target=4),), ())
    """
    if tokens >= window:
        return plan_windows(tokens, window, stride, include_first=include_first)
    return (Window(0, tokens, 1, tokens - 1),) if include_first and tokens > 1 else ()


def in_bins(windows: Iterable[DocumentWindow], length: int) -> list[list[DocumentWindow]]:
    """Windows into bins of `length` tokens, each into the first of the open ones that has room for it."""
    bins: list[list[DocumentWindow]] = []
    open_bins: list[tuple[int, int]] = []  # index, room
    for window in windows:
        place = next((i for i, (_, room) in enumerate(open_bins) if room >= window.length), None)
        if place is None:
            bins.append([window])
            left = length - window.length
            if left > 1:  # a window has two tokens
                open_bins = [*open_bins[-OPEN_BINS + 1 :], (len(bins) - 1, left)]
        else:
            index, room = open_bins[place]
            bins[index].append(window)
            open_bins[place] = index, room - window.length
    return bins


@dataclass(frozen=True)
class _LaidOut:
    """A rank's bins, one after the other; numbers of each of their tokens, on the CPU.

    position: of the token among those of all rows, -1 where bins are filled up. scored: whether the next token's NLL is
    wanted. starts: where the windows begin, and what fills up empty bins. documents: where the documents of the windows
    that do not begin with them do (position), by the place of the window's first token.
    """

    position: np.ndarray
    scored: np.ndarray
    starts: np.ndarray
    windows: np.ndarray
    documents: np.ndarray

    def ids_and_labels(self, rows_P: Tensor, bos_id: int | None) -> tuple[Tensor, Tensor]:
        device = rows_P.device
        position_L, scored_L = (torch.from_numpy(x).to(device) for x in (self.position, self.scored))
        ids_L = torch.where(position_L >= 0, rows_P[position_L.clamp(min=0)], 0)
        if bos_id is not None:
            windows_W, documents_W = (torch.from_numpy(x).to(device) for x in (self.windows, self.documents))
            ids_L[windows_W] = torch.where(rows_P[documents_W] == bos_id, bos_id, ids_L[windows_W])
        # The last token of all rows is never scored, so the clamp changes nothing.
        labels_L = torch.where(scored_L, rows_P[(position_L + 1).clamp(max=len(rows_P) - 1)], IGNORED)
        return ids_L, labels_L

    def lengths(self, first: int, end: int) -> list[int]:
        """Of the windows of a stretch of whole bins, with what fills up."""
        starts = self.starts[(self.starts >= first) & (self.starts < end)]
        return np.diff([*starts.tolist(), end]).tolist()

    def scored_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places of the scored tokens, and the positions of their targets."""
        place_K = np.flatnonzero(self.scored)
        return torch.from_numpy(place_K).to(device), torch.from_numpy(self.position[place_K] + 1).to(device)


def lay_out_bins(bins: Sequence[Sequence[DocumentWindow]], length: int, num_bins: int) -> _LaidOut:
    """These bins, and empty ones up to `num_bins`."""
    position = np.full(num_bins * length, -1, dtype=np.int64)
    scored = np.zeros(num_bins * length, dtype=bool)
    starts, windows, documents = [], [], []
    for index in range(num_bins):
        place = index * length
        if index >= len(bins):
            starts.append(place)
            continue
        for window in bins[index]:
            position[place : place + window.length] = np.arange(window.start, window.start + window.length)
            shift = place - window.start - 1  # the token before a target predicts it
            scored[window.first_target + shift : window.last_target + 1 + shift] = True
            starts.append(place)
            windows.append(place)
            documents.append(window.document)
            place += window.length
    return _LaidOut(position, scored, *(np.array(x, dtype=np.int64) for x in (starts, windows, documents)))
