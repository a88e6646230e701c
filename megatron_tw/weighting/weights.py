"""From NLLs to weights: pure functions on whole rows. Target j of a row predicts the token at position j + 1.

Shape suffixes: R rows, T targets of a row (a row of N tokens has N - 1).
"""

import math

import torch
from torch import Tensor

from megatron_tw.weighting.config import ExactConfig, Weighting, WeightingConfig, parse_transform
from megatron_tw.weighting.ties import top_targets

QUOTIENT_EPS = 1e-5


@torch.no_grad()
def token_weights(
    long_nll: Tensor,
    short_nll: Tensor | None,
    config: Weighting,
    *,
    valid: Tensor | None = None,
    row_ids: Tensor | None = None,
    seed: int = 0,
    document_starts: Tensor | None = None,
) -> Tensor:
    """Weights of all targets of whole rows, as `config` says. A row's weights depend on that row alone.

    Masked targets get 0 and do not count in a row's length, normalization, top kappa or buckets; a row without a valid
    target gets zeros. Under `l1` a row of zero scores gets uniform weights. Scores are worked on in fp64.

    Args:
        long_nll: [rows, targets] NLL (natural log) of the model in training; no gradient is followed.
        short_nll: the scorer's, same shape; None for schemes that need no scorer.
        valid: [rows, targets] bool or 0/1; None: all are.
        row_ids: [rows] int64, a name of each row that does not depend on the layout, to break ties; None: 0, 1, ...
        seed: of the tie-break.
        document_starts: [rows, targets] int64, the position in the row where the document of each target's token begins
            (exact only); None: every row is one document.

    Returns:
        [rows, targets] fp32, detached.

    Raises:
        ValueError: shapes differ, or `short_nll` is missing.
    """
    _check_shapes(long_nll, short_nll=short_nll, valid=valid, document_starts=document_starts)
    valid_RT = torch.ones_like(long_nll, dtype=torch.bool) if valid is None else valid.bool()
    if isinstance(config, ExactConfig):
        weights_RT = _exact_weights(valid_RT, config, document_starts)
    elif not config.needs_scorer:
        weights_RT = torch.ones_like(long_nll)
    elif short_nll is None:
        raise ValueError("--weighting: this scheme compares two NLLs; expected short_nll, got None. Choose a --scorer")
    else:
        # Whatever stands at masked targets, NaN included, must not reach a sum.
        long_RT = torch.where(valid_RT, long_nll.double(), 0.0)
        short_RT = torch.where(valid_RT, short_nll.double(), 0.0)
        scores_RT = _scores(long_RT, short_RT, config)
        weights_RT = _weights_from_scores(scores_RT, valid_RT, config, row_ids, seed)
    return torch.where(valid_RT, weights_RT, 0.0).float()


def _scores(long_RT: Tensor, short_RT: Tensor, config: WeightingConfig) -> Tensor:
    if config.comparison == "difference":
        scores_RT = long_RT - short_RT
    else:
        scores_RT = (long_RT + QUOTIENT_EPS) / (short_RT + QUOTIENT_EPS)
    for name, amount in map(parse_transform, config.transforms):
        match name:
            case "minus":
                scores_RT = -scores_RT
            case "absolute":
                scores_RT = scores_RT.abs()
            case "exp":
                scores_RT = scores_RT.exp()
            case "max":
                scores_RT = scores_RT.clamp(min=0.0)
            case "shift":
                scores_RT = scores_RT - math.log(amount)
            case _:
                raise AssertionError(name)
    return scores_RT if config.truncation is None else scores_RT.clamp(max=config.truncation)


