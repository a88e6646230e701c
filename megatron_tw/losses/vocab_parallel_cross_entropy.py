"""Per-token NLL from logits that exist already. Whoever has hidden states uses linear_cross_entropy.

Shape suffixes: S tokens of the local sequence, B batch, T = S * B, V entries of this rank's vocabulary shard.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_tw.losses.logit_tiles import tile_operations
from megatron_tw.losses.vocab_shard import VocabShard, check_labels, combine_shards

CHUNK_ELEMENTS = 1 << 24  # logits that are worked on at a time: 64 MiB of fp32


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each label, in natural log.

    Args:
        logits: [seq, batch, vocab / tp], this rank's shard of the vocabulary; not changed.
        labels: [seq, batch] int64 in the whole vocabulary.
        tp_group: the ranks among which the vocabulary is split, in rank order; None: it is not split.
        ignore_index: label of tokens with NLL 0 and no gradient.
        vocab_size: true size of the vocabulary; padding beyond it is left out of the softmax. None: no padding.

    Returns:
        [seq, batch] fp32 (fp64 for fp64 logits), the same on all ranks of `tp_group`.

    Raises:
        ValueError: shapes that do not fit, or a label out of range.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits: expected [seq, batch, vocab / tp] for labels {list(labels.shape)}, got {list(logits.shape)}"
        )
    shard = VocabShard.of_rank(logits.shape[2], vocab_size, tp_group)
    check_labels(labels, shard.total, ignore_index)
    nll: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, shard, tp_group, ignore_index)
    return nll


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits_SBV: Tensor,
        labels_SB: Tensor,
        shard: VocabShard,
        tp_group: dist.ProcessGroup | None,
        ignore_index: int,
    ) -> Tensor:
        logits_TV, labels_T = logits_SBV.flatten(0, 1)[:, : shard.size], labels_SB.flatten()
        dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
        operations = tile_operations(logits_TV.device, dtype)
        statistics_3T = logits_TV.new_zeros(3, len(labels_T), dtype=dtype)
        max_T, sum_T, target_T = statistics_3T
        max_T.fill_(-torch.inf)
        for rows in _row_chunks(logits_TV):
            chunk_TV = logits_TV[rows].to(dtype, copy=True)
            label_T, here_T = shard.local(labels_T[rows])
            target_T[rows] = chunk_TV.gather(1, label_T[:, None])[:, 0] * here_T
            label_T = torch.where(here_T, label_T, -1)
            operations.add_statistics_(chunk_TV, label_T, target_T[rows], max_T[rows], sum_T[rows], keep=False)
        lse_T, target_T, _ = combine_shards(statistics_3T, tp_group)
        ctx.save_for_backward(logits_SBV, labels_SB, lse_T, target_T)
        ctx.shard, ctx.ignore_index = shard, ignore_index  # type: ignore[attr-defined]
        return torch.where(labels_T == ignore_index, 0.0, lse_T - target_T).view_as(labels_SB)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_SB: Tensor) -> tuple[Tensor | None, ...]:
        logits_SBV, labels_SB, lse_T, target_T = ctx.saved_tensors  # type: ignore[attr-defined]
        shard: VocabShard = ctx.shard  # type: ignore[attr-defined]
        labels_T = labels_SB.flatten()
        grad_T = torch.where(labels_T == ctx.ignore_index, 0.0, grad_SB.flatten().to(lse_T.dtype))  # type: ignore[attr-defined]
        grad_SBV = torch.zeros_like(logits_SBV, memory_format=torch.contiguous_format)
        logits_TV, grad_TV = logits_SBV.flatten(0, 1)[:, : shard.size], grad_SBV.flatten(0, 1)[:, : shard.size]
        operations = tile_operations(logits_TV.device, lse_T.dtype)
        for rows in _row_chunks(logits_TV):
            chunk_TV = logits_TV[rows].to(lse_T.dtype, copy=True)
            label_T, here_T = shard.local(labels_T[rows])
            label_T = torch.where(here_T, label_T, -1)
            scale_T = grad_T[rows]
            operations.logit_gradient_(chunk_TV, label_T, target_T[rows], lse_T[rows], scale_T, scale_T, None)
            grad_TV[rows] = chunk_TV.to(grad_TV.dtype)
        return grad_SBV, None, None, None, None


def _row_chunks(logits_TV: Tensor) -> list[slice]:
    num_rows, width = logits_TV.shape
    if width == 0:  # a shard of padding only
        return []
    step = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
