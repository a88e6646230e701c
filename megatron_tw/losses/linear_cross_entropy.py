"""Per-token NLL from hidden states and the vocabulary shard, in chunks: the logits of all tokens never exist together.

Forward: one GEMM for each chunk of tokens. Of its logits the maximum, the sum of exponentials and the target logit are
kept, and reduced over the tensor-parallel group once, for all chunks together. Saved: hidden states, log-sum-exp and
labels.
Backward: logits are computed again, only for the rows whose incoming gradient is not zero. So weights that are known
only after the NLL (which they are made from) decide what backward costs: 3 * kappa GEMMs for a share kappa of rows.

Shape suffixes: S tokens of the local sequence, B batch, H hidden size, V true vocabulary entries of this rank.
Rows are dealt with per sequence-parallel shard: G shards (1 without sequence parallel) of L = S * B / G rows each; R
rows of each shard are chosen for backward, C of each make a chunk; M = G * C rows of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_tw.losses.vocab_shard import VocabShard, check_labels, combine_shards, logit_gradient_, shard_statistics

CHUNK_LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # fp32 logits of a default chunk


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each label under softmax(hidden @ weight.T), in natural log.

    Equals Megatron's output layer followed by a vocab-parallel cross-entropy, gradients included: that of `hidden` is
    summed over `tp_group`, that of `weight` is the local shard's, added to Megatron's `main_grad` if `weight` has one.

    Args:
        hidden: [seq, batch, hidden], the same on all ranks of `tp_group`; [seq / tp, batch, hidden] with
            `sequence_parallel`.
        weight: [vocab / tp, hidden], this rank's rows of the output embedding; dtype of `hidden`.
        labels: [seq, batch] int64 of the full local sequence, the same on all ranks of `tp_group`.
        tp_group: the ranks among which the vocabulary is split, in rank order; None: it is not split.
        ignore_index: label of tokens with NLL 0 and no gradient.
        vocab_size: true size of the vocabulary; padding rows beyond it are left out of the softmax. None: no padding.
        chunk_tokens: tokens whose logits exist at a time; None: as many as take CHUNK_LOGITS_BYTES in fp32.

    Returns:
        [seq, batch] fp32 (fp64 for fp64 input), the same on all ranks of `tp_group`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a label out of range.
    """
    shard = VocabShard.of_rank(len(weight), vocab_size, tp_group)
    num_shards = tp_group.size() if sequence_parallel and tp_group is not None else 1
    _check_shapes(hidden, weight, labels, num_shards)
    check_labels(labels, shard.total, ignore_index)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    if not autocast and hidden.dtype != weight.dtype:
        raise ValueError(f"weight: expected the dtype of hidden {hidden.dtype}, got {weight.dtype}")
    if chunk_tokens is None:
        chunk_tokens = CHUNK_LOGITS_BYTES.get(device, 512 << 20) // (4 * max(1, shard.size))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected 1 or more, got {chunk_tokens}")
    layout = _Layout(
        shard=shard,
        tp_group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
        num_shards=num_shards,
        ignore_index=ignore_index,
        chunk_rows=max(1, chunk_tokens // num_shards),
        gemm_dtype=torch.get_autocast_dtype(device) if autocast else hidden.dtype,
    )
    with torch.autocast(device, enabled=False):  # every dtype is chosen below
        nll: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, layout)
    return nll


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What forward and backward must agree about."""

    shard: VocabShard
    tp_group: dist.ProcessGroup | None  # None: the vocabulary is not split
    num_shards: int  # G
    ignore_index: int
    chunk_rows: int  # C
    gemm_dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.gemm_dtype == torch.float64 else torch.float32

    def chunks(self, num_rows: int) -> list[slice]:
        return [slice(start, min(start + self.chunk_rows, num_rows)) for start in range(0, num_rows, self.chunk_rows)]

    def gather(self, rows_CH: Tensor) -> Tensor:
        """Rows of all sequence-parallel shards, [G * C, H]; without sequence parallel, the rows as they are."""
        rows_CH = rows_CH.to(self.gemm_dtype)
        if self.num_shards == 1:
            return rows_CH
        rows_MH = rows_CH.new_empty(self.num_shards * len(rows_CH), rows_CH.shape[1])
        dist.all_gather_into_tensor(rows_MH, rows_CH.contiguous(), group=self.tp_group)
        return rows_MH

    def start_reduce(self, grad_MH: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Sums gradients of a chunk over the vocabulary shards, back to [C, H] of this rank's rows; wait before use."""
        if self.tp_group is None:
            return grad_MH, None
        if self.num_shards == 1:
            return grad_MH, dist.all_reduce(grad_MH, group=self.tp_group, async_op=True)
        grad_CH = grad_MH.new_empty(len(grad_MH) // self.num_shards, grad_MH.shape[1])
        return grad_CH, dist.reduce_scatter_tensor(grad_CH, grad_MH, group=self.tp_group, async_op=True)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels_SB: Tensor, layout: _Layout) -> Tensor:
        shard = layout.shard
        hidden_LH = hidden.flatten(0, 1)
        labels_GL = labels_SB.reshape(layout.num_shards, len(hidden_LH))
        weight_VH = weight[: shard.size].to(layout.gemm_dtype)
        statistics_3GL = torch.zeros((3, *labels_GL.shape), dtype=layout.sum_dtype, device=hidden.device)
        for rows in layout.chunks(len(hidden_LH)):
            hidden_MH = layout.gather(hidden_LH[rows])
            logits_MV, target_M = _chunk_logits(hidden_MH, weight_VH, labels_GL[:, rows].flatten(), layout)
            max_M, sum_M = shard_statistics(logits_MV)
            statistics_3GL[:, :, rows] = torch.stack([max_M, sum_M, target_M]).view(3, layout.num_shards, -1)
        lse_GL, target_GL = combine_shards(statistics_3GL, layout.tp_group)
        ctx.save_for_backward(hidden, weight, labels_GL, lse_GL)
        ctx.layout = layout  # type: ignore[attr-defined]
        # The Parameter itself, for main_grad and Megatron's marks on it: unpacking a saved tensor may give another
        # object.
        ctx.parameter = weight  # type: ignore[attr-defined]
        return torch.where(labels_GL == layout.ignore_index, 0.0, lse_GL - target_GL).view_as(labels_SB)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_SB: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels_GL, lse_GL = ctx.saved_tensors  # type: ignore[attr-defined]
        layout: _Layout = ctx.layout  # type: ignore[attr-defined]
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        shard = layout.shard
        hidden_LH = hidden.flatten(0, 1)
        weight_VH = weight[: shard.size].to(layout.gemm_dtype)
        grad_GL = torch.where(labels_GL == layout.ignore_index, 0.0, grad_SB.reshape(labels_GL.shape).to(lse_GL.dtype))
        index_GR, grad_GR = _choose_rows(grad_GL, layout)
        own_shard = layout.tp_group.rank() if layout.tp_group is not None and layout.num_shards > 1 else 0
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        weight_grad = _WeightGrad(ctx.parameter, shard.size) if wants_weight else None  # type: ignore[attr-defined]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in layout.chunks(index_GR.shape[1]):
                index_GC = index_GR[:, rows]
                own_index_C = index_GC[own_shard]
                hidden_MH = layout.gather(hidden_LH[own_index_C])
                lse_M, labels_M = lse_GL.gather(1, index_GC).flatten(), labels_GL.gather(1, index_GC).flatten()
                logits_MV, _ = _chunk_logits(hidden_MH, weight_VH, labels_M, layout)
                grad_MV = logit_gradient_(logits_MV, lse_M, labels_M, grad_GR[:, rows].flatten(), shard)
                if grad_hidden is not None:
                    grad_MH = grad_MV.to(layout.gemm_dtype) @ weight_VH  # sums over the vocabulary in fp32 or better
                    grad_CH, work = layout.start_reduce(grad_MH)
                if weight_grad is not None:
                    weight_grad.add(grad_MV, hidden_MH)
                if grad_hidden is not None:
                    if work is not None:
                        work.wait()
                    grad_hidden.flatten(0, 1)[own_index_C] = grad_CH.to(hidden.dtype)
        return grad_hidden, None if weight_grad is None else weight_grad.finish(), None, None


