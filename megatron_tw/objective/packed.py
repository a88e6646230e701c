"""One packed sequence: documents one after the other, each in zigzag over the context-parallel ranks.

    lengths 4, 8 over two ranks      rank 0: 0, 3 | 4, 5, 10, 11      rank 1: 1, 2 | 6, 7, 8, 9

Every document is cut into 2C chunks, of which rank r holds chunks r and 2C-1-r, as Transformer Engine lays out its THD
format. Attention wants documents of equal length side by side, so that they make a batch: each order of the tokens is
one index, made once a sequence.

Shape suffixes: D documents, N tokens of the whole sequence, S those that a rank holds.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_tw.objective.zigzag import chunk_length


class PackedSequence:
    """The layout of one sequence on one rank. Documents are without a gap: padding counts as part of its document.

    Args:
        lengths: tokens of each document, in order; multiples of 2 * size where size > 1.
        rank, size: this rank's place among the context-parallel ranks.
        device: where the indices are used.

    >>> packed = PackedSequence([4, 8], rank=1, size=2)
    >>> packed.positions().tolist(), packed.within.tolist()
    ([1, 2, 6, 7, 8, 9], [1, 2, 2, 3, 4, 5])
    >>> packed.unshard([packed.shard(torch.arange(12), 0, rank=r) for r in range(2)], 0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]

    Raises:
        ValueError: a length that does not split into the ranks' chunks.
    """

    def __init__(
        self, lengths: Sequence[int], *, rank: int = 0, size: int = 1, device: torch.device | None = None
    ) -> None:
        self.lengths = tuple(lengths)
        self.rank = rank
        self.size = size
        self.device = device
        for length in self.lengths:
            chunk_length(length, size)  # raises where it does not split
        self._positions = [self._positions_of(place) for place in range(size)]

    @property
    def sequence_length(self) -> int:
        """N."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """[D + 1] int64 on the CPU: where each document begins, and N."""
        return torch.tensor((0, *self.lengths)).cumsum(0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as attention kernels want them: int32 on the device."""
        return self.starts.int().to(self.device)

    @cached_property
    def within(self) -> Tensor:
        """[S] int64: the position of each of this rank's tokens in its document."""
        of_token_N = torch.arange(self.sequence_length) - self._first_of_each()
        return of_token_N[self._positions[self.rank]].to(self.device)

    def positions(self, rank: int | None = None) -> Tensor:
        """[S] int64: which tokens of the sequence a rank (None: this one) holds, in the order in which it holds
        them."""
        return self._on_device[self.rank if rank is None else rank]

    def shard(self, whole: Tensor, dim: int, *, rank: int | None = None) -> Tensor:
        """A rank's part of `whole` along `dim`; `whole` itself where there is one rank."""
        return whole if self.size == 1 else whole.index_select(dim, self.positions(rank))

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence from the parts of all ranks in rank order."""
        return shards[0] if self.size == 1 else torch.cat(list(shards), dim).index_select(dim, self._whole)

    @cached_property
    def by_length(self) -> tuple[tuple[int, int], ...]:
        """How many documents there are of each length, (count, length), in rising order of the lengths."""
        return tuple((self.lengths.count(length), length) for length in sorted(set(self.lengths)))

    @cached_property
    def local_by_length(self) -> Tensor:
        """[S]: this rank's tokens with the documents in the order of `by_length`."""
        return self._places_by_length(self.size).to(self.device)

    @cached_property
    def local_in_order(self) -> Tensor:
        """[S]: back from there."""
        return _inverse(self._places_by_length(self.size)).to(self.device)

    @cached_property
    def gathered_by_length(self) -> Tensor:
        """[N]: of all ranks' tokens, rank after rank, whole documents in the order of `by_length`."""
        whole_N = _inverse(torch.cat(self._positions))
        return whole_N[self._places_by_length(1)].to(self.device)

    @cached_property
    def own_by_length(self) -> Tensor:
        """[C, S]: where each rank's tokens stand among whole documents in the order of `by_length`."""
        return _inverse(self.gathered_by_length.cpu()).view(self.size, -1).to(self.device)

    @cached_property
    def _on_device(self) -> list[Tensor]:
        return [positions_S.to(self.device) for positions_S in self._positions]

    @cached_property
    def _whole(self) -> Tensor:
        return _inverse(torch.cat(self._positions)).to(self.device)

    def _positions_of(self, rank: int) -> Tensor:
        if self.size == 1:
            return torch.arange(self.sequence_length)
        chunk_D = torch.tensor(self.lengths) // (2 * self.size)
        own_D = 2 * chunk_D  # tokens of each document on a rank
        chunk_S, own_start_S, start_S = (
            x_D.repeat_interleave(own_D) for x_D in (chunk_D, own_D.cumsum(0) - own_D, self.starts[:-1])
        )
        index_S = torch.arange(len(chunk_S)) - own_start_S  # in this rank's part of the document
        others_S = torch.where(index_S < chunk_S, rank, 2 * self.size - 2 - rank)  # chunks before it on other ranks
        return start_S + index_S + others_S * chunk_S

    def _first_of_each(self) -> Tensor:
        """[N]: of each token, the first position of its document."""
        return self.starts[:-1].repeat_interleave(torch.tensor(self.lengths))

    def _places_by_length(self, size: int) -> Tensor:
        """Documents sorted by length, of each the 1/size-th part of its tokens, as places in the order as it is."""
        lengths_D = torch.tensor(self.lengths) // size
        starts_D = self.starts[:-1] // size
        order_D = lengths_D.argsort(stable=True)
        lengths_D, starts_D = lengths_D[order_D], starts_D[order_D]
        new_starts_D = lengths_D.cumsum(0) - lengths_D
        return (starts_D - new_starts_D).repeat_interleave(lengths_D) + torch.arange(int(lengths_D.sum()))


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse
