"""A fixed model as the scorer: what it said of these rows beforehand, or the model itself. R = rows, N = tokens of a
row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_tw.config import ComputeConfig, ParallelConfig, ScorerConfig, check_model_shape
from megatron_tw.data.blend import Blend, joined_fingerprint
from megatron_tw.data.scores import ScoreRows, check_scores
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.model.build import build_model, load_hf
from megatron_tw.model.flops import Work
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.model.packed_windows import WindowForward
from megatron_tw.parallel.agree import raise_together, share_of
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
        match _chosen(inputs.config.scorer):
            case str(folder):
                LiveFrozenScorer.check_folder(folder, inputs)
            case folders:
                CachedFrozenScorer.check_folders(folders, inputs)

    @classmethod
    def create(cls, inputs: ScorerInputs, trained: TrainedModel) -> Scorer:
        match _chosen(inputs.config.scorer):
            case str(folder):
                return LiveFrozenScorer.load(folder, inputs, trained)
            case folders:
                return CachedFrozenScorer.load(folders, inputs, trained)


@dataclass
class CachedFrozenScorer(Scorer):
    """Short NLLs on disk, as tools/score_tokens.py wrote them, read by the ranks of the last pipeline stage."""

    scores: Sequence[ScoreRows]
    """One for each folder of the rows."""
    rows: Blend
    layout: Layout

    @staticmethod
    def check_folders(folders: Sequence[str], inputs: ScorerInputs) -> None:
        """That each is complete and of the rows of its folder, of these windows and BOS, all together those that the
        run of --load had, and as they were written: the ranks share the reading. Collective over the world."""
        with named("--scores"):
            scores = [ScoreRows(folder) for folder in folders]
        for one, part in zip(scores, inputs.rows.parts, strict=True):
            check_scores(
                one,
                part,
                short_window=inputs.windows.tokens,
                short_stride=inputs.windows.stride,
                bos_id=inputs.bos_id,
            )
        saved, fingerprint = inputs.source.saved, _fingerprint(scores)
        if saved is not None and saved.state.scores not in (None, fingerprint):
            raise ValueError(
                f"--scores {' '.join(folders)}: other scores than those that the run of --load was trained with"
            )
        check_intact(scores)

    @staticmethod
    def load(folders: Sequence[str], inputs: ScorerInputs, trained: TrainedModel) -> "CachedFrozenScorer":
        return CachedFrozenScorer([ScoreRows(folder) for folder in folders], inputs.rows, trained.layout)

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor, documents_D3: Tensor | None = None) -> Tensor | None:
        if not self.layout.is_last_stage:
            return None
        nlls = []
        for index in row_index_R.tolist():
            part, row = self.rows.at(index)
            nlls.append(self.scores[self.rows.folder_of(index)].nll(part.documents_R2[[row]]))
        return torch.cat(nlls).to(rows_RN.device)

    @property
    def fingerprint(self) -> str | None:
        return _fingerprint(self.scores)


@dataclass
class LiveFrozenScorer(Scorer):
    """A fixed second model, on the ranks of the last pipeline stage (None elsewhere), sharded over their tensor- and
    context-parallel groups."""

    windows: WindowForward
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
            check_scorer_vocabulary(inputs.rows.parts[0], folder, scorer.vocab_size)
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

    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor, documents_D3: Tensor | None = None) -> Tensor | None:
        return None if self.model is None else self.windows.short_nll(self.model, rows_RN, documents_D3)

    def work(self, rows: int, documents_D3: Tensor | None = None) -> Work:
        return work_of_windows(self.windows, self.architecture, rows, documents_D3, self.inputs)


def check_intact(scores: Sequence[ScoreRows]) -> None:
    """That scores are as they were written; the ranks share the reading. Collective over the world."""
    error: OSError | ValueError | None = None
    try:
        for one in scores:
            one.check(share_of(len(one)))
    except (OSError, ValueError) as damaged:
        error = damaged
    raise_together(error)


def unpipelined(parallel: ParallelConfig) -> ParallelConfig:
    """The same without a pipeline."""
    return replace(parallel, pipeline_model_parallel_size=1, num_layers_per_virtual_pipeline_stage=None)


def build_unpipelined(
    architecture: Architecture, parallel: ParallelConfig, compute: ComputeConfig, layout: Layout, device: Device
) -> list[TokenWeightedGPT]:
    """A whole model on one pipeline stage's ranks, whatever the pipeline of the run is."""
    return build_model(architecture, parallel, compute, replace(layout, pp_size=1, pp_rank=0, vpp_size=None), device)


def _fingerprint(scores: Sequence[ScoreRows]) -> str:
    return joined_fingerprint([one.header.fingerprint for one in scores])


def _chosen(options: ScorerConfig) -> str | tuple[str, ...]:
    """The folder of a model, or those of scores: which of the two the options ask for."""
    if options.scores is not None and options.scorer_hf is None:
        return options.scores
    if options.scores is None and options.scorer_hf is not None:
        return options.scorer_hf
    raise ValueError(
        "--scorer frozen: expected either --scores (cached) or --scorer-hf (live), got "
        + ("neither" if options.scores is None else "both")
    )
