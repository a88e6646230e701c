"""The autograd function of linear_cross_entropy: output projection and cross-entropy, tile by tile.

A tile is the logits of some tokens for some vocabulary entries, small enough for a cache; a chunk of tokens goes
through the vocabulary tile by tile. So the weight shard and its gradient are read once for each chunk of tokens, and
the elementwise passes do not go to memory.

Shape suffixes: S tokens of the local sequence, B batch or (beside M) vocabulary entries of a tile, H hidden size, V
true vocabulary entries of this rank. Rows are tokens: see row_exchange.py for G, L, R, C and M.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_tw.losses.logit_tiles import tile_operations
from megatron_tw.losses.parameter_gradient import ParameterGradient, add_product_
from megatron_tw.losses.projection import Projection
from megatron_tw.losses.row_exchange import RowExchange, choose_rows
from megatron_tw.losses.vocab_shard import VocabShard, combine_shards


@dataclass(frozen=True, kw_only=True)
class ChunkedHead:
    """What forward and backward must agree about, on all tensor-parallel ranks."""

    shard: VocabShard
    exchange: RowExchange
    ignore_index: int
    z_loss: float
    chunk_rows: int  # C: rows of a shard in a chunk
    tile_entries: int  # B
    kept_rows: int  # rows of a shard whose logits forward keeps

    @property
    def gemm_dtype(self) -> torch.dtype:
        return self.exchange.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.gemm_dtype == torch.float64 else torch.float32

    def chunks(self, index_GR: Tensor) -> list[Tensor]:
        return list(index_GR.split(self.chunk_rows, dim=1)) if index_GR.shape[1] else []

    def blocks(self) -> list[slice]:
        size, step = self.shard.size, self.tile_entries
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@dataclass
class _Chunk:
    """Rows that are worked on together, and what forward kept of their logits, for each block of the vocabulary:
    numerators exp(logit - shift), [M, B], all in one buffer, and shift, [M]. Nothing kept: the logits are made again.
    """

    index_GC: Tensor
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    selected_M: Tensor | None = None  # rows of the kept tiles that are meant; None: all


class ChunkedHeadFunction(torch.autograd.Function):
    """(hidden, weight, bias or None, labels, head, top1 or None) -> loss of each token, [S, B] in head.sum_dtype.

    top1, [S, B] bool, is filled in: whether the token has a label, and no logit of the whole vocabulary is above its.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels_SB: Tensor,
        head: ChunkedHead,
        top1_SB: Tensor | None,
    ) -> Tensor:
        hidden_LH = hidden.flatten(0, 1)
        labels_GL = labels_SB.reshape(head.exchange.num_shards, len(hidden_LH))
        projection = Projection.of_shard(weight, bias, size=head.shard.size, dtype=head.gemm_dtype)
        labelled_GL = labels_GL != head.ignore_index
        index_GR = choose_rows(labelled_GL)
        kept_chunks = [_Chunk(index_GC) for index_GC in head.chunks(index_GR[:, : head.kept_rows])]
        chunks = kept_chunks + [_Chunk(index_GC) for index_GC in head.chunks(index_GR[:, head.kept_rows :])]
        gathered = head.exchange.gather_chunks(hidden_LH, [chunk.index_GC for chunk in chunks])
        statistics_3GC = [
            _forward_chunk(chunk, position < len(kept_chunks), hidden_MH, projection, labels_GL, head)
            for position, (chunk, hidden_MH) in enumerate(zip(chunks, gathered, strict=True))
        ]
        # Rows without a label: a log-sum-exp of +inf makes their softmax 0, whatever their logits.
        lse_GL = torch.full(labels_GL.shape, torch.inf, dtype=head.sum_dtype, device=hidden.device)
        target_GL = torch.zeros_like(lse_GL)
        if top1_SB is not None:
            top1_SB.fill_(False)
        if statistics_3GC:
            lse_GR, target_GR, max_GR = combine_shards(torch.cat(statistics_3GC, dim=2), head.exchange.tp_group)
            lse_GL.scatter_(1, index_GR, lse_GR).masked_fill_(~labelled_GL, torch.inf)
            target_GL.scatter_(1, index_GR, target_GR)
            if top1_SB is not None:
                top1_GL = torch.zeros_like(labelled_GL).scatter_(1, index_GR, target_GR >= max_GR)
                top1_SB.copy_((top1_GL & labelled_GL).view_as(labels_SB))
        ctx.save_for_backward(hidden, weight, bias, labels_GL, lse_GL, target_GL)  # type: ignore[arg-type]
        ctx.head, ctx.kept_chunks = head, kept_chunks  # type: ignore[attr-defined]
        # The Parameters themselves, for main_grad and Megatron's marks on it: unpacking a saved tensor may give another
        # object.
        ctx.parameters = weight, bias  # type: ignore[attr-defined]
        loss_GL = lse_GL - target_GL
        if head.z_loss:
            loss_GL += head.z_loss * lse_GL**2
        return loss_GL.masked_fill_(~labelled_GL, 0.0).view_as(labels_SB)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_SB: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels_GL, lse_GL, target_GL = ctx.saved_tensors  # type: ignore[attr-defined]
        head: ChunkedHead = ctx.head  # type: ignore[attr-defined]
        wants_hidden, *wants_parameters = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        projection = Projection.of_shard(weight, bias, size=head.shard.size, dtype=head.gemm_dtype)
        grad_GL = grad_SB.reshape(labels_GL.shape).to(head.sum_dtype).masked_fill(labels_GL == head.ignore_index, 0.0)
        # Kept logits are overwritten: a second backward through this node makes them again.
        kept_chunks, ctx.kept_chunks = ctx.kept_chunks, []  # type: ignore[attr-defined]
        chunks = _chosen_chunks(grad_GL, kept_chunks, head)
        softmax_scale_GL = grad_GL
        if head.z_loss:  # a row without gradient may have an infinite log-sum-exp
            softmax_scale_GL = torch.where(grad_GL == 0, 0.0, grad_GL * (1 + 2 * head.z_loss * lse_GL))
        rows_GL = (labels_GL, target_GL, lse_GL, softmax_scale_GL, grad_GL)
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        weight_gradient, bias_gradient = (
            ParameterGradient(parameter, head.sum_dtype) if wanted else None
            for parameter, wanted in zip(ctx.parameters, wants_parameters, strict=True)  # type: ignore[attr-defined]
        )
        own_shard = head.exchange.own_shard
        reducing: tuple[Tensor, Tensor, dist.Work | None] | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            gathered = head.exchange.gather_chunks(hidden.flatten(0, 1), [chunk.index_GC for chunk in chunks])
            for chunk, hidden_MH in zip(chunks, gathered, strict=True):
                rows_M = [tensor_GL.gather(1, chunk.index_GC).flatten() for tensor_GL in rows_GL]
                for scale_GL in (softmax_scale_GL, grad_GL):  # once for each row: it may fill up a later chunk
                    scale_GL.scatter_(1, chunk.index_GC, 0.0)
                grad_MH = _backward_chunk(
                    chunk, rows_M, hidden_MH, projection, weight_gradient, bias_gradient, wants_hidden, head
                )
                if grad_hidden is None:
                    continue
                _finish_reduce(reducing, grad_hidden)  # the chunk before this one: its reduction had a chunk's time
                grad_CH, work = head.exchange.start_reduce(grad_MH.to(head.gemm_dtype))
                reducing = chunk.index_GC[own_shard], grad_CH, work
            _finish_reduce(reducing, grad_hidden)
        parameter_grads = [
            None if gradient is None else gradient.finish() for gradient in (weight_gradient, bias_gradient)
        ]
        return grad_hidden, *parameter_grads, None, None, None


