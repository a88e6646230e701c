"""Options of tools/score_tokens.py."""

from dataclasses import dataclass, field

from megatron_tw.config.checks import check_model, check_windows
from megatron_tw.config.compute_checks import check_compute
from megatron_tw.config.layout_checks import check_parallel
from megatron_tw.config.schema import ComputeConfig, ModelConfig, ParallelConfig, ShortWindows, WindowsConfig


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Scoring: which rows, and where their short NLLs go. The scorer is the model of --load-hf."""

    data_path: str
    """Folder of rows that tools/preprocess_data.py wrote."""
    output: str
    """New folder for the short NLLs; a run that was cut off continues."""
    bos_id: int | None = None
    """Id of the token that rows begin with, which the short windows then begin with too (null: that of the rows'
    tokenizer, else the scorer's bos_token_id)."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """All options of scoring rows with a frozen model, which runs alone or under torchrun."""

    scoring: ScoringOptions
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)

    @property
    def scorer_folder(self) -> str:
        """--load-hf. Raises ValueError without it."""
        if self.model.load_hf is None:
            raise ValueError("--load-hf: expected the Hugging Face folder of the scorer, got none")
        return self.model.load_hf

    def windows_of(self, seq_length: int) -> ShortWindows:
        """The windows of rows of `seq_length` tokens. Raises ValueError where they do not fit, or there are none."""
        check_windows(self.windows, seq_length)
        windows = self.windows.of_rows(seq_length)
        if windows is None:
            raise ValueError("--short-window: expected the tokens of a window, got none")
        return windows


def check_scoring(config: ScoringConfig, world_size: int) -> None:
    """Check the options with each other and with the number of ranks; the windows need the length of the rows.

    Raises:
        ValueError: names the option.
    """
    check_parallel(config.parallel, world_size)
    check_model(config.model)
    check_compute(config.compute, config.parallel)
