"""A fixed model as the scorer: what it said of these rows beforehand, or the model itself. R = rows, N = tokens of a
row."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from megatron_tw.config import ComputeConfig, ParallelConfig, ScorerConfig, check_model_shape
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.scores import ScoreRows, check_scores
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.model.build import build_model, load_hf
from megatron_tw.model.flops import Work
from megatron_tw.model.forward import ShortWindowForward
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.intact import check_export
from megatron_tw.runtime.opening import named
from megatron_tw.training.scorers.base import (
    Scorer,
    ScorerInputs,
    TrainedModel,
    register_scorer,
    short_window_forward,
    work_of_windows,
)


@register_scorer("frozen")
class FrozenScorer:
    """Either of the two below: cached with --scores, live with --scorer-hf."""

    options: ClassVar[frozenset[str]] = frozenset({"scores", "scorer_hf"})

    @classmethod
    def check(cls, inputs: ScorerInputs) -> None:
        kind, folder = _chosen(inputs.config.scorer)
        kind.check_folder(folder, inputs)

    @classmethod
    def create(cls, inputs: ScorerInputs, trained: TrainedModel) -> Scorer:
        kind, folder = _chosen(inputs.config.scorer)
        return kind.load(folder, inputs, trained)


@dataclass
class CachedFrozenScorer(Scorer):
    """Short NLLs on disk, as tools/score_tokens.py wrote them, read by the ranks of the last pipeline stage."""

    scores: ScoreRows
    rows: TokenRows
    layout: Layout

    @staticmethod
    def check_folder(folder: str, inputs: ScorerInputs) -> None:
        """That it is complete and of these rows, windows and BOS, the one that the run of --load had, and as it was
        written: the ranks share the reading. Collective over the world."""
        with named("--scores"):
            scores = ScoreRows(folder)
        check_scores(
            scores,
            inputs.rows,
            short_window=inputs.windows.tokens,
            short_stride=inputs.windows.stride,
            bos_id=inputs.bos_id,
        )
        saved = inputs.source.saved
        if saved is not None and saved.state.scores not in (None, scores.header.fingerprint):
            raise ValueError(f"--scores {scores.path}: other scores than those that the run of --load was trained with")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        error: OSError | ValueError | None = None
        try:
            scores.check(range(len(scores) * rank // ranks, len(scores) * (rank + 1) // ranks))
        except (OSError, ValueError) as damaged:
            error = damaged
        raise_together(error)

    @staticmethod
    def load(folder: str, inputs: ScorerInputs, trained: TrainedModel) -> "CachedFrozenScorer":
        return CachedFrozenScorer(ScoreRows(folder), inputs.rows, trained.layout)

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        if not self.layout.is_last_stage:
            return None
        return self.scores.nll(self.rows.documents_R2[row_index_R.numpy()]).to(rows_RN.device)

    @property
    def fingerprint(self) -> str | None:
        return self.scores.header.fingerprint


@dataclass
class LiveFrozenScorer(Scorer):
    """A fixed second model, on the ranks of the last pipeline stage (None elsewhere), sharded over their tensor- and
    context-parallel groups."""

    windows: ShortWindowForward
    model: list[TokenWeightedGPT] | None
    architecture: Architecture
    inputs: ScorerInputs

    @staticmethod
    def check_folder(folder: str, inputs: ScorerInputs) -> None:
        """From the headers of its files: a model, with the vocabulary of the rows and of the model in training, that
        the layout admits."""
        if inputs.config.checkpoint.verify_checkpoint:
            check_export(folder, "--scorer-hf")
        try:
            scorer = read_architecture(folder)
            LiveFrozenScorer.check_architecture(scorer, inputs)
            check_scorer_vocabulary(inputs.rows, folder, scorer.vocab_size)
            SafetensorsFolder(folder, scorer)
        except ValueError as error:
            raise ValueError(f"--scorer-hf {folder}: {error}") from error

    @staticmethod
    def check_architecture(scorer: Architecture, inputs: ScorerInputs) -> None:
        """Raises ValueError where a model of this shape cannot score the run's rows under its layout."""
        expected = inputs.source.architecture.vocab_size
        if scorer.vocab_size != expected:
            raise ValueError(f"a scorer with a vocabulary of {scorer.vocab_size}; the model's has {expected}")
        check_model_shape(
            unpipelined(inputs.config.parallel),
            num_layers=scorer.num_layers,
            num_attention_heads=scorer.num_attention_heads,
            num_query_groups=scorer.num_query_groups,
            ffn_hidden_size=scorer.ffn_hidden_size,
        )
        scorer.check_length(inputs.windows.tokens, "--short-window")

    @staticmethod
    def load(folder: str, inputs: ScorerInputs, trained: TrainedModel) -> "LiveFrozenScorer":
        """Load the model. Collective over the world."""
        architecture = read_architecture(folder)
        scorer = LiveFrozenScorer.build(architecture, inputs, trained)
        load_hf(scorer.model or [], folder, architecture, trained.layout)
        return scorer

    @staticmethod
    def build(architecture: Architecture, inputs: ScorerInputs, trained: TrainedModel) -> "LiveFrozenScorer":
        """The scorer, with a model that is not yet filled. Collective over the world."""
        windows = short_window_forward(inputs, trained, include_first=True, pipelined=False)
        layout, config = trained.layout, inputs.config
        if not layout.is_last_stage:
            return LiveFrozenScorer(windows, None, architecture, inputs)
        model = build_unpipelined(architecture, unpipelined(config.parallel), config.compute, layout, trained.device)
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        return LiveFrozenScorer(windows, model, architecture, inputs)

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor) -> Tensor | None:
        return None if self.model is None else self.windows.short_nll(self.model, rows_RN)

    def work(self, rows: int) -> Work:
        return work_of_windows(self.windows, self.architecture, rows, self.inputs)


def unpipelined(parallel: ParallelConfig) -> ParallelConfig:
    """The same without a pipeline."""
    return replace(parallel, pipeline_model_parallel_size=1, num_layers_per_virtual_pipeline_stage=None)


def build_unpipelined(
    architecture: Architecture, parallel: ParallelConfig, compute: ComputeConfig, layout: Layout, device: Device
) -> list[TokenWeightedGPT]:
    """A whole model on one pipeline stage's ranks, whatever the pipeline of the run is."""
    return build_model(architecture, parallel, compute, replace(layout, pp_size=1, pp_rank=0, vpp_size=None), device)


def _chosen(options: ScorerConfig) -> tuple[type[CachedFrozenScorer] | type[LiveFrozenScorer], str]:
    """Which of the two the options ask for, and its folder."""
    match options.scores, options.scorer_hf:
        case str(folder), None:
            return CachedFrozenScorer, folder
        case None, str(folder):
            return LiveFrozenScorer, folder
    raise ValueError(
        "--scorer frozen: expected either --scores (cached) or --scorer-hf (live), got "
        + ("neither" if options.scores is None else "both")
    )
