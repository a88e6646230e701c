"""This rank's share of the vocabulary, and the statistics of its logits that make an NLL once all shares are together.

Shape suffixes: T tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Entries [start, start + size) of a vocabulary of `total`. Padding beyond the true vocabulary is in no shard."""

    start: int
    size: int
    total: int

    @staticmethod
    def of_rank(num_rows: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard of a rank that holds `num_rows` rows of the padded vocabulary; `vocab_size` is the true one."""
        tp_rank, tp_size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        padded = num_rows * tp_size
        total = padded if vocab_size is None else vocab_size
        if not 1 <= total <= padded:
            raise ValueError(f"vocab_size: expected 1 to {padded} (rows of all {tp_size} shards), got {vocab_size}")
        start = num_rows * tp_rank
        return VocabShard(start=start, size=min(max(total - start, 0), num_rows), total=total)

    def local(self, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Index into this shard (0 where the label is elsewhere), and whether the label is here."""
        here_T = (labels_T >= self.start) & (labels_T < self.start + self.size)
        return torch.where(here_T, labels_T - self.start, 0), here_T


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Refuses labels that are neither `ignore_index` nor in the vocabulary.

    On a GPU this is a device-side assert, so that nothing waits.

    Raises:
        ValueError: labels that are not int64 or (on a CPU) out of range.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}")
    good = ((labels >= 0) & (labels < vocab_size)) | (labels == ignore_index)
    if labels.is_cuda:
        torch._assert_async(good.all(), f"labels: expected 0 to {vocab_size - 1}, or {ignore_index} to ignore")
    elif not good.all():
        first = labels[~good][0].item()
        raise ValueError(f"labels: expected 0 to {vocab_size - 1}, or {ignore_index} to ignore, got {first}")


def combine_shards(statistics_3T: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the softmax's denominator, the label's logit, and the largest logit, over all shards. One MAX and one SUM
    all-reduce.

    Args:
        statistics_3T: of this shard's logits the maximum, the sum of exp(logit - maximum), and the label's logit, which
            is 0 where the label is in another shard. T stands for any shape.
    """
    max_T, sum_T, target_T = statistics_3T
    if tp_group is None or tp_group.size() == 1:
        return max_T + sum_T.log(), target_T, max_T
    total_max_T = max_T.clone()
    dist.all_reduce(total_max_T, dist.ReduceOp.MAX, group=tp_group)  # the same shift on all shards
    sums_2T = torch.stack([sum_T * (max_T - total_max_T).exp(), target_T])
    dist.all_reduce(sums_2T, group=tp_group)  # denominator, and the logit that one shard alone has
    return total_max_T + sums_2T[0].log(), sums_2T[1], total_max_T
