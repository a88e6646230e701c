"""Who says what a target's NLL is with a short context only: the model in training, a fixed model, or a moving average.

    unfrozen       the model in training itself; targets 1..n take the long NLL instead (arXiv 2503.09202)
    frozen, cached scores that tools/score_tokens.py wrote once
    frozen, live   a second model from a Hugging Face folder, on the last pipeline stage
    ema            a moving average of the model in training, kept in fp32 beside it

All of them come from the same short-window forward. R = rows, N = tokens of a row, T = N - 1 targets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_tw.config import ModelConfig, ParallelConfig, RunConfig, check_model_shape
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.scores import ScoreRows, check_scores
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.model.build import build_model, load_hf
from megatron_tw.model.forward import ShortWindowScorer
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.source import row_bos_id
from megatron_tw.weighting import unfrozen_short_nll
from megatron_tw.weighting.schedule import WeightingSchedule


class Scorer(Protocol):
    """What the training step asks of a scorer."""

    def score(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        """Short NLL [R, T] fp32 before the step; None before the last pipeline stage. Collective over the replica."""

    def complete(self, short_RT: Tensor, long_RT: Tensor) -> Tensor:
        """Short NLL of all targets, once the long NLL is known."""

    def after_update(self) -> None:
        """The model in training has just been updated."""

    def start_over(self) -> None:
        """The model has just been loaded from a checkpoint that holds nothing of this scorer."""

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the scorer (megatron.core.dist_checkpointing); empty for most."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state` named."""