def _forward_chunk(
    chunk: _Chunk, keep: bool, hidden_MH: Tensor, projection: Projection, labels_GL: Tensor, head: ChunkedHead
) -> Tensor:
    """Maximum, sum of exp(logit - maximum) and label's logit of a chunk over this vocabulary shard, [3, G, C]."""
    operations = tile_operations(hidden_MH.device, head.sum_dtype)
    label_M, here_M = head.shard.local(labels_GL.gather(1, chunk.index_GC).flatten())
    target_M = projection.label_logits(hidden_MH, label_M, head.sum_dtype) * here_M
    label_M = torch.where(here_M, label_M, -1)
    max_M, sum_M = torch.full_like(target_M, -torch.inf), torch.zeros_like(target_M)
    for block, tile_MB, _ in _logit_tiles(hidden_MH, projection, head, keep=keep):
        operations.add_statistics_(tile_MB, label_M - block.start, target_M, max_M, sum_M, keep=keep)
        if keep:
            chunk.kept.append((tile_MB, max_M.clone()))
    return torch.stack([max_M, sum_M, target_M]).view(3, *chunk.index_GC.shape)


def _backward_chunk(
    chunk: _Chunk,
    rows_M: list[Tensor],
    hidden_MH: Tensor,
    projection: Projection,
    weight_gradient: ParameterGradient | None,
    bias_gradient: ParameterGradient | None,
    wants_hidden: bool,
    head: ChunkedHead,
) -> Tensor:
    """Adds to the gradients of weight and bias; returns that of the hidden states from this shard, [M, H]."""
    operations = tile_operations(hidden_MH.device, head.sum_dtype)
    labels_M, target_M, lse_M, softmax_scale_M, label_scale_M = rows_M
    label_M, here_M = head.shard.local(labels_M)
    label_M = torch.where(here_M, label_M, -1)
    grad_MH = torch.zeros_like(hidden_MH, dtype=head.sum_dtype)
    tiles = _kept_tiles(chunk, head) if chunk.kept else _logit_tiles(hidden_MH, projection, head)
    for block, tile_MB, shift_M in tiles:
        operations.logit_gradient_(
            tile_MB, label_M - block.start, target_M, lse_M, softmax_scale_M, label_scale_M, shift_M
        )
        if wants_hidden:
            add_product_(grad_MH, tile_MB, projection.weight_VH[block])
        if weight_gradient is not None:
            add_product_(weight_gradient.entries(block), tile_MB.T, hidden_MH)
        if bias_gradient is not None:
            bias_gradient.entries(block).add_(tile_MB.sum(dim=0, dtype=head.sum_dtype))
    return grad_MH


