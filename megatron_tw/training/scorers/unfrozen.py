"""The model in training as its own scorer, limited to short windows. R = rows, N = tokens of a row, T = N - 1."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tw.config import check_own_windows
from megatron_tw.model.flops import Work
from megatron_tw.model.packed_windows import WindowForward
from megatron_tw.training.scorers.base import (
    Scorer,
    ScorerInputs,
    TrainedModel,
    register_scorer,
    short_window_forward,
    work_of_windows,
)
from megatron_tw.weighting import unfrozen_short_nll


@register_scorer("unfrozen")
@dataclass
class UnfrozenScorer(Scorer):
    """The model in training, limited to short windows of `window` tokens."""

    windows: WindowForward
    model: Sequence[torch.nn.Module]
    window: int
    inputs: ScorerInputs

    @classmethod
    def check(cls, inputs: ScorerInputs) -> None:
        check_own_windows(inputs.config.windows, inputs.config.data.seq_length)

    @classmethod
    def create(cls, inputs: ScorerInputs, trained: TrainedModel) -> "UnfrozenScorer":
        windows = short_window_forward(inputs, trained, include_first=False)
        return UnfrozenScorer(windows, trained.model, inputs.windows.tokens, inputs)

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor, documents_D3: Tensor | None = None) -> Tensor | None:
        return self.windows.short_nll(self.model, rows_RN, documents_D3)

    def work(self, rows: int, documents_D3: Tensor | None = None) -> Work:
        architecture = self.inputs.source.architecture
        return work_of_windows(self.windows, architecture, rows, documents_D3, self.inputs)

    def complete(self, short_RT: Tensor, long_RT: Tensor, document_starts_RT: Tensor | None = None) -> Tensor:
        return unfrozen_short_nll(long_RT, short_RT, self.window, document_starts_RT)
