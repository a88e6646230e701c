"""Per-token NLL from hidden states or logits, with the vocabulary split over a tensor-parallel group."""

from megatron_tw.losses.linear_cross_entropy import linear_cross_entropy
from megatron_tw.losses.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

__all__ = ["linear_cross_entropy", "vocab_parallel_cross_entropy"]
