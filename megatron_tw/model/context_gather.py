"""Keys and values of a row, gathered over the context-parallel ranks. B = batch, G = key-value heads, S = this rank's
tokens, N = all tokens, D = head size.

The attention's backward pass needs them whole. Kept from forward to backward they are C times this rank's own, in every
layer; `gathered_again` keeps this rank's own and gathers once more in backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.model.sequence import SequenceShard


class GatherKeysValues(torch.autograd.Function):
    """[2, B, G, S, D] of every rank -> [2, B, G, N, D] as `SequenceShard.gathered` orders them; backward: summed over
    ranks, this rank's slice."""

    @staticmethod
    def forward(ctx: Any, kv_2BGSD: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return _gather(kv_2BGSD, shard)

    @staticmethod
    def backward(ctx: Any, grad_2BGND: Tensor) -> tuple[Tensor, None]:
        shard = ctx.shard
        # In fp32: sums of many bf16 terms over ranks would depend on the layout.
        parts = [shard.part_of_gathered(grad_2BGND, 3, rank).float().contiguous() for rank in range(shard.size)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=shard.cp_group)
        return mine.to(grad_2BGND.dtype), None


@contextmanager
def gathered_again(kv_2BGND: Tensor, kv_2BGSD: Tensor, shard: SequenceShard) -> Iterator[None]:
    """Around what uses the gathered `kv_2BGND`: of its memory nothing is saved for backward, only which part of it was
    used and this rank's own `kv_2BGSD`. Backward gathers once for all that was used here, the same numbers in the same
    places, and lets go when all of it has been used again.

    Backward runs the operations of a graph in an order that depends on the graph alone, so the gathers of the group's
    ranks meet.
    """
    again = _Again(kv_2BGSD.detach(), shard, kv_2BGND.untyped_storage()._cdata)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        yield


@dataclass
class _Again:
    """local: this rank's keys and values. memory: which memory is not to be kept; alive while `pack` is called."""

    local: Tensor
    shard: SequenceShard
    memory: int
    saved: int = 0
    still_to_use: int = 0
    gathered: Tensor | None = field(default=None)

    def pack(self, tensor: Tensor) -> "Tensor | _Part":
        if tensor.untyped_storage()._cdata != self.memory:
            return tensor
        self.saved += 1
        return _Part(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: "Tensor | _Part") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.gathered is None:
            self.gathered, self.still_to_use = _gather(self.local, self.shard), self.saved
        part = self.gathered.as_strided(packed.shape, packed.stride, packed.offset)
        self.still_to_use -= 1
        if self.still_to_use == 0:
            self.gathered = None
        return part


@dataclass(frozen=True)
class _Part:
    """A view of the gathered keys and values, without them."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _gather(kv_2BGSD: Tensor, shard: SequenceShard) -> Tensor:
    parts = [torch.empty_like(kv_2BGSD, memory_format=torch.contiguous_format) for _ in range(shard.size)]
    dist.all_gather(parts, kv_2BGSD.contiguous(), group=shard.cp_group)
    return shard.gathered(parts, 3)
