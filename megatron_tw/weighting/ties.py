"""The top scores of each row, with ties broken by a hash: the same choice on every device, layout and resumed run."""

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 / golden ratio


def top_targets(scores_RT: Tensor, counts_R: Tensor, valid_RT: Tensor, row_ids_R: Tensor, seed: int) -> Tensor:
    """Marks the `counts_R` highest valid scores of each row; of equal scores, those of higher `tie_break` go first.

    Args:
        scores_RT: [rows, targets] float.
        counts_R: [rows] int64, how many to mark; at most the row's number of valid targets.
        valid_RT: [rows, targets] bool; others are never marked.
        row_ids_R: [rows] int64, a name of each row that no layout changes.

    Returns:
        [rows, targets] bool.
    """
    # Valid scores are finite (see `check_finite`), so -inf puts masked targets last; + 0.0 leaves no -0.0, which some
    # sorts tell from 0.0.
    ranked_RT = torch.where(valid_RT, scores_RT, -torch.inf) + 0.0
    by_hash_RT = tie_break(row_ids_R, scores_RT.shape[1], seed).argsort(dim=1, descending=True)
    by_score_RT = ranked_RT.gather(1, by_hash_RT).argsort(dim=1, descending=True, stable=True)
    order_RT = by_hash_RT.gather(1, by_score_RT)
    places_T = torch.arange(scores_RT.shape[1], device=scores_RT.device)
    return torch.zeros_like(valid_RT).scatter_(1, order_RT, places_T < counts_R[:, None])


def tie_break(row_ids_R: Tensor, num_targets: int, seed: int) -> Tensor:
    """[rows, targets] int64: splitmix64 of (seed, row id, target), in wrapping integer arithmetic only."""
    start_R = splitmix64(splitmix64(torch.full_like(row_ids_R, _signed(seed))) ^ row_ids_R)
    targets_T = torch.arange(1, num_targets + 1, device=row_ids_R.device)
    return splitmix64(start_R[:, None] + targets_T * _signed(GOLDEN_GAMMA))


def splitmix64(state: Tensor) -> Tensor:
    """The splitmix64 generator's output for an int64 state (Steele, Lea, Flood 2014), with its bits read as int64.

    >>> hex(splitmix64(torch.tensor(0)).item() % 2**64)  # the generator's published first output for seed 0
    '0xe220a8397b1dcdaf'
    """
    bits = state + _signed(GOLDEN_GAMMA)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: `>>` on int64 drags the sign along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(bits: int) -> int:
    """The lower 64 bits, read as a signed number."""
    return (bits + 2**63) % 2**64 - 2**63
