"""Per-token NLL from hidden states and the vocabulary shard, in tiles: the logits of all tokens never exist together.

Forward: tile by tile the logits, of which the maximum, the sum of exponentials and the label's logit are kept, and
reduced over the tensor-parallel group once, for all tokens together. Tokens without a label cost nothing.
Backward: logits are computed again, only for the tokens whose incoming gradient is not zero. So weights that are known
only after the NLL (which they are made from) decide what backward costs: 3 * kappa GEMMs for a share kappa of tokens.
Dense runs may keep the logits of some tokens, and compute them once. docs/loss.md has the whole story.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.losses.chunked_head import ChunkedHead, ChunkedHeadFunction
from megatron_tw.losses.row_exchange import RowExchange
from megatron_tw.losses.vocab_shard import VocabShard, check_labels

# Measured on a CPU: of the sizes that keep a tile in its cache and the GEMMs fast, the smallest. On GPUs: not measured,
# chosen so that a tile fits the L2 cache of an H100 (50 MB) and a chunk's GEMMs do far more than they read.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 4096}
TILE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    batch_first: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    keep_logits_bytes: int = 0,
    chunk_tokens: int | None = None,
    tile_entries: int | None = None,
    top1: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of each label under softmax(hidden @ weight.T + bias), in natural log.

    Equals Megatron's output layer followed by a vocab-parallel cross-entropy, gradients included: that of `hidden` is
    summed over `tp_group`, those of `weight` and `bias` are the local shard's, added to Megatron's `main_grad` where
    they have one.

    Args:
        hidden: [seq, batch, hidden], the same on all ranks of `tp_group`; [seq / tp, batch, hidden] with
            `sequence_parallel`.
        weight: [vocab / tp, hidden], this rank's rows of the output embedding; dtype of `hidden`.
        labels: [seq, batch] int64 of the full local sequence, the same on all ranks of `tp_group`.
        bias: [vocab / tp], this rank's entries of the output bias; dtype of `weight`. None: no bias.
        tp_group: the ranks among which the vocabulary is split, in rank order; None: it is not split.
        batch_first: hidden states are [batch, seq, hidden], labels and NLL [batch, seq]. Nothing is copied for it, but
            for the hidden states of several rows under `sequence_parallel`.
        ignore_index: label of tokens with NLL 0 and no gradient.
        vocab_size: true size of the vocabulary; padding rows beyond it are left out of the softmax. None: no padding.
        z_loss: factor of log(sum(exp(logits)))^2, which is added to the NLL (PaLM, arXiv 2204.02311, section 5).
        keep_logits_bytes: memory in which forward may keep logits for backward, on this rank: those of
            keep_logits_bytes // (vocab / tp * bytes of a number in `hidden`) tokens, the first that have a label.
            Backward then saves one of its three GEMMs for them. For dense weights; with sparse ones most of what is
            kept is for nothing. Under torch.no_grad nothing is kept.
        chunk_tokens: tokens that go through the vocabulary together; None: CHUNK_TOKENS.
        tile_entries: vocabulary entries whose logits exist at a time, for chunk_tokens tokens; None: TILE_BYTES' worth.
        top1: [seq, batch] bool, as `labels`: overwritten by whether the label is the model's first choice: no logit of
            the whole vocabulary is above its (of logits equal within rounding, any may count). False where there is
            no label. None: not asked for, and costs nothing.

    Returns:
        [seq, batch] fp32 (fp64 for fp64 input), as `labels`, the same on all ranks of `tp_group`.

    Raises:
        ValueError: shapes or dtypes that do not fit, numbers out of range, or (on a CPU) a label out of range. On a GPU
            such a label is a device-side assert, which stops the process at its next synchronization.
    """
    shard = VocabShard.of_rank(len(weight), vocab_size, tp_group)
    num_shards = tp_group.size() if sequence_parallel and tp_group is not None else 1
    # Tokens are worked on in the order in which they lie, so that without shards either of the two is as good.
    _check_shapes(hidden, weight, bias, labels, num_shards, seq_dim=1 if batch_first else 0)
    shape, swap = labels.shape, batch_first and num_shards > 1
    if swap:
        hidden, labels = hidden.transpose(0, 1), labels.transpose(0, 1)
    check_labels(labels, shard.total, ignore_index)
    if top1 is not None:
        if top1.dtype != torch.bool or top1.shape != shape:
            raise ValueError(f"top1: expected bool {list(shape)}, as labels, got {top1.dtype} {list(top1.shape)}")
        top1 = top1.transpose(0, 1) if swap else top1
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    if not autocast and hidden.dtype != weight.dtype:
        raise ValueError(f"weight: expected the dtype of hidden {hidden.dtype}, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias: expected the dtype of weight {weight.dtype}, got {bias.dtype}")
    gemm_dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    chunk_tokens = CHUNK_TOKENS.get(device, 4096) if chunk_tokens is None else chunk_tokens
    if tile_entries is None:
        tile_entries = max(1, TILE_BYTES.get(device, 32 << 20) // (max(1, chunk_tokens) * gemm_dtype.itemsize))
    for name, value, least in (
        ("chunk_tokens", chunk_tokens, 1),
        ("tile_entries", tile_entries, 1),
        ("keep_logits_bytes", keep_logits_bytes, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    row_bytes = num_shards * len(weight) * gemm_dtype.itemsize
    head = ChunkedHead(
        shard=shard,
        exchange=RowExchange(
            tp_group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
            num_shards=num_shards,
            dtype=gemm_dtype,
        ),
        ignore_index=ignore_index,
        z_loss=z_loss,
        chunk_rows=max(1, chunk_tokens // num_shards),
        tile_entries=tile_entries,
        kept_rows=keep_logits_bytes // row_bytes if for_backward else 0,
    )
    with torch.autocast(device, enabled=False):  # every dtype is chosen above
        loss: Tensor = ChunkedHeadFunction.apply(hidden, weight, bias, labels, head, top1)
    return loss.transpose(0, 1) if swap else loss


def _check_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_shards: int, *, seq_dim: int
) -> None:
    if labels.dim() != 2:
        raise ValueError(
            f"labels: expected {'[batch, seq]' if seq_dim else '[seq, batch]'}, got shape {list(labels.shape)}"
        )
    expected = [*labels.shape, weight.shape[-1]]
    if expected[seq_dim] % num_shards != 0:
        raise ValueError(
            f"labels: expected a sequence divisible by the tensor-parallel size {num_shards}, got {expected[seq_dim]}"
        )
    expected[seq_dim] //= num_shards
    if weight.dim() != 2 or list(hidden.shape) != expected:
        raise ValueError(
            f"hidden: expected {expected} for labels {list(labels.shape)}, weight {list(weight.shape)} and "
            f"{num_shards} sequence-parallel shards, got {list(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected {list(weight.shape[:1])}, one for each row of weight, got {list(bias.shape)}")