def _chunk_logits(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Logits in fp32 or better, and those of the labels (0 where the label is in another shard).

    A GEMM in low precision rounds what it writes. NLL differences of long and short contexts would show that for the
    label's logit, so it is taken again as a dot product in fp32, and put among the logits too: where the label is
    almost certain, its share of the log-sum-exp must cancel against it.
    """
    logits_MV = (hidden_MH @ weight_VH.T).to(layout.sum_dtype)
    if layout.shard.size == 0:
        return logits_MV, logits_MV.new_zeros(len(labels_M))
    index_M, here_M = layout.shard.local(labels_M)
    target_M = logits_MV.gather(1, index_M[:, None])[:, 0]
    if layout.gemm_dtype != layout.sum_dtype:
        exact_M = (hidden_MH.to(layout.sum_dtype) * weight_VH[index_M].to(layout.sum_dtype)).sum(dim=1)
        target_M = torch.where(here_M, exact_M, target_M)
        logits_MV.scatter_(1, index_M[:, None], target_M[:, None])
    return logits_MV, target_M * here_M


def _choose_rows(grad_GL: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Rows with a non-zero gradient: index into each shard and gradient, [G, R] for the R of the fullest shard.

    Shards with fewer are filled up with rows of gradient 0, which add nothing. All tensor-parallel ranks choose the
    same rows, or their collectives would not match.
    """
    chosen_GL = (grad_GL != 0).to(torch.uint8)
    if layout.tp_group is not None:
        dist.all_reduce(chosen_GL, dist.ReduceOp.MAX, group=layout.tp_group)  # rounding to zero could differ by rank
    num_rows = int(chosen_GL.sum(dim=1).max()) if chosen_GL.numel() else 0
    # A stable sort puts the chosen rows first and leaves them in order.
    index_GR = chosen_GL.argsort(dim=1, descending=True, stable=True)[:, :num_rows]
    return index_GR, grad_GL.gather(1, index_GR)


class _WeightGrad:
    """Gradient of the weight shard, summed in fp32 or better; straight into Megatron's `main_grad` if there is one."""

    def __init__(self, weight: Tensor, size: int) -> None:
        self.weight, self.size = weight, size
        # Set by Megatron's DistributedDataParallel. Its FSDP makes main_grad on demand: there, return the gradient.
        main_grad = getattr(weight, "main_grad", None)
        self.has_main_grad = hasattr(weight, "grad_added_to_main_grad") and main_grad is not None
        self.sum_VH: Tensor | None = None
        if self.has_main_grad and main_grad.dtype in (torch.float32, torch.float64):  # type: ignore[union-attr]
            self.sum_VH = main_grad

    def add(self, grad_MV: Tensor, hidden_MH: Tensor) -> None:
        if self.sum_VH is None:
            self.sum_VH = torch.zeros(self.weight.shape, dtype=grad_MV.dtype, device=grad_MV.device)
        rows_VH = self.sum_VH[: self.size]
        rows_VH.addmm_(grad_MV.T.to(rows_VH.dtype), hidden_MH.to(rows_VH.dtype))

    def finish(self) -> Tensor:
        """The gradient for autograd; with `main_grad` a stand-in for Megatron's hooks, as its own layers return."""
        if not self.has_main_grad:
            return torch.zeros_like(self.weight) if self.sum_VH is None else self.sum_VH.to(self.weight.dtype)
        main_grad: Tensor = self.weight.main_grad  # type: ignore[attr-defined]
        if self.sum_VH is not None and self.sum_VH is not main_grad:
            main_grad.add_(self.sum_VH)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Megatron sets zero_out_wgrad on tied embeddings: there the stand-in is added to the embedding's gradient.
        tied = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if tied else torch.empty_like(self.weight)


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, num_shards: int) -> None:
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [seq, batch], got shape {list(labels.shape)}")
    seq, batch = labels.shape
    if seq % num_shards != 0:
        raise ValueError(f"labels: expected a sequence divisible by the tensor-parallel size {num_shards}, got {seq}")
    expected = (seq // num_shards, batch, weight.shape[-1])
    if weight.dim() != 2 or hidden.shape != expected:
        raise ValueError(
            f"hidden: expected {list(expected)} for labels {list(labels.shape)}, weight {list(weight.shape)} and "
            f"{num_shards} sequence-parallel shards, got {list(hidden.shape)}"
        )
