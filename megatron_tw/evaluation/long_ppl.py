"""LongPPL as published: the perplexity on the targets for which a long context matters.

Source: Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?" (ICLR 2025, arXiv 2410.23771).
A target is key where, under an evaluator model,

    log p(target | all before it) - log p(target | truncated context) > 2   and   log p(target | all before it) > -2

The truncated context of the targets K + k s .. K + (k+1) s - 1 begins at position k s, so it has K to K + s - 1 tokens
(K = 4096, s = 1024). For k = 0 it is all before the target: nothing before K + s is key. LongPPL of a model is
exp(its mean NLL over the key tokens), of all rows together.

The evaluator is the evaluated model itself, or another one, whose key tokens are kept on disk for all the models that
are compared:

    CACHE/KEY.npz   key [R, T] bool packed by eight, rows, targets; KEY: of rows, evaluator, settings
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_tw.config import ModelConfig
from megatron_tw.config.evaluation import EvaluationConfig, LongPplOptions
from megatron_tw.data.files import numpy_file
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.evaluation.compare import paired_difference
from megatron_tw.evaluation.kept import Kept, is_writer
from megatron_tw.evaluation.key_tokens import GAIN, LONGPPL_MAX_LONG_NLL, key_tokens, long_ppl
from megatron_tw.evaluation.loss import nll_of_rows
from megatron_tw.evaluation.position import mean_nll
from megatron_tw.evaluation.results import Record
from megatron_tw.evaluation.tasks import Found, Model, NeedsOtherModel, Run, Setting, check_model_length
from megatron_tw.model.forward import ShortWindowForward
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout, destroy_layout
from megatron_tw.runtime.fingerprint import model_fingerprint
from megatron_tw.runtime.opening import check_attention, open_model, open_rows
from megatron_tw.runtime.source import ModelSource, open_source
from megatron_tw.weighting import Window

KEY_FILE = "longppl_key_tokens.npz"
"""In the evaluation's folder: key [R, T] bool."""


def truncated_contexts(seq_length: int, context: int, stride: int) -> tuple[Window, ...]:
    """The truncated contexts that differ from the whole one, with the targets that are scored in each.

    >>> for window in truncated_contexts(11, 4, 3):
    ...     print(window)
    Window(start=3, length=7, first_target=7, last_target=9)
    Window(start=6, length=5, first_target=10, last_target=10)
    """
    windows = []
    for start in range(stride, seq_length - context, stride):
        end = min(start + context + stride, seq_length)
        windows.append(Window(start, end - start, start + context, end - 1))
    return tuple(windows)


