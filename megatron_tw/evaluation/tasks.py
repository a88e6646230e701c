"""What tools/evaluate.py can measure: one function a suite of tasks, and what they are given.

A suite's function is called before the model is loaded, with the options and the model's headers. It checks all that
can be checked, opens its files, and returns what is to be done with the loaded model:

    prepare(setting, names) -> run        names: the suite's tasks that were asked for
    run(model) -> Found                   on every rank; what it found, on the writing rank; elsewhere anything

To add one: a name in config/evaluation.py (SUITES), a line in `_suites`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.data.tokenizer import fingerprint_of, load_tokenizer
from megatron_tw.evaluation.kept import Kept, is_writer
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.evaluation.results import Record
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.source import ModelSource


@dataclass(frozen=True)
class Setting:
    """What is known before the model is loaded: nothing of it holds a GPU's memory or a process group of the layout."""

    config: EvaluationConfig
    source: ModelSource
    """Architecture, and where the weights and the tokenizer are."""
    device: Device
    facts: dict[str, str] = field(default_factory=dict)
    """What the result depends on besides options and model, such as fingerprints of data, by name: a suite adds its
    own."""

    @property
    def longest_input(self) -> int:
        """Tokens that the model may be given: --seq-length, else what the model was made or last trained for."""
        return self.config.evaluation.seq_length or model_length(self.source)


@dataclass(frozen=True)
class Model:
    """The loaded model on this rank."""

    config: EvaluationConfig
    source: ModelSource
    layout: Layout
    chunks: Sequence[TokenWeightedGPT]
    device: Device
    kept: Kept
    """For finished parts of long work."""
    long_nll: dict[str, Tensor | None] = field(default_factory=dict)
    """[R, T] fp32 of the rows of --data-path, on the writing rank, from the suite `loss` where that ran before: others
    need not make it again."""

    @property
    def writes(self) -> bool:
        """Whether this rank holds the results in the end: the last pipeline stage's first."""
        return is_writer(self.layout)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a suite found."""

    records: tuple[Record, ...] = ()
    """Its lines of results.json."""
    nlls: EvaluationResult | None = None
    """Of the loss suite: becomes evaluation.json and nll.npz."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of the evaluation's folder, by name."""
    summary: str | None = None
    """For people; None: the records as lines."""


class NeedsOtherModel(ABC):
    """A `run` that uses another model before the evaluated one is loaded, so that the two need not fit together."""

    @abstractmethod
    def use_other_model(self, kept: Kept) -> None:
        """On every rank, after all suites are prepared. What is loaded is gone again when this returns."""

    @abstractmethod
    def __call__(self, model: Model) -> Found:
        """See `tasks`."""


class WithoutModel(ABC):
    """A `run` that asks for no parallel model. It runs before one is loaded for others."""

    @abstractmethod
    def __call__(self, kept: Kept) -> Found:
        """In a world of one rank. What is loaded is gone again when this returns."""


Run = Callable[[Model], Found]
Prepare = Callable[[Setting, Sequence[str]], Run | WithoutModel]


def model_length(source: ModelSource) -> int:
    """Tokens of the context that the model was last trained for, or that its config.json names."""
    if source.checkpoint is not None:
        return max(source.checkpoint.state.seq_length, source.architecture.max_position_embeddings)
    return source.architecture.max_position_embeddings


def check_model_length(setting: Setting, tokens: int, option: str = "--seq-length") -> None:
    """That inputs of `tokens` are within the model's context, or that an option stretches it.

    Raises:
        ValueError: names the option, and the model's context.
    """
    model, length = setting.config.model, model_length(setting.source)
    stretched = model.rope_scaling_type is not None or model.rotary_base is not None
    if tokens > length and not stretched:
        raise ValueError(
            f"{option} {tokens}: {setting.source.name} has a context of {length} tokens; --rope-scaling-type or "
            "--rotary-base stretches it, and --rope-scaling-type none says that it is to be tried as it is"
        )


def prepare(suite: str, setting: Setting, names: Sequence[str]) -> Run | WithoutModel:
    """See above.

    Raises:
        ValueError: an option or file that does not fit.
    """
    return _suites()[suite](setting, names)


def _suites() -> dict[str, Prepare]:
    from megatron_tw.evaluation.harness import suites
    from megatron_tw.evaluation.long_ppl import prepare_longppl
    from megatron_tw.evaluation.loss import prepare_loss
    from megatron_tw.evaluation.ruler.suite import prepare_ruler

    return {
        "loss": prepare_loss,
        "longppl": prepare_longppl,
        "ruler": prepare_ruler,
        "mmlu": suites.prepare_mmlu,
        "bbh": suites.prepare_bbh,
        "longbench": suites.prepare_longbench,
        "longbench2": suites.prepare_longbench2,
    }


def tokenizer_folder(source: ModelSource, suite: str) -> Path:
    """The folder of the model's tokenizer, for a suite that makes prompts.

    Raises:
        ValueError: nobody kept it, or it has ids that the model does not have.
    """
    folder = source.tokenizer_dir
    if folder is None or fingerprint_of(folder) is None:
        raise ValueError(f"--tasks {suite}: {source.name} holds no tokenizer, and the prompts need one")
    tokenizer, vocab_size = load_tokenizer(folder), source.architecture.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--tasks {suite}: the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model {vocab_size}"
        )
    return folder
