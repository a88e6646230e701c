"""Teacher-forced exactness: greedy recall of the gold answers from one forward pass, in any parallel layout.

The gold answers stand behind the prompt. A model that decodes greedily from the prompt begins with these tokens if and
only if each of them is its first choice after those before it; and that, a forward pass says of every target. The
score of an example is the share of its answers all of whose tokens are first choices. What stands between the answers
(", ") does not count there, but in `exact`.

Shape suffixes: E examples, A answers of an example, R rows of a pass, N tokens of a row, T = N - 1 targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.evaluation.ruler.rows import Row
from megatron_tw.model.forward import long_nll_and_top1, padded_window
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout

Flags = dict[str, npt.NDArray[np.bool_]]
"""answers [E, A]: whether the model says each answer. exact [E]: whether it says the whole completion."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The model as it is used here, on this rank. micro_batch_size: rows of one forward pass."""

    chunks: Sequence[torch.nn.Module]
    layout: Layout
    device: Device
    sequence_parallel: bool
    micro_batch_size: int

    @property
    def rows_per_pass(self) -> int:
        """Rows of a replica that go through together: as many micro-batches as the pipeline has stages."""
        return self.micro_batch_size * self.layout.pp_size

    @property
    def examples_per_pass(self) -> int:
        """Of all replicas."""
        return self.rows_per_pass * self.layout.dp_size

    def exactness(self, rows: Sequence[Row], num_examples: int) -> Flags | None:
        """Of one pass: of `num_examples` examples, of which the data-parallel replica d has examples d, d + dp, ... as
        its `rows`. The same on all ranks of the last pipeline stage, None on the others. Collective over the world.

        rows: at least one, also where the pass has none for this replica; what is beyond `num_examples` is dropped.
        """
        top1_RT = self._top1(rows)
        if top1_RT is None:
            return None
        # Token i is target i - 1.
        said = [[bool(top1[first - 1 : last - 1].all()) for first, last in row.spans] for row, top1 in top1_RT]
        exact = [bool(top1[row.prompt_tokens - 1 : len(row.ids) - 1].all()) for row, top1 in top1_RT]
        flags_RA = torch.tensor([[*answers, whole] for answers, whole in zip(said, exact, strict=True)])
        flags_EA = self._of_all_replicas(flags_RA)[:num_examples].numpy()
        return {"answers": flags_EA[:, :-1], "exact": flags_EA[:, -1]}

    def _top1(self, rows: Sequence[Row]) -> list[tuple[Row, Tensor]] | None:
        """Of each row of the pass: whether its tokens are first choices. Rows are padded behind their last token,
        which no earlier one sees."""
        shards = self.layout.tp_size if self.sequence_parallel else 1
        length = padded_window(max(len(row.ids) for row in rows), self.layout.cp_size, shards)
        filled = [rows[min(place, len(rows) - 1)] for place in range(self.rows_per_pass)]
        ids_RN = torch.zeros(len(filled), length, dtype=torch.int64)
        for ids_N, row in zip(ids_RN, filled, strict=True):
            ids_N[: len(row.ids)] = torch.tensor(row.ids)
        both = long_nll_and_top1(
            self.chunks, ids_RN.to(self.device.device), self.layout, micro_batch_size=self.micro_batch_size
        )
        return None if both is None else list(zip(filled, both[1].cpu(), strict=True))

    def _of_all_replicas(self, flags_RA: Tensor) -> Tensor:
        """[E, A] in the order of the examples. Collective over the replicas."""
        own_RA = flags_RA.to(self.device.device, torch.uint8)
        shards = [torch.empty_like(own_RA) for _ in range(self.layout.dp_size)]
        dist.all_gather(shards, own_RA, group=self.layout.dp_group)
        return torch.stack(shards, dim=1).flatten(0, 1).to("cpu", torch.bool)
