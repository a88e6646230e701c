"""Options of tools/evaluate.py."""

from dataclasses import dataclass, field, fields

from megatron_tw.config.checks import check_least_context, check_model, check_own_windows
from megatron_tw.config.compute_checks import check_compute
from megatron_tw.config.layout_checks import check_parallel, check_seq_length
from megatron_tw.config.options import flag, options_of
from megatron_tw.config.ranges import outside
from megatron_tw.config.ruler import RulerOptions, check_ruler
from megatron_tw.config.schema import ComputeConfig, ModelConfig, ParallelConfig, WindowsConfig

RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
SUITES: dict[str, tuple[str, ...]] = {
    "loss": (),
    "longppl": (),
    "ruler": RULER_TASKS,
    "mmlu": (),
    "bbh": (),
    "longbench": (),
    "longbench2": (),
}
"""What --tasks takes: a suite's name, for all of it, or that of one of its tasks."""
ROW_SUITES = ("loss", "longppl")
"""Those that read the rows of --data-path."""
HARNESS_SUITES = ("mmlu", "bbh", "longbench", "longbench2")
"""Those of lm-evaluation-harness, which read --eval-data."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation: which model, by what, and where the result goes."""

    tasks: tuple[str, ...] = ("loss",)
    """What is measured: loss (every target's NLL on held-out rows), longppl (LongPPL on them), ruler or some of its 13
    tasks by name, mmlu, bbh, longbench, longbench2."""
    data_path: str | None = None
    """Folder of held-out rows that tools/preprocess_data.py wrote (loss and longppl need it)."""
    seq_length: int | None = None
    """Tokens of a row (loss and longppl need it); for other tasks the longest input (null: the model's length)."""
    output: str
    """New folder for the result: what was asked for, each in its own files, and results.json and results.csv. An
    evaluation that was cut off continues."""
    load: str | None = None
    """Folder of a run, whose newest checkpoint is evaluated, or of one checkpoint (null: the model of --load-hf)."""
    verify_checkpoint: bool = True
    """Compare the files of a checkpoint or an export with their checksums before it is read."""
    eval_rows: int | None = None
    """Only the first so many rows (null: all)."""
    micro_batch_size: int = 1
    """Rows of one forward pass of one copy of the model."""
    eval_data: str | None = None
    """Folder of the data sets of mmlu, bbh, longbench and longbench2, each under its name on the Hugging Face hub, as
    `hf download --repo-type dataset cais/mmlu --local-dir DIR/cais/mmlu` writes it."""
    eval_limit: int | None = None
    """Only the first so many examples of each of their tasks (null: all)."""
    bos_id: int | None = None
    """Id of the token that rows begin with, which the short windows then begin with too (null: that of the rows'
    tokenizer, else the checkpoint's bos_token_id)."""
    key_tokens: str | None = None
    """Earlier evaluation, with short windows, whose key tokens this model's NLL is reported on (null: this model's
    own)."""

    def by_suite(self) -> dict[str, tuple[str, ...]]:
        """The tasks asked for, of each suite that is asked for, in the order of SUITES."""
        found = {}
        for suite, own in SUITES.items():
            asked = own if suite in self.tasks else tuple(name for name in own if name in self.tasks)
            if suite in self.tasks or asked:
                found[suite] = asked
        return found


