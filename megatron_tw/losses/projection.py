"""From hidden states to the logits of some vocabulary entries.

Shape suffixes: V true vocabulary entries of this rank, B those of a tile, M tokens, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The output projection to the `size` true vocabulary entries of this rank, in the dtype of the GEMMs."""

    weight_VH: Tensor
    bias_V: Tensor | None

    @staticmethod
    def of_shard(weight: Tensor, bias: Tensor | None, *, size: int, dtype: torch.dtype) -> "Projection":
        return Projection(weight_VH=weight[:size].to(dtype), bias_V=None if bias is None else bias[:size].to(dtype))

    def logits_(self, hidden_MH: Tensor, block: slice, tile_MB: Tensor) -> None:
        """Writes the logits of a block of the vocabulary into `tile_MB`."""
        if self.bias_V is None:
            torch.mm(hidden_MH, self.weight_VH[block].T, out=tile_MB)
        else:
            torch.addmm(self.bias_V[block], hidden_MH, self.weight_VH[block].T, out=tile_MB)

    def label_logits(self, hidden_MH: Tensor, label_M: Tensor, dtype: torch.dtype) -> Tensor:
        """Dot products of hidden states with their labels' rows, in fp32 or better.

        A GEMM in low precision rounds what it writes. NLL differences of long and short contexts would show that for
        the label's logit. This one replaces it in the tile too: where the label is almost certain, its share of the
        log-sum-exp must cancel against it.
        """
        if len(self.weight_VH) == 0:
            return hidden_MH.new_zeros(len(hidden_MH), dtype=dtype)
        logit_M = (hidden_MH.to(dtype) * self.weight_VH[label_M].to(dtype)).sum(dim=1)
        return logit_M if self.bias_V is None else logit_M + self.bias_V[label_M].to(dtype)
