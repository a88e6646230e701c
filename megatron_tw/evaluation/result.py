"""The NLLs of one model on the held-out rows, on disk.

    DIR/evaluation.json   versioned header: what was evaluated, and the figures most people want
    DIR/nll.npz           row_index [R] int64, long_nll [R, T] fp32, valid [R, T] bool, and optional:
                          short_nll [R, T] fp32, top1 [R, T] bool

Every other figure (key tokens, LongPPL, comparisons) is made from these, so that models can be compared later, on any
fixed set of targets.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tw.data.files import header_json, new_folder, numpy_file, read_header
from megatron_tw.evaluation.position import mean_nll, nll_by_position, position_edges

FORMAT = "megatron_tw evaluation"
FORMAT_VERSION = 2
"""Version 1 had no checksum in its header."""
HEADER_FILE = "evaluation.json"
NLL_FILE = "nll.npz"
FIGURES = ("rows", "targets", "mean_nll", "perplexity", "nll_by_position")
"""In the header file besides the header: for people, never read back."""
ARRAYS = {
    "row_index": ("R", np.int64),
    "long_nll": ("RT", np.float32),
    "short_nll": ("RT", np.float32),  # optional
    "valid": ("RT", np.bool_),
    "top1": ("RT", np.bool_),  # optional
}
"""Of nll.npz, and the attributes of EvaluationResult: axes and dtype."""


@dataclass(frozen=True, kw_only=True)
class EvaluationHeader:
    """What was evaluated, and how."""

    model: str
    """The checkpoint or Hugging Face folder, as it was named."""
    layout: str
    """Parallel layout, for people: "TP 2 x CP 2"."""
    seq_length: int
    """N, tokens of a row; of packed rows, of the longest document."""
    short_window: int | None
    """n, tokens that the short NLL sees at most; None: only the long NLL was made."""
    short_stride: int | None
    """s: beyond n, the short NLL sees n - s to n - 1 tokens."""
    rotary_base: float
    data_fingerprint: str
    """RowsHeader.fingerprint of the dataset."""
    tokenizer_fingerprint: str | None
    """None: the rows were made from ready ids."""
    old_context: int | None = None
    """Tokens of the context that the model had before it was extended, or that its config.json names; None: written
    before this was kept."""
    packed: bool = False
    """The rows are documents of packed rows."""
    nll: str | None = None
    """sha256 (hex) of nll.npz: on disk only; None there: written before it was kept."""

    @property
    def known_context(self) -> int | None:
        """The context that parts positions: the model's old one where that is shorter than the rows, else the short
        window."""
        return self.old_context if self.old_context and 1 < self.old_context < self.seq_length else self.short_window


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationResult:
    """Natural-log NLLs of R rows with T targets each."""

    header: EvaluationHeader
    row_index: npt.NDArray[np.int64]
    """[R]: which rows of the dataset; of packed rows, which documents (`RowTargets.names`), each as a row."""
    long_nll: npt.NDArray[np.float32]
    """[R, T]: with the whole row before the target as context."""
    short_nll: npt.NDArray[np.float32] | None
    """[R, T]: by the same model, with `short_window` tokens at most; equal to the long NLL within the first window."""
    valid: npt.NDArray[np.bool_]
    """[R, T]: targets that count. NLLs elsewhere mean nothing."""
    top1: npt.NDArray[np.bool_] | None = None
    """[R, T]: the target is the model's first choice after the whole row before it; None: written before this was."""

    def __post_init__(self) -> None:
        problem = _problem(self.header, self._arrays())
        assert problem is None, problem

    def _arrays(self) -> dict[str, npt.NDArray[Any] | None]:
        return {name: getattr(self, name) for name in ARRAYS}

    def save(self, folder: str | Path) -> None:
        """Write the result into a new or empty folder, which appears complete or not at all.

        Raises:
            ValueError: the folder holds something already, or an NLL of a valid target is NaN or infinite.
        """
        with new_folder(Path(folder)) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Write the result's files into an existing folder.

        Raises:
            ValueError: an NLL of a valid target is NaN or infinite.
        """
        for name, nll_RT in (("long NLL", self.long_nll), ("short NLL", self.short_nll)):
            if nll_RT is not None and not np.isfinite(nll_RT[self.valid]).all():
                row, target = np.argwhere(~np.isfinite(nll_RT) & self.valid)[0]
                raise ValueError(
                    f"{self.header.model}: {name} of row {self.row_index[row]}, position {target + 1} is "
                    f"{nll_RT[row, target]}; nothing was written"
                )
        arrays = {name: array for name, array in self._arrays().items() if array is not None}
        np.savez_compressed(folder / NLL_FILE, allow_pickle=False, **arrays)
        digest = hashlib.sha256((folder / NLL_FILE).read_bytes()).hexdigest()
        header = header_json(FORMAT, FORMAT_VERSION, replace(self.header, nll=digest), **self.figures())
        (folder / HEADER_FILE).write_text(header, encoding="utf-8")

    def figures(self) -> dict[str, object]:
        """What evaluation.json says besides the header: `FIGURES`."""
        mean = mean_nll(self.long_nll, self.valid)
        edges = position_edges(self.header.seq_length, old_context=self.header.known_context)
        buckets = nll_by_position(self.long_nll, self.valid, edges)
        values = (
            len(self.row_index),
            int(self.valid.sum()),
            mean,
            None if mean is None else math.exp(mean),
            [dataclasses.asdict(bucket) for bucket in buckets],
        )
        return dict(zip(FIGURES, values, strict=True))

    @staticmethod
    def load(folder: str | Path) -> "EvaluationResult":
        """Read what `save` wrote.

        Raises:
            ValueError: no evaluation there, one of another format version, or files that are truncated or do not
                belong together.
        """
        folder = Path(folder)
        header = _read_header(folder / HEADER_FILE)
        file = folder / NLL_FILE
        if not file.is_file():
            raise ValueError(f"{file} is missing: the evaluation is incomplete")
        content = file.read_bytes()
        arrays = numpy_file(content, file)
        if not isinstance(arrays, dict):
            raise ValueError(f"{file}: expected named arrays, found one without a name")
        problem = _problem(header, arrays)
        if problem is not None:
            raise ValueError(f"{file} does not fit {HEADER_FILE}: {problem}")
        for name in ("long_nll", "short_nll"):
            if name in arrays and not np.isfinite(arrays[name][arrays["valid"]]).all():
                raise ValueError(f"{file}: {name} holds NaN or infinity: the file is damaged")
        if header.nll not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError(
                f"{file} is damaged, or of another evaluation: its content is not what {HEADER_FILE} names"
            )
        return EvaluationResult(
            header=replace(header, nll=None),
            row_index=arrays["row_index"],
            long_nll=arrays["long_nll"],
            short_nll=arrays.get("short_nll"),
            valid=arrays["valid"],
            top1=arrays.get("top1"),
        )


def _read_header(file: Path) -> EvaluationHeader:
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected a folder that tools/evaluate.py wrote")
    remedy = "evaluate again with tools/evaluate.py"
    header = read_header(file, EvaluationHeader, FORMAT, (1, FORMAT_VERSION), remedy=remedy, extras=FIGURES)
    if header.seq_length < 2:
        raise ValueError(f"{file}: seq_length: expected 2 or more, got {header.seq_length}")
    return header


def _problem(header: EvaluationHeader, arrays: Mapping[str, npt.NDArray[Any] | None]) -> str | None:
    """What is wrong with the arrays' shapes and dtypes, if anything."""
    row_index = arrays.get("row_index")
    if row_index is None:
        return "row_index is missing"
    shapes = {"R": (len(row_index),), "RT": (len(row_index), header.seq_length - 1)}
    for name, (axes, dtype) in ARRAYS.items():
        array = arrays.get(name)
        if name == "short_nll" and (array is None) != (header.short_window is None):
            return f"short_nll is {'missing' if array is None else 'there'}, short_window is {header.short_window}"
        if array is None:
            if name not in ("short_nll", "top1"):
                return f"{name} is missing"
        elif array.shape != shapes[axes] or array.dtype != dtype:
            return f"{name}: expected {dtype.__name__} {list(shapes[axes])}, got {array.dtype} {list(array.shape)}"
    return None
