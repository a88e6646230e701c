"""What a training run starts from, without files: rows of made-up ids, a model without weights, scores without numbers.

Shapes: R rows, N tokens of a row, T = N - 1 targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_tw.config import RunConfig, check_config, data_parallel_size
from megatron_tw.data.blend import Blend
from megatron_tw.data.rows import Row, TokenRows
from megatron_tw.data.rows_format import RowCounts, RowsHeader
from megatron_tw.data.scores import ScoreRows
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.source import ModelSource
from megatron_tw.training.inputs import Inputs, with_window
from megatron_tw.training.scorers import (
    CachedFrozenScorer,
    LiveFrozenScorer,
    Scorer,
    ScorerInputs,
    ScorerMaker,
    TrainedModel,
    check_scorer_options,
    open_scorer,
)
from megatron_tw.training.settings import Settings
from megatron_tw.weighting.options import schedule_from_options


class MadeUpRows(TokenRows):
    """As many rows as a step takes; row i holds ids that follow from i, behind BOS where there is one."""

    def __init__(self, *, num_rows: int, seq_length: int, vocab_size: int, bos_id: int | None) -> None:
        self.path = Path("made-up rows")
        self.header = RowsHeader(
            seq_length=seq_length,
            vocab_size=vocab_size,
            largest_id=vocab_size - 1,
            bos_id=bos_id,
            dtype="int32",
            tokenizer=None,
            counts=RowCounts(
                documents=num_rows, tokens=num_rows * seq_length, rows=num_rows, documents_too_short=0, tokens_dropped=0
            ),
            fingerprint="",
        )
        self.documents_R2 = np.zeros((num_rows, 2), dtype=np.int64)

    def read(self, index: int) -> Row:
        assert self.header.vocab_size is not None
        row_N = (np.arange(self.header.seq_length, dtype=np.int64) * 7919 + index) % self.header.vocab_size
        if self.header.bos_id is not None:
            row_N[0] = self.header.bos_id
        return Row(row_N)


@dataclass(frozen=True)
class MadeUpSource(ModelSource):
    """A model whose weights nobody reads."""

    def fill(
        self, chunks: Sequence[TokenWeightedGPT], layout: Layout, *state: Any, parallel_load: bool = False
    ) -> None:
        return


class _MadeUpScores(ScoreRows):
    """Short NLLs of made-up rows, as they come from disk."""

    def __init__(self, targets: int) -> None:
        self.targets = targets

    def nll(self, documents_R2: npt.NDArray[np.int64]) -> Tensor:
        return torch.zeros(len(documents_R2), self.targets)


def make_up_inputs(
    config: RunConfig,
    architecture: Architecture,
    *,
    world_size: int,
    old_context: int | None,
    scorer_architecture: Architecture | None,
) -> Inputs:
    """What `open_inputs` makes from files, checked in the same way where there is something to check.

    scorer_architecture: of the model of --scorer-hf.

    Raises:
        ValueError: options that contradict each other, or the number of ranks; names the option.
    """
    config = _with_a_model(config)
    check_config(config, world_size)
    length = config.data.seq_length
    schedule = schedule_from_options(config.weighting, seq_length=length)
    check_scorer_options(config, needed=schedule.needs_scorer)
    architecture.check_length(length, "--seq-length")
    source = MadeUpSource(
        architecture.with_rope(config.model, length),
        None,
        None,
        start_context=old_context or architecture.max_position_embeddings,
    )
    if schedule.needs_scorer:
        config = with_window(config, source)
    dp_size = data_parallel_size(config.parallel, world_size)
    bos_id = architecture.bos_token_id if config.data.bos_id is None else config.data.bos_id
    rows = MadeUpRows(
        num_rows=config.train.batch_size(dp_size), seq_length=length, vocab_size=architecture.vocab_size, bos_id=bos_id
    )
    settings = Settings.decide(config, rows=rows, source=source, schedule=schedule, dp_size=dp_size)
    make_scorer = None
    if schedule.needs_scorer and settings.windows is not None:
        inputs = ScorerInputs(
            config=config, windows=settings.windows, rows=Blend([rows]), bos_id=settings.bos_id, source=source
        )
        make_scorer = _scorer_maker(inputs, scorer_architecture)
    return Inputs(
        rows=Blend([rows]),
        source=source,
        schedule=schedule,
        settings=settings,
        make_scorer=make_scorer,
        valid_rows=None,
        tokenizer_dir=None,
    )


def _scorer_maker(inputs: ScorerInputs, scorer_architecture: Architecture | None) -> ScorerMaker:
    """What `open_scorer` answers, for frozen scorers without their folder."""
    scorer, length = inputs.config.scorer, inputs.config.data.seq_length
    if scorer.scores is not None:

        def cached(trained: TrainedModel) -> Scorer:
            return CachedFrozenScorer([_MadeUpScores(length - 1)], inputs.rows, trained.layout)

        return cached
    if scorer.scorer_hf is not None:
        if scorer_architecture is None:
            raise ValueError(f"--scorer-hf {scorer.scorer_hf}: a simulation needs the architecture of that model")
        LiveFrozenScorer.check_architecture(scorer_architecture, inputs)

        def live(trained: TrainedModel) -> Scorer:
            return LiveFrozenScorer.build(scorer_architecture, inputs, trained)

        return live
    return open_scorer(inputs)


def _with_a_model(config: RunConfig) -> RunConfig:
    """The options with a name in place of a model's folder, where there is none to check."""
    checkpoint = config.checkpoint
    if config.model.load_hf or checkpoint.load or checkpoint.pretrained_checkpoint:
        return config
    return replace(config, model=replace(config.model, load_hf="made-up model"))
