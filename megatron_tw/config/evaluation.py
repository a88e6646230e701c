"""Options of tools/evaluate.py."""

from dataclasses import dataclass, field

from megatron_tw.config.checks import check_compute, check_model, check_own_windows, check_parallel, check_seq_length
from megatron_tw.config.options import flag
from megatron_tw.config.schema import ComputeConfig, ModelConfig, ParallelConfig, WindowsConfig


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
    """Compare the files of a checkpoint or an export with their checksums before it is read."""
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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)


def check_evaluation(config: EvaluationConfig, world_size: int) -> None:
    """Check the options with each other and with the number of ranks.

    Raises:
        ValueError: names the option.
    """
    options = config.evaluation
    check_parallel(config.parallel, world_size)
    check_model(config.model)
    check_compute(config.compute, config.parallel)
    check_seq_length(config.parallel, options.seq_length)
    check_own_windows(config.windows, options.seq_length)
    for name, value in (("eval_rows", options.eval_rows), ("micro_batch_size", options.micro_batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)}: expected 1 or more, got {value}")
