"""Options of tools/score_tokens.py."""

from dataclasses import dataclass, field

from megatron_tw.config.schema import ModelConfig, ParallelConfig, ScorerConfig


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Scoring: which rows, in which windows, and where the scores go. The scorer is the model of --load-hf."""

    data_path: str
    """Folder of rows that tools/preprocess_data.py wrote."""
    output: str
    """New folder for the scores; a run that was cut off goes on where it stopped."""
    short_window: int
    """Tokens of a short window: the most that the scorer sees."""
    short_stride: int | None = None
    """Tokens from one window to the next (null: (1 - window/seq) x window, or less to keep the least context)."""
    min_short_context: int | None = None
    """Least context that a target beyond the first window must have, in tokens (null: a quarter of the window)."""
    scoring_micro_batch: int | None = None
    """Windows of one forward pass on a rank (null: all that a row gives it)."""
    bos_id: int | None = None
    """Id of the token that rows begin with, which the short windows then begin with too (null: that of the rows'
    tokenizer, else the scorer's bos_token_id)."""

    @property
    def windows(self) -> ScorerConfig:
        """The windows as training names them: the same checks and the same default stride."""
        return ScorerConfig(
            scorer="frozen",
            short_window=self.short_window,
            short_stride=self.short_stride,
            min_short_context=self.min_short_context,
            scoring_micro_batch=self.scoring_micro_batch,
        )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """All options of scoring rows with a frozen model, which runs alone or under torchrun."""

    scoring: ScoringOptions
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
