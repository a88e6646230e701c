"""Zigzag slices of a sequence over context-parallel ranks, in plain integers and pure tensor math.

A sequence of N tokens is cut into 2C chunks; rank r holds chunks r and 2C-1-r, so that causal attention costs every
rank the same (Megatron-Core and Transformer Engine use the same order). Everything here takes `rank` and `size` as
integers.

>>> zigzag_positions(8, rank=0, size=2).tolist()
[0, 1, 6, 7]
>>> zigzag_positions(8, rank=1, size=2).tolist()
[2, 3, 4, 5]
>>> unshard([zigzag_shard(torch.arange(8), 0, rank=r, size=2) for r in range(2)], 0).tolist()
[0, 1, 2, 3, 4, 5, 6, 7]
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def chunk_length(length: int, size: int) -> int:
    """Tokens of one of the 2 * size chunks; the whole sequence when size is 1 is two chunks as well.

    Raises:
        ValueError: `length` is not a multiple of 2 * size (1 when size is 1).
    """
    if size > 1 and length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens does not split into 2 x {size} context-parallel chunks")
    return length // (2 * size)


def zigzag_positions(length: int, *, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """Positions in the whole sequence of the tokens that `rank` holds, in the order it holds them: [length / size]
    int64."""
    if size == 1:
        return torch.arange(length, device=device)
    chunk = chunk_length(length, size)
    first = torch.arange(rank * chunk, (rank + 1) * chunk, device=device)
    second = torch.arange((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk, device=device)
    return torch.cat((first, second))


def zigzag_shard(x: Tensor, dim: int, *, rank: int, size: int) -> Tensor:
    """The slice of `x` along `dim` that `rank` holds; `x` itself when size is 1."""
    if size == 1:
        return x
    chunk = chunk_length(x.shape[dim], size)
    return torch.cat((x.narrow(dim, rank * chunk, chunk), x.narrow(dim, (2 * size - 1 - rank) * chunk, chunk)), dim)


def unshard(shards: Sequence[Tensor], dim: int) -> Tensor:
    """The whole sequence from the shards of all ranks in rank order; the inverse of `zigzag_shard`."""
    if len(shards) == 1:
        return shards[0]
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)], dim)
