"""The micro-batches of a step, fetched before it: all of them are scored before the first is trained on.

R = rows of all micro-batches of a step, S = positions of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.parallel.layout import Layout

_TYPES = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32}


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """iterators: to hand on in place of those that were given. tokens, labels: [R, S] int64; valid: [R, S] bool, which
    targets count; all three None on ranks that read no data: those of pipeline stages between the first and the
    last."""

    iterators: Any
    tokens: Tensor | None
    labels: Tensor | None
    valid: Tensor | None


def fetch(
    iterators: Any, *, num_microbatches: int, micro_batch_size: int, seq_length: int, layout: Layout, device: Any
) -> MicroBatches:
    """Fetch a step's micro-batches from its data iterator, or from each of a list of them (one a model chunk).

    The first tensor-parallel rank reads, as in Megatron-LM, and tells the others. Collective over the tensor-parallel
    group.

    Raises:
        ValueError: what the iterator gives is no dict of rows of `seq_length` tokens, labels and loss mask.
    """
    if layout.pp_rank not in (0, layout.pp_size - 1):
        return MicroBatches(iterators=iterators, tokens=None, labels=None, valid=None)
    chunks = iterators if isinstance(iterators, list) else [iterators]
    items = [None if chunk is None else [next(chunk) for _ in range(num_microbatches)] for chunk in chunks]
    read = next((chunk_items for chunk_items in items if chunk_items is not None), None)
    shape = (num_microbatches * micro_batch_size, seq_length)
    rows = {
        name: _same_on_tensor_ranks(read, name, shape, dtype, layout, device)
        for name, dtype in _TYPES.items()
    }  # fmt: skip
    replaced: list[Iterator[Any] | None] = [None if chunk is None else iter(chunk) for chunk in items]
    return MicroBatches(
        iterators=replaced if isinstance(iterators, list) else replaced[0],
        tokens=rows["tokens"],
        labels=rows["labels"],
        valid=rows["loss_mask"] > 0,
    )


def _same_on_tensor_ranks(
    items: Sequence[Any] | None, name: str, shape: tuple[int, int], dtype: torch.dtype, layout: Layout, device: Any
) -> Tensor:
    if layout.tp_rank == 0:
        rows = _rows(items, name, shape).to(device=device, dtype=dtype)
    else:
        rows = torch.empty(shape, dtype=dtype, device=device)
    if layout.tp_size > 1:
        dist.broadcast(rows, dist.get_process_group_ranks(layout.tp_group)[0], group=layout.tp_group)
    return rows


def _rows(items: Sequence[Any] | None, name: str, shape: tuple[int, int]) -> Tensor:
    what = f"--token-weighting: expected {name} {list(shape)} from the data iterator of a step"
    if items is None:
        raise ValueError(f"{what}, got no iterator on a rank of the first or last pipeline stage")
    if not all(isinstance(item, dict) and isinstance(item.get(name), Tensor) for item in items):
        raise ValueError(f"{what}, got items without it")
    rows = torch.cat([item[name] for item in items])
    if rows.shape != shape:
        raise ValueError(f"{what}, got {list(rows.shape)}")
    return rows