def prepare_longppl(setting: Setting, names: Sequence[str]) -> Run:
    """The suite longppl. See `tasks`."""
    config = setting.config
    options, longppl = config.evaluation, config.longppl
    assert options.data_path is not None
    assert options.seq_length is not None
    rows = open_rows("--data-path", options.data_path, setting.source, options.seq_length)
    if rows.header.marks:
        raise ValueError(
            f"--tasks longppl: expected rows of one document, all of whose targets count, as published; {rows.path} "
            f"holds {'packed' if rows.header.packing is not None else 'masked'} rows"
        )
    check_model_length(setting, options.seq_length)
    check_attention(config.compute, setting.source, setting.device, options.seq_length)
    num_rows = len(rows) if options.eval_rows is None else min(options.eval_rows, len(rows))
    setting.facts["rows"] = rows.header.fingerprint
    if longppl.longppl_evaluator is None:
        return _OwnEvaluator(config, rows, num_rows)
    evaluator = open_evaluator(longppl.longppl_evaluator, rows, options.seq_length)
    check_attention(config.compute, evaluator, setting.device, options.seq_length)
    identity = {
        "rows": rows.header.fingerprint,
        "num_rows": num_rows,
        "evaluator": model_fingerprint(evaluator),
        "bf16": config.compute.bf16,
        **definition(longppl),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    setting.facts["longppl_evaluator"] = identity["evaluator"]
    cache = CachedKeyTokens(Path(longppl.longppl_cache), key) if longppl.longppl_cache is not None else None
    error: OSError | ValueError | None = None
    if cache is not None and dist.get_rank() == 0 and cache.file.is_file():
        try:
            cache.read(num_rows, options.seq_length - 1)
        except (OSError, ValueError) as damaged:
            error = damaged
    raise_together(error)
    return _NamedEvaluator(config, rows, num_rows, setting.device, evaluator, cache)


def definition(longppl: LongPplOptions) -> dict[str, Any]:
    """What decides which targets are key, besides rows and evaluator."""
    return {
        "context": longppl.longppl_context,
        "stride": longppl.longppl_stride,
        "gain": GAIN,
        "max_long_nll": LONGPPL_MAX_LONG_NLL,
    }


def open_evaluator(folder: str, rows: TokenRows, seq_length: int) -> ModelSource:
    """The evaluator's headers: a Hugging Face folder, or a run's. Collective over the world.

    Raises:
        ValueError: no model there, one of another vocabulary than the rows, or of a shorter context.
    """
    option = "--longppl-evaluator"
    try:
        if (Path(folder) / "config.json").is_file():
            source = open_source(ModelConfig(load_hf=folder), load=None, seq_length=seq_length)
        else:
            source = open_source(ModelConfig(), load=folder, seq_length=seq_length)
        check_scorer_vocabulary(rows, source.tokenizer_dir or folder, source.architecture.vocab_size)
        source.architecture.check_length(seq_length, "--seq-length")
    except ValueError as error:
        text = str(error)
        for prefix in (f"--load {folder}: ", "--load-hf: ", f"{folder}: "):
            text = text.removeprefix(prefix)
        raise ValueError(f"{option} {folder}: {text}") from error
    length = source.architecture.max_position_embeddings
    if source.checkpoint is not None:
        length = max(length, source.checkpoint.state.seq_length)
    if seq_length > length:
        raise ValueError(f"{option} {folder}: its context is {length} tokens, --seq-length {seq_length}")
    return source


class CachedKeyTokens:
    """One evaluator's key tokens of one set of rows, on disk."""

    def __init__(self, folder: Path, key: str) -> None:
        self.file = folder / f"{key}.npz"

    def read(self, rows: int, targets: int) -> npt.NDArray[np.bool_]:
        """[R, T].

        Raises:
            ValueError: the file is damaged, or of other rows.
        """
        arrays = numpy_file(self.file.read_bytes(), self.file)
        packed = arrays.get("key") if isinstance(arrays, dict) else None
        if packed is None or packed.dtype != np.uint8 or packed.shape != (rows, -(-targets // 8)):
            raise ValueError(f"--longppl-cache: {self.file} is damaged; remove it to make it anew")
        return np.unpackbits(packed, axis=1, count=targets).astype(bool)

    def write(self, key_RT: npt.NDArray[np.bool_]) -> None:
        """Complete or not at all; of two that write the same, the last one stays."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, key=np.packbits(key_RT, axis=1))
        temporary.replace(self.file)


def choose(
    config: EvaluationConfig,
    rows: TokenRows,
    num_rows: int,
    layout: Layout,
    chunks: Sequence[TokenWeightedGPT],
    device: Device,
    *,
    kept: Kept,
    name: str,
    long_nll: torch.Tensor | None = None,
    make_long: bool = True,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]] | None:
    """The key tokens [R, T] under the model in `chunks`, and its long NLL [R, T]; None but on the writing rank.
    Collective over the world.

    long_nll: where it is known (make_long=False), on the writing rank.
    """
    options, longppl = config.evaluation, config.longppl
    seq_length = rows.header.seq_length
    context, stride = longppl.longppl_context, longppl.longppl_stride
    short_forward = ShortWindowForward.over(
        truncated_contexts(seq_length, context, stride),
        seq_length=seq_length,
        longest=context + stride,
        bos_id=None,  # as published: the truncated context begins with whatever token stands there
        layout=layout,
        sequence_parallel=config.parallel.uses_sequence_parallel,
        scoring_micro_batch=config.windows.scoring_micro_batch,
    )
    nlls = nll_of_rows(
        chunks,
        rows,
        num_rows,
        layout,
        device,
        micro_batch_size=options.micro_batch_size,
        short_forward=short_forward,
        long=make_long,
        what="LongPPL",
        kept=kept,
        name=name,
    )
    if nlls is None:
        return None
    long = nlls.long if make_long else long_nll
    assert long is not None
    assert nlls.short is not None
    long_RT, short_RT = long.numpy(), nlls.short.numpy().copy()
    first = context + stride - 1  # column of the first target whose truncated context is not all before it
    short_RT[:, :first] = long_RT[:, :first]
    return key_tokens(long_RT, short_RT, gain=GAIN, max_long_nll=LONGPPL_MAX_LONG_NLL), long_RT


@dataclass(frozen=True)
class _OwnEvaluator:
    """The evaluated model chooses for itself."""

    config: EvaluationConfig
    rows: TokenRows
    num_rows: int

    def __call__(self, model: Model) -> Found:
        chosen = choose(
            self.config,
            self.rows,
            self.num_rows,
            model.layout,
            model.chunks,
            model.device,
            kept=model.kept,
            name="longppl",
            long_nll=model.long_nll.get("loss"),
            make_long="loss" not in model.long_nll,
        )
        return Found() if chosen is None else found(self.config, *chosen, "the model itself")


@dataclass
class _NamedEvaluator(NeedsOtherModel):
    """Another model chooses, before the evaluated one is loaded; or its choice is read from the cache."""

    config: EvaluationConfig
    rows: TokenRows
    num_rows: int
    device: Device
    evaluator: ModelSource
    cache: CachedKeyTokens | None
    key: npt.NDArray[np.bool_] | None = None
    """[R, T], on the writing rank."""

    def use_other_model(self, kept: Kept) -> None:
        if self._cached():
            return
        config = self.config
        layout, chunks = open_model(self.evaluator, config.parallel, config.compute, self.device)
        chosen = choose(
            config, self.rows, self.num_rows, layout, chunks, self.device, kept=kept, name="longppl-evaluator"
        )
        error: OSError | None = None
        if chosen is not None:
            self.key = chosen[0]
            try:
                if self.cache is not None:
                    self.cache.write(self.key)
            except OSError as failed:
                error = failed
        raise_together(error)
        del chunks
        destroy_layout()

    def _cached(self) -> bool:
        """Whether the cache has the key tokens, as rank 0 sees it."""
        answer = [self.cache is not None and self.cache.file.is_file()]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def __call__(self, model: Model) -> Found:
        if "loss" in model.long_nll:
            long = model.long_nll["loss"]
        else:
            nlls = nll_of_rows(
                model.chunks,
                self.rows,
                self.num_rows,
                model.layout,
                model.device,
                micro_batch_size=self.config.evaluation.micro_batch_size,
                what="LongPPL",
                kept=model.kept,
                name="longppl",
            )
            long = None if nlls is None else nlls.long
        error: ValueError | None = None
        if is_writer(model.layout) and self.key is None:
            assert self.cache is not None
            try:
                self.key = self.cache.read(self.num_rows, self.rows.header.seq_length - 1)
            except ValueError as damaged:
                error = damaged
        raise_together(error)
        if long is None or self.key is None:
            return Found()
        return found(self.config, self.key, long.numpy(), self.evaluator.name)


def found(
    config: EvaluationConfig, key_RT: npt.NDArray[np.bool_], long_RT: npt.NDArray[np.float32], evaluator: str
) -> Found:
    """The records: LongPPL, with its standard error over rows, the share of key tokens, and plain perplexity."""
    value, count, length = long_ppl(long_RT, key_RT), int(key_RT.sum()), long_RT.shape[1] + 1
    spread = paired_difference(long_RT, np.zeros_like(long_RT), key_RT)
    error = spread.standard_error if spread is not None else None
    mean = mean_nll(long_RT, np.ones_like(key_RT))
    assert mean is not None
    records = (
        Record(
            suite="longppl",
            task="all",
            length=length,
            metric="longppl",
            value=value,
            stderr=None if value is None or error is None else value * error,
            samples=count,
            not_run=None if count else f"no target is a key token under {evaluator}",
        ),
        Record(
            suite="longppl", task="all", length=length, metric="key_share", value=count / key_RT.size,
            samples=key_RT.size,
        ),
        Record(
            suite="longppl", task="all", length=length, metric="perplexity", value=math.exp(mean), samples=key_RT.size
        ),
    )  # fmt: skip
    return Found(records=records, files={KEY_FILE: _npz(key=key_RT)})


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()
