"""What a scorer is, and which there are. R = rows, N = tokens of a row, T = N - 1 targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_tw.config import RunConfig, ScorerConfig, ShortWindows, check_own_windows
from megatron_tw.config.options import flag
from megatron_tw.data.blend import Blend
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.flops import Work, packed_scoring_work, scoring_work
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.packed_windows import PackedWindowForward, WindowForward, window_forward
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class ScorerInputs:
    """What a scorer is checked against and made from; all of it is there before anything is allocated.

    bos_id: of the token that rows begin with, None where they begin with none. source: of the model in training.
    """

    config: RunConfig
    windows: ShortWindows
    rows: Blend
    bos_id: int | None
    source: ModelSource


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The model in training as a scorer may use it.

    model: this rank's chunks, wrapped for training. chunks: the same without the wrapping.
    """

    model: Sequence[torch.nn.Module]
    chunks: Sequence[TokenWeightedGPT]
    layout: Layout
    device: Device


class Scorer(ABC):
    """What the training step asks of a scorer. A new one says `short_nll` and `create` (see `ScorerKind`), and of the
    rest what it needs.

    options: fields of ScorerConfig that it reads; others may not be given with it.
    """

    options: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check(cls, inputs: ScorerInputs) -> None:
        """Before anything is allocated: raise ValueError, which names the option, where the scorer does not fit."""
        return

    @abstractmethod
    def short_nll(self, rows_RN: Tensor, row_index_R: Tensor, documents_D3: Tensor | None = None) -> Tensor | None:
        """Short NLL [R, T] fp32 before the step; None before the last pipeline stage. Collective over the replica.

        rows_RN: int64 on the device. row_index_R: the rows' places in the data set, on the CPU. documents_D3: of packed
        rows, see `Batch.documents`; None: each row is one document.
        """

    def complete(self, short_RT: Tensor, long_RT: Tensor, document_starts_RT: Tensor | None = None) -> Tensor:
        """Short NLL of all targets, once the long NLL is known. document_starts_RT: of packed rows, see
        `token_weights`."""
        return short_RT

    def work(self, rows: int, documents_D3: Tensor | None = None) -> Work:
        """FLOPs of `short_nll` for the `rows` rows of a step, on all ranks; for packed rows, for the given documents of
        this replica, on its ranks."""
        return Work()

    def after_update(self) -> None:
        """The model in training has just been updated."""
        return

    def start_over(self) -> None:
        """The model has just been loaded from a checkpoint that holds nothing of this scorer."""
        return

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the scorer (megatron.core.dist_checkpointing); empty for most."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `sharded_state` named."""
        return

    @property
    def fingerprint(self) -> str | None:
        """Of short NLLs that were made beforehand: a run goes on only with the same ones. None for most."""
        return None


class ScorerKind(Protocol):
    """What is registered under a name: a subclass of Scorer with `create`, or a class that chooses between some."""

    @property
    def options(self) -> frozenset[str]: ...

    def check(self, inputs: ScorerInputs) -> None: ...

    def create(self, inputs: ScorerInputs, trained: TrainedModel) -> Scorer:
        """The scorer of a run whose inputs `check` has seen. Collective over the world."""


ScorerMaker = Callable[[TrainedModel], Scorer]
Kind = TypeVar("Kind", bound=ScorerKind)

_SCORERS: dict[str, ScorerKind] = {}


def register_scorer(name: str) -> Callable[[Kind], Kind]:
    """Decorator: what `--scorer NAME` stands for."""

    def register(kind: Kind) -> Kind:
        assert name not in _SCORERS, f"two scorers named {name}"
        _SCORERS[name] = kind
        return kind

    return register


def check_scorer_options(config: RunConfig, *, needed: bool) -> None:
    """That --scorer names one, that no other scorer's options are given, and that a weighting which compares two NLLs
    has windows, while another has no scorer.

    needed: whether the weighting compares, at any step.

    Raises:
        ValueError: names the option.
    """
    options, name = config.scorer, config.scorer.scorer
    if name not in _SCORERS:
        raise ValueError(f"--scorer: expected one of {', '.join(sorted(_SCORERS))}, got {name}")
    for field in fields(options):
        if field.name in {"scorer"} | _SCORERS[name].options or getattr(options, field.name) == field.default:
            continue
        users = " or ".join(other for other, kind in _SCORERS.items() if field.name in kind.options)
        raise ValueError(f"{flag(field.name)}: is for --scorer {users}, got --scorer {name}")
    if needed and config.windows.short_window is None and config.checkpoint.pretrained_checkpoint is None:
        raise ValueError("--short-window: the weighting needs a scorer's windows, got none")
    if not needed:
        if name != ScorerConfig.scorer:
            raise ValueError(f"--scorer {name}: the weighting uses no scorer's NLL")
        check_own_windows(config.windows, config.data.seq_length)


def reads_updated_weights(name: str) -> bool:
    """Whether `--scorer NAME` does something right after each update, when --overlap-param-gather has not gathered the
    weights yet."""
    own = getattr(_SCORERS[name], "after_update", Scorer.after_update)
    return own is not Scorer.after_update


def open_scorer(inputs: ScorerInputs) -> ScorerMaker:
    """Check the scorer that --scorer names; the answer makes it once the model in training stands.

    Raises:
        ValueError: it does not fit the run; names the option.
    """
    kind = _SCORERS[inputs.config.scorer.scorer]
    kind.check(inputs)
    return partial(kind.create, inputs)


def work_of_windows(
    windows: WindowForward, architecture: Architecture, rows: int, documents_D3: Tensor | None, inputs: ScorerInputs
) -> Work:
    """`Scorer.work` of short windows by a model of this architecture."""
    if isinstance(windows, PackedWindowForward):
        assert documents_D3 is not None
        return packed_scoring_work(architecture, windows, documents_D3)
    return scoring_work(
        architecture,
        windows.windows,
        rows=rows,
        copies=windows.layout.dp_size,
        parallel=inputs.config.parallel,
        scoring_micro_batch=windows.micro_batch,
        multiple=windows.micro_batches_multiple,
    )


def short_window_forward(
    inputs: ScorerInputs, trained: TrainedModel, *, include_first: bool, pipelined: bool = True
) -> WindowForward:
    """The short-window forward of this run's rows (see `ShortWindowForward.create`). Collective over the world."""
    windows = inputs.windows
    return window_forward(
        inputs.rows.header,
        windows.tokens,
        windows.stride,
        include_first=include_first,
        bos_id=inputs.bos_id,
        layout=trained.layout,
        sequence_parallel=inputs.config.parallel.uses_sequence_parallel,
        scoring_micro_batch=windows.micro_batch,
        pipelined=pipelined,
    )