class _Stateless:
    """A scorer that training does not change."""

    def complete(self, short_RT: Tensor, long_RT: Tensor) -> Tensor:
        return short_RT

    def after_update(self) -> None:
        pass

    def start_over(self) -> None:
        pass

    def sharded_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class UnfrozenScorer(_Stateless):
    """The model in training, limited to short windows."""

    windows: ShortWindowScorer
    model: Sequence[torch.nn.Module]
    window: int

    def score(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        return self.windows.nll(self.model, rows_RN)

    def complete(self, short_RT: Tensor, long_RT: Tensor) -> Tensor:
        return unfrozen_short_nll(long_RT, short_RT, self.window)


@dataclass
class CachedFrozenScorer(_Stateless):
    """Scores on disk, read by the ranks of the last pipeline stage."""

    scores: ScoreRows
    rows: TokenRows
    layout: Layout

    def score(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        if not self.layout.is_last_stage:
            return None
        return self.scores.nll(self.rows.documents_R2[row_index_R.numpy()]).to(rows_RN.device)


@dataclass
class LiveFrozenScorer(_Stateless):
    """A fixed second model, on the ranks of the last pipeline stage (None elsewhere), sharded over their tensor- and
    context-parallel groups."""

    windows: ShortWindowScorer
    model: list[TokenWeightedGPT] | None

    def score(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        return None if self.model is None else self.windows.nll(self.model, rows_RN)

    @staticmethod
    def load(
        folder: str, config: RunConfig, windows: ShortWindowScorer, layout: Layout, device: Device
    ) -> "LiveFrozenScorer":
        """Load the model from a Hugging Face folder that `open_live_scorer` has checked."""
        architecture = read_architecture(folder)
        if not layout.is_last_stage:
            return LiveFrozenScorer(windows, None)
        parallel = unpipelined(config.parallel)
        model = build_unpipelined(architecture, parallel, config.model, layout, device)
        load_hf(model, folder, architecture, layout)
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        return LiveFrozenScorer(windows, model)


def unpipelined(parallel: ParallelConfig) -> ParallelConfig:
    """The same without a pipeline."""
    return replace(parallel, pipeline_model_parallel_size=1, num_layers_per_virtual_pipeline_stage=None)


def open_live_scorer(folder: str, parallel: ParallelConfig, rows: TokenRows, model: Architecture) -> None:
    """Check the second model of --scorer-hf, from the headers of its files, before anything is allocated.

    Raises:
        ValueError: no model there, another vocabulary than the rows and the model in training have, or a model that the
            layout does not admit.
    """
    try:
        scorer = read_architecture(folder)
        if scorer.vocab_size != model.vocab_size:
            raise ValueError(f"a scorer with a vocabulary of {scorer.vocab_size}; the model's has {model.vocab_size}")
        check_scorer_vocabulary(rows, folder, scorer.vocab_size)
        check_model_shape(
            unpipelined(parallel),
            num_layers=scorer.num_layers,
            num_attention_heads=scorer.num_attention_heads,
            num_query_groups=scorer.num_query_groups,
            ffn_hidden_size=scorer.ffn_hidden_size,
        )
        SafetensorsFolder(folder, scorer)
    except ValueError as error:
        raise ValueError(f"--scorer-hf {folder}: {error}") from error


def build_unpipelined(
    architecture: Architecture, parallel: ParallelConfig, model: ModelConfig, layout: Layout, device: Device
) -> list[TokenWeightedGPT]:
    """A whole model on one pipeline stage's ranks, whatever the pipeline of the run is."""
    return build_model(architecture, parallel, model, replace(layout, pp_size=1, pp_rank=0, vpp_size=None), device)


@dataclass
class EmaScorer(_Stateless):
    """A moving average of the model in training: average = decay * average + (1 - decay) * weights after each update.

    The average is kept in fp32 for the parameters that this rank holds (4 bytes each); for the scoring pass it takes
    the weights' place, in their dtype.
    """

    windows: ShortWindowScorer
    model: Sequence[torch.nn.Module]
    chunks: Sequence[TokenWeightedGPT]
    decay: float
    average: dict[torch.nn.Parameter, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        self.average = {parameter: parameter.detach().float().clone() for parameter in parameters}

    def score(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        with self._in_place_of_the_weights():
            return self.windows.nll(self.model, rows_RN)

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


def open_scores(config: RunConfig, rows: TokenRows, architecture: Architecture) -> ScoreRows | None:
    """The cached scores that --scores names, checked against this run; None when it names none.

    Raises:
        ValueError: they are incomplete, or not of these rows, windows or BOS; says everything that differs.
    """
    options = config.scorer
    if options.scores is None:
        return None
    scores = ScoreRows(options.scores)
    assert options.short_window is not None  # checked with the options
    check_scores(
        scores,
        rows,
        short_window=options.short_window,
        short_stride=options.stride(config.data.seq_length),
        bos_id=row_bos_id(config.data.bos_id, rows, architecture),
    )
    return scores


def make_scorer(
    config: RunConfig,
    schedule: WeightingSchedule,
    *,
    rows: TokenRows,
    scores: ScoreRows | None,
    architecture: Architecture,
    model: Sequence[torch.nn.Module],
    chunks: Sequence[TokenWeightedGPT],
    layout: Layout,
    device: Device,
) -> Scorer | None:
    """The scorer of this run, None for schemes that need none. Collective over the world.

    Raises:
        ValueError: the scorer does not fit the run; names the option.
    """
    if not schedule.needs_scorer:
        return None
    options, seq_length = config.scorer, config.data.seq_length
    window = options.short_window
    assert window is not None  # checked with the options
    stride = options.stride(seq_length)
    bos_id = row_bos_id(config.data.bos_id, rows, architecture)
    if scores is not None:
        return CachedFrozenScorer(scores, rows, layout)
    live = options.scorer == "frozen"
    windows = ShortWindowScorer.create(
        seq_length,
        window,
        stride,
        include_first=options.scorer != "unfrozen",
        bos_id=bos_id,
        layout=layout,
        sequence_parallel=config.parallel.uses_sequence_parallel,
        scoring_micro_batch=options.scoring_micro_batch,
        pipelined=not live,
    )
    if options.scorer == "unfrozen":
        return UnfrozenScorer(windows, model, window)
    if options.scorer == "ema":
        return EmaScorer(windows, model, chunks, options.scorer_ema_decay)
    assert options.scorer_hf is not None
    return LiveFrozenScorer.load(options.scorer_hf, config, windows, layout, device)
