"""A moving average of the model in training as the scorer. R = rows, N = tokens of a row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tw.model.flops import Work
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.packed_windows import WindowForward
from megatron_tw.training.scorers.base import (
    Scorer,
    ScorerInputs,
    TrainedModel,
    register_scorer,
    short_window_forward,
    work_of_windows,
)


@register_scorer("ema")
@dataclass
class EmaScorer(Scorer):
    """A moving average of the model in training: average = decay * average + (1 - decay) * weights after each update.

    The average is kept in fp32 for the parameters that this rank holds (4 bytes each); for the scoring pass it takes
    the weights' place, in their dtype.
    """

    windows: WindowForward
    model: Sequence[torch.nn.Module]
    chunks: Sequence[TokenWeightedGPT]
    decay: float
    inputs: ScorerInputs
    average: dict[torch.nn.Parameter, Tensor] = field(init=False)
    options: ClassVar[frozenset[str]] = frozenset({"scorer_ema_decay"})

    @classmethod
    def check(cls, inputs: ScorerInputs) -> None:
        if inputs.config.data_parallel.overlap_param_gather:
            raise ValueError(
                "--overlap-param-gather: --scorer ema averages the weights after the update, before they would be "
                "gathered"
            )

    @classmethod
    def create(cls, inputs: ScorerInputs, trained: TrainedModel) -> "EmaScorer":
        windows = short_window_forward(inputs, trained, include_first=True)
        return EmaScorer(windows, trained.model, trained.chunks, inputs.config.scorer.scorer_ema_decay, inputs)

    def __post_init__(self) -> None:
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        self.average = {parameter: parameter.detach().float().clone() for parameter in parameters}

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor, documents_D3: Tensor | None = None) -> Tensor | None:
        with self._in_place_of_the_weights():
            return self.windows.short_nll(self.model, rows_RN, documents_D3)

    def work(self, rows: int, documents_D3: Tensor | None = None) -> Work:
        architecture = self.inputs.source.architecture
        return work_of_windows(self.windows, architecture, rows, documents_D3, self.inputs)

    @torch.no_grad()
    def after_update(self) -> None:
        for parameter, average in self.average.items():
            average.lerp_(parameter.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def start_over(self) -> None:
        for parameter, average in self.average.items():
            average.copy_(parameter)

    @contextmanager
    def _in_place_of_the_weights(self) -> Iterator[None]:
        weights = {parameter: parameter.data for parameter in self.average}
        try:
            for parameter, average in self.average.items():
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in weights.items():
                parameter.data = data

    def sharded_state(self) -> dict[str, Any]:
        return {
            f"ema{index}": {
                name: self._of_average(entry) for name, entry in chunk.sharded_state_dict(prefix="ema.").items()
            }
            for index, chunk in enumerate(self.chunks)
        }

    def _of_average(self, entry: Any) -> Any:
        """A model's entry in a sharded state dict, with the average in place of the weight."""
        if isinstance(entry, ShardedTensor):
            return replace(entry, data=self.average[entry.data], dtype=torch.float32)
        if isinstance(entry, ShardedTensorFactory):
            return replace(entry, data=self.average[entry.data])
        return entry

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                self.average[parameter].copy_(state[f"ema{index}"][f"ema.{name}"])