@dataclass(frozen=True, kw_only=True)
class LongPplOptions:
    """LongPPL: the perplexity on targets that need the long context, and who chooses them (arXiv 2410.23771)."""

    longppl_evaluator: str | None = None
    """Hugging Face folder, or a run's, of the model that chooses the key tokens for all models that are compared (null:
    each model for itself)."""
    longppl_cache: str | None = None
    """Folder that keeps the evaluator's key tokens, for the models that come after (null: they are made each time)."""
    longppl_context: int = 4096
    """Tokens of the truncated context (K): a key token is told by what it loses there."""
    longppl_stride: int = 1024
    """Tokens by which the truncated context moves on: targets see K to K + stride - 1 tokens there."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """All options of an evaluation. With --short-window the NLL in short windows is made too, which choosing key
    tokens needs."""

    evaluation: EvaluationOptions
    longppl: LongPplOptions = field(default_factory=LongPplOptions)
    ruler: RulerOptions = field(default_factory=RulerOptions)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)


READ_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("loss",): ("key_tokens", "short_window", "short_stride", "min_short_context"),
    ROW_SUITES: ("eval_rows", "scoring_micro_batch"),
    ("longppl",): tuple(field.name for field in fields(LongPplOptions)),
    ("loss", "ruler"): ("bos_id",),
    ("ruler",): tuple(field.name for field in fields(RulerOptions)),
    HARNESS_SUITES: ("eval_data", "eval_limit"),
}
"""Options that some suites alone read, by those suites."""


def check_evaluation(config: EvaluationConfig, world_size: int) -> None:
    """Check the options with each other and with the number of ranks.

    Raises:
        ValueError: names the option.
    """
    options = config.evaluation
    check_tasks(options)
    check_read(config)
    check_parallel(config.parallel, world_size)
    check_model(config.model)
    check_compute(config.compute, config.parallel)
    check_least_context(config.windows)
    if options.seq_length is not None:
        check_seq_length(config.parallel, options.seq_length)
        check_own_windows(config.windows, options.seq_length)
    if "longppl" in options.tasks:
        assert options.seq_length is not None
        check_longppl(config.longppl, options.seq_length)
        outside("--output", options.output, longppl_cache=config.longppl.longppl_cache)
    check_ruler(config.ruler)
    for name, value in (
        ("eval_rows", options.eval_rows),
        ("eval_limit", options.eval_limit),
        ("micro_batch_size", options.micro_batch_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)}: expected 1 or more, got {value}")


def check_tasks(options: EvaluationOptions) -> None:
    """That every task is known, and has the options that it needs.

    Raises:
        ValueError: names the option; of an unknown task, lists the known ones.
    """
    known = [*SUITES, *(name for own in SUITES.values() for name in own)]
    for name in options.tasks:
        if name not in known:
            raise ValueError(f"--tasks: unknown task {name}; known are {', '.join(known)}")
    if not options.tasks:
        raise ValueError(f"--tasks: expected some of {', '.join(known)}, got none")
    for suite in ROW_SUITES:
        for name, value in (("seq_length", options.seq_length), ("data_path", options.data_path)):
            if suite in options.tasks and value is None:
                raise ValueError(f"missing {flag(name)}: --tasks {suite} reads rows")


def check_read(config: EvaluationConfig) -> None:
    """That each option that is given, and is for some suites alone, is read by one that is asked for. What places or
    computes the model, --seq-length and --data-path may stand in a file of options for every task.

    Raises:
        ValueError: names the option, and the tasks that read it.
    """
    suites, defaults = config.evaluation.by_suite(), options_of(EvaluationConfig)
    for readers, names in READ_BY.items():
        for name in names:
            value = getattr(getattr(config, defaults[name].group), name)
            if value != defaults[name].default and not any(suite in suites for suite in readers):
                said = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"{flag(name)} {said}: expected --tasks {' or '.join(readers)} with it")
    if config.ruler.ruler_backend != "hf" and config.ruler.ruler_scoring != "generation":
        raise ValueError(
            f"--ruler-backend {config.ruler.ruler_backend}: expected --ruler-scoring generation with it, got "
            f"{config.ruler.ruler_scoring}"
        )


def check_longppl(longppl: LongPplOptions, seq_length: int) -> None:
    """The truncated contexts in rows of `seq_length` tokens.

    Raises:
        ValueError: names the option.
    """
    context, stride = longppl.longppl_context, longppl.longppl_stride
    for name, value in (("longppl_context", context), ("longppl_stride", stride)):
        if value < 1:
            raise ValueError(f"{flag(name)}: expected 1 or more, got {value}")
    if context + stride >= seq_length:
        raise ValueError(
            f"--longppl-context {context} + --longppl-stride {stride}: expected less than --seq-length {seq_length}: "
            "targets before have no longer context to gain from, so none would be key"
        )
    if longppl.longppl_cache is not None and longppl.longppl_evaluator is None:
        raise ValueError(f"--longppl-cache {longppl.longppl_cache}: expected --longppl-evaluator with it, got none")
