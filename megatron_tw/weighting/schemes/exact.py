"""EXACT (arXiv 2605.10544): weights from the length of a target's context alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_tw.weighting.schemes.base import Scheme, Targets, check_number
from megatron_tw.weighting.schemes.registry import register_scheme


@register_scheme("exact")
@dataclass(frozen=True, kw_only=True)
class ExactConfig(Scheme):
    """Targets are put in log2 buckets of their context (tokens since the start of their document).

    In the tail, which is the buckets that start at `tau` or more, a bucket with the share q_b of the row's tail targets
    gets the weight 1 + alpha * r_b / sum_j(q_j * r_j) with r_b = (q_b + eps)^-gamma; other targets get 1. The mean
    weight of the tail is 1 + alpha. No scorer is needed.
    """

    alpha: float = 0.15
    """Mean extra weight of a tail target, >= 0."""
    gamma: float = 0.5
    """How much rare lengths are favoured; 0 weighs the whole tail alike."""
    tau: float = 1024
    """Least context in tokens of the tail; published: 1024, 2048, 4096 for rows of 4096, 8192, 16384 tokens."""
    eps: float = 1e-8
    """Added to a share before the power."""

    by_document: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, at_least=0.0, optional=False)
        check_number("gamma", self.gamma, optional=False)
        check_number("tau", self.tau, at_least=1.0, optional=False)
        check_number("eps", self.eps, at_least=0.0, optional=False)

    def uniform_limit(self) -> "ExactConfig":
        return replace(self, alpha=0.0)

    def check_rows(self, seq_length: int) -> None:
        if self.tau >= seq_length:
            raise ValueError(f"`tau`: expected less than the {seq_length} tokens of a row, got {self.tau:g}")

    def weights(self, targets: Targets) -> Tensor:
        valid_RT, document_starts_RT = targets.valid_RT, targets.document_starts_RT
        positions_T = torch.arange(1, valid_RT.shape[1] + 1, device=valid_RT.device)
        context_RT = (positions_T - (0 if document_starts_RT is None else document_starts_RT)).expand_as(valid_RT)
        # frexp is exact: context = m * 2^e with 0.5 <= m < 1, so floor(log2(context)) = e - 1; a context of 0 is far
        # below tau.
        buckets_RT = (torch.frexp(context_RT.double()).exponent - 1).clamp(min=0).long()
        in_tail_RT = valid_RT & (context_RT > 0) & (2.0 ** buckets_RT.double() >= self.tau)
        tail_R1 = in_tail_RT.sum(dim=1, keepdim=True).clamp(min=1)
        num_buckets = valid_RT.shape[1].bit_length()
        counts_RB = torch.zeros(len(valid_RT), num_buckets, dtype=torch.float64, device=valid_RT.device)
        counts_RB.scatter_add_(1, buckets_RT, in_tail_RT.double())
        shares_RB = counts_RB / tail_R1
        rarity_RB = torch.where(counts_RB > 0, (shares_RB + self.eps) ** -self.gamma, 0.0)
        mean_R1 = (shares_RB * rarity_RB).sum(dim=1, keepdim=True)
        extra_RB = torch.where(mean_R1 > 0, self.alpha * rarity_RB / mean_R1, 0.0)
        return 1.0 + torch.where(in_tail_RT, extra_RB.gather(1, buckets_RT), 0.0)
