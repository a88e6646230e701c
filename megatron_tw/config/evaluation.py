"""Options of tools/evaluate.py."""

from dataclasses import dataclass, field

from megatron_tw.config.schema import ModelConfig, ParallelConfig, ScorerConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation: which model, on which rows, and where the result goes."""

    data_path: str
    """Folder of held-out rows that tools/preprocess_data.py wrote."""
    seq_length: int
    """Tokens of a row."""
    output: str
    """New folder for the result: every target's NLL, and a summary."""
    load: str | None = None
    """Folder of a run, whose newest checkpoint is evaluated, or of one checkpoint (null: the model of --load-hf)."""
    verify_checkpoint: bool = True
    """Compare the files of a checkpoint with their checksums before it is read."""
    eval_rows: int | None = None
    """Only the first so many rows (null: all)."""
    micro_batch_size: int = 1
    """Rows of one forward pass of one copy of the model."""
    bos_id: int | None = None
    """Id of the token that rows begin with, which the short windows then begin with too (null: that of the rows'
    tokenizer, else the checkpoint's bos_token_id)."""
    key_tokens: str | None = None
    """Earlier evaluation, with short windows, whose key tokens this model's NLL is reported on (null: this model's
    own)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """All options of an evaluation. With --short-window the NLL in short windows is made too, which choosing key
    tokens needs."""

    evaluation: EvaluationOptions
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