def _weights_from_scores(
    scores_RT: Tensor, valid_RT: Tensor, config: WeightingConfig, row_ids: Tensor | None, seed: int
) -> Tensor:
    lengths_R = valid_RT.sum(dim=1)
    if config.sparsification is not None:
        if row_ids is None:
            row_ids = torch.arange(len(scores_RT), device=scores_RT.device)
        row_ids_R = row_ids.to(device=scores_RT.device, dtype=torch.int64)
        # In fp64, as Python's int(kappa * L): in fp32 0.2 * 255 may come out below 51.
        counts_R = (config.sparsification * lengths_R.double()).long().clamp(min=1).minimum(lengths_R)
        scores_RT = top_targets(scores_RT, counts_R, valid_RT, row_ids_R, seed).double()
    if config.normalization == "l1":
        sums_R1 = torch.where(valid_RT, scores_RT.abs(), 0.0).sum(dim=1, keepdim=True)
        scores_RT = torch.where(sums_R1 > 0, scores_RT * (lengths_R[:, None] / sums_R1), 1.0)
    elif config.normalization == "softmax":
        scores_RT = scores_RT.masked_fill(~valid_RT, -torch.inf).softmax(dim=1) * lengths_R[:, None]
    if config.interpolation is not None:
        scores_RT = config.interpolation + (1.0 - config.interpolation) * scores_RT
    return scores_RT


def _exact_weights(valid_RT: Tensor, config: ExactConfig, document_starts: Tensor | None) -> Tensor:
    positions_T = torch.arange(1, valid_RT.shape[1] + 1, device=valid_RT.device)
    context_RT = (positions_T - (0 if document_starts is None else document_starts)).expand_as(valid_RT)
    # frexp is exact: context = m * 2^e with 0.5 <= m < 1, so floor(log2(context)) = e - 1; a context of 0 is far below
    # tau.
    buckets_RT = (torch.frexp(context_RT.double()).exponent - 1).clamp(min=0).long()
    in_tail_RT = valid_RT & (context_RT > 0) & (2.0 ** buckets_RT.double() >= config.tau)
    tail_R1 = in_tail_RT.sum(dim=1, keepdim=True).clamp(min=1)
    num_buckets = valid_RT.shape[1].bit_length()
    counts_RB = torch.zeros(len(valid_RT), num_buckets, dtype=torch.float64, device=valid_RT.device)
    counts_RB.scatter_add_(1, buckets_RT, in_tail_RT.double())
    shares_RB = counts_RB / tail_R1
    rarity_RB = torch.where(counts_RB > 0, (shares_RB + config.eps) ** -config.gamma, 0.0)
    mean_R1 = (shares_RB * rarity_RB).sum(dim=1, keepdim=True)
    extra_RB = torch.where(mean_R1 > 0, config.alpha * rarity_RB / mean_R1, 0.0)
    return 1.0 + torch.where(in_tail_RT, extra_RB.gather(1, buckets_RT), 0.0)


def unfrozen_short_nll(long_nll: Tensor, short_nll: Tensor, window: int) -> Tensor:
    """Short NLL of an unfrozen scorer, detached: targets 1 .. n take the long NLL (score 0), later ones `short_nll`.

    All are [rows, targets]. Up to target n - 1 the short window is the whole context; the method counts n in, though
    window 1 reaches it.
    """
    in_window_T = torch.arange(1, long_nll.shape[1] + 1, device=long_nll.device) <= window
    return torch.where(in_window_T, long_nll.detach(), short_nll.detach())


def check_finite(
    nll: Tensor,
    *,
    valid: Tensor | None = None,
    row_ids: Tensor | None = None,
    name: str = "NLL",
    rank: int | None = None,
) -> None:
    """Raises a ValueError that names the first row, position and `rank` where `nll` [rows, targets] is NaN or infinite.

    Masked targets are not looked at. Waits for the device once.
    """
    bad_RT = ~torch.isfinite(nll.detach())
    if valid is not None:
        bad_RT &= valid.bool()
    num_bad = int(bad_RT.sum())
    if num_bad == 0:
        return
    row, target = (int(index) for index in bad_RT.nonzero()[0])
    row_id = row if row_ids is None else int(row_ids[row])
    where = f"row {row_id}, position {target + 1}" + ("" if rank is None else f", rank {rank}")
    raise ValueError(
        f"{name}: expected finite values, got {nll[row, target].item()} at {where} ({num_bad} such targets here)"
    )


def _check_shapes(long_nll: Tensor, **others: Tensor | None) -> None:
    if long_nll.dim() != 2:
        raise ValueError(f"long_nll: expected [rows, targets], got shape {list(long_nll.shape)}")
    for name, other in others.items():
        if other is not None and other.shape != long_nll.shape:
            raise ValueError(f"{name}: expected the shape of long_nll {list(long_nll.shape)}, got {list(other.shape)}")