def _logit_tiles(
    hidden_MH: Tensor, projection: Projection, head: ChunkedHead, *, keep: bool = False
) -> Iterator[tuple[slice, Tensor, None]]:
    """The blocks of the vocabulary and their logits: in one buffer one over the other, or with `keep` side by side."""
    num_rows, blocks = len(hidden_MH), head.blocks()
    widest = blocks[0].stop if blocks else 0
    buffer = hidden_MH.new_empty(num_rows * (head.shard.size if keep else widest))
    for block in blocks:
        start, width = num_rows * block.start if keep else 0, block.stop - block.start
        tile_MB = buffer[start : start + num_rows * width].view(num_rows, width)
        projection.logits_(hidden_MH, block, tile_MB)
        yield block, tile_MB, None


def _kept_tiles(chunk: _Chunk, head: ChunkedHead) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The blocks of the vocabulary, the numerators kept of them and their shift. After the last one all are freed."""
    for block, (tile_MB, shift_M) in zip(head.blocks(), chunk.kept, strict=True):
        if chunk.selected_M is None:
            yield block, tile_MB, shift_M
        else:
            yield block, tile_MB[chunk.selected_M], shift_M[chunk.selected_M]
    chunk.kept.clear()


def _chosen_chunks(grad_GL: Tensor, kept_chunks: list[_Chunk], head: ChunkedHead) -> list[_Chunk]:
    """Chunks of the rows with a gradient: first those whose logits were kept, then the others."""
    chosen_GL = head.exchange.agree(grad_GL != 0)
    chunks = []
    for chunk in kept_chunks:
        index_GD = choose_rows(chosen_GL.gather(1, chunk.index_GC))
        num_rows, num_chosen = chunk.index_GC.shape[1], index_GD.shape[1]
        if 0 < num_chosen < num_rows:
            shard_start_G1 = torch.arange(len(index_GD), device=index_GD.device)[:, None] * num_rows
            chunk.selected_M = (shard_start_G1 + index_GD).flatten()
        if num_chosen > 0:
            chunk.index_GC = chunk.index_GC.gather(1, index_GD)
            chunks.append(chunk)
    for chunk in kept_chunks:
        chosen_GL = chosen_GL.scatter(1, chunk.index_GC, False)
    return chunks + [_Chunk(index_GC) for index_GC in head.chunks(choose_rows(chosen_GL))]


def _finish_reduce(reducing: tuple[Tensor, Tensor, dist.Work | None] | None, grad_hidden: Tensor | None) -> None:
    if reducing is None or grad_hidden is None:
        return
    own_index_C, grad_CH, work = reducing
    if work is not None:
        work.wait()
    # Added, because rows that only fill a chunk up are in other chunks too.
    grad_hidden.flatten(0, 1).index_add_(0, own_index_C, grad_CH.to(grad_hidden.dtype))
