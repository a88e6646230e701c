"""The folder that --scores names: short NLLs of a frozen scorer, made once and read in every epoch.

    DIR/scores.json               versioned header (ScoresHeader): what made the NLLs, of which rows
    DIR/scores.bin, scores.idx    the NLLs in Megatron's IndexedDataset format, fp32: one sequence of N - 1 NLLs a row
                                  in the order of the token rows, one document a document
    DIR/scores_keys.npy           [R, 3] int64: the row's document and offset in it (as in rows_documents.npy), by which
                                  its NLLs are found, and a digest of its ids
    DIR/scores_digests.npy        [R] int64: a digest of each row's NLLs

NLLs are found by document and offset, so a selection of the scored rows, in any order, finds its own; the digest
of the ids tells rows of another dataset that happen to have the same places.

Shapes: R scored rows, M rows asked for, N tokens of a row, T = N - 1 targets; column t is the target at position t + 1.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_tw.config.options import flag
from megatron_tw.data.files import (
    check_index,
    check_sizes,
    header_json,
    index_size,
    load_int64,
    partial_folder,
    read_header,
)
from megatron_tw.data.rows import TokenRows, check_fingerprint
from megatron_tw.data.rows_format import digest_of_all, row_digest

FORMAT = "megatron_tw score rows"
FORMAT_VERSION = 2
"""Version 1 had no digests of the NLLs."""
HEADER_FILE = "scores.json"
KEYS_FILE = "scores_keys.npy"
DIGESTS_FILE = "scores_digests.npy"
FLOAT32_CODE = 7
"""Of Megatron's indexed datasets (indexed_dataset.DType)."""
KEY = np.dtype([("document", "<i8"), ("offset", "<i8")])
"""Compares as a pair: by document, then by offset."""


@dataclass(frozen=True, kw_only=True)
class ScoresHeader:
    """scores.json: the fingerprint of the scores."""

    scorer: str
    """For people: the scorer's folder, as it was named. Never compared."""
    scorer_weights: str
    """sha256 (hex) of the scorer's tensors, wherever and in however many files they lie."""
    scorer_shape: dict[str, int | float | bool | None]
    """Numbers of the scorer's config.json."""
    scorer_rope: dict[str, object]
    """transformers' rope_parameters."""
    short_window: int
    short_stride: int
    bos_id: int | None
    """Id of BOS, with which the windows of a row begin that begins with it."""
    seq_length: int
    """N, tokens of a row."""
    rows: int
    data_fingerprint: str
    """RowsHeader.fingerprint of the rows."""
    tokenizer_fingerprint: str | None
    """None: the rows were made from ready ids."""
    computation: dict[str, int | str | bool | None]
    """Options that move the scores within rounding: they must stay the same when scoring goes on after a stop."""
    fingerprint: str = ""
    """sha256 (hex) of the NLLs and their keys; empty while they are being made."""
    digests: str | None = None
    """sha256 (hex) of scores_keys.npy's and scores_digests.npy's numbers; None in version 1."""

    def to_json(self) -> str:
        return header_json(FORMAT, FORMAT_VERSION, self)

    @staticmethod
    def from_file(file: Path) -> "ScoresHeader":
        """Raises ValueError for a file of another kind or version, or one with fields missing."""
        remedy = "score the rows again with tools/score_tokens.py"
        header = read_header(file, ScoresHeader, FORMAT, (1, FORMAT_VERSION), remedy=remedy)
        if header.rows < 1 or not 2 <= header.short_window <= header.seq_length:
            raise ValueError(
                f"{file}: {header.rows} rows of {header.seq_length} tokens in windows of {header.short_window}: the "
                f"file is damaged; {remedy}"
            )
        return header

    def differences(self, now: "ScoresHeader") -> list[str]:
        """Everything in which the run that made these scores differs from one that would be run now."""
        return _differences(_flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(now)))


class ScoreRows:
    """Finished scores, memory-mapped.

    Args:
        path: folder that tools/score_tokens.py wrote.

    Raises:
        ValueError: another kind of folder, unfinished scores, missing or truncated files, another format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / HEADER_FILE).is_file():
            begun = partial_folder(self.path).is_dir()
            what = "scoring was not finished; run the same command again" if begun else f"no {HEADER_FILE}"
            raise ValueError(f"{path}: not a folder of scores ({what}); make one with tools/score_tokens.py")
        self.header = ScoresHeader.from_file(self.path / HEADER_FILE)
        keys_R3 = load_int64(self.path / KEYS_FILE, (self.header.rows, 3), "set of scores")
        self.documents_R2 = np.ascontiguousarray(keys_R3[:, :2])
        self.digests_R = keys_R3[:, 2]
        self._check_files()
        self._order_R = np.lexsort((self.documents_R2[:, 1], self.documents_R2[:, 0]))
        self._sorted_keys_R = _as_keys(self.documents_R2[self._order_R])
        shape = self.header.rows, self.header.seq_length - 1
        self._nll_RT = np.memmap(self.path / "scores.bin", dtype="<f4", mode="r", shape=shape)
        self._nll_digests_R = self._read_digests(keys_R3)

    def _read_digests(self, keys_R3: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        if self.header.digests is None:
            return None
        digests_R = load_int64(self.path / DIGESTS_FILE, (len(self),), "set of scores")
        if digest_of_all(keys_R3, digests_R) != self.header.digests:
            raise ValueError(
                f"{self.path}: {KEYS_FILE} or {DIGESTS_FILE} is not what was written with {HEADER_FILE}: damaged, or "
                "of another set of scores"
            )
        return digests_R

    def __len__(self) -> int:
        return self.header.rows

    def nll(self, documents_M2: npt.NDArray[np.int64]) -> torch.Tensor:
        """Short NLL [M, T] fp32, on the CPU, of rows given by document and offset (TokenRows.documents_R2).

        Raises:
            ValueError: a row that was not scored, named by its document and offset.
        """
        index_M = self.find(documents_M2)
        if (index_M < 0).any():
            document, offset = documents_M2[index_M < 0][0].tolist()
            raise ValueError(f"--scores {self.path}: no scores of the row at document {document}, offset {offset}")
        self.check(index_M.tolist())
        return torch.from_numpy(self._nll_RT[index_M])  # fancy indexing copies

    def check(self, index: Iterable[int]) -> None:
        """Compare the NLLs of these score rows with their digests (version 1 had none: then only that they are finite).

        Raises:
            ValueError: they are not what was written; names the first.
        """
        for row in index:
            nll_T = self._nll_RT[row]
            if self._nll_digests_R is None:
                intact = bool(np.isfinite(nll_T).all())
            else:
                intact = nll_digest(nll_T) == self._nll_digests_R[row]
            if not intact:
                raise ValueError(
                    f"--scores: {self.path / 'scores.bin'}: the NLLs of score row {row} are not those that were "
                    "written: the file is damaged; score the rows again with tools/score_tokens.py"
                )

    def stored_bytes(self, row: int) -> bytes:
        """A row's NLLs as they lie in scores.bin, not compared with anything."""
        return self._nll_RT[row].tobytes()

    def find(self, documents_M2: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which score row [M] belongs to each document and offset; -1 where there is none."""
        keys_M = _as_keys(documents_M2)
        place_M = np.searchsorted(self._sorted_keys_R, keys_M).clip(max=len(self) - 1)
        index_M: npt.NDArray[np.int64] = np.where(self._sorted_keys_R[place_M] == keys_M, self._order_R[place_M], -1)
        return index_M

    def _check_files(self) -> None:
        rows, targets = self.header.rows, self.header.seq_length - 1
        boundaries = int((np.diff(self.documents_R2[:, 0]) != 0).sum()) + 2
        sizes = {"scores.bin": rows * targets * 4, "scores.idx": index_size(rows, boundaries)}
        check_sizes(self.path, sizes, "set of scores")
        check_index(self.path / "scores.idx", FLOAT32_CODE, 4, rows, targets, boundaries, "set of scores")


def check_scores(
    scores: ScoreRows, rows: TokenRows, *, short_window: int, short_stride: int, bos_id: int | None
) -> None:
    """Check that scores are of these rows, in these windows.

    Rows of another dataset fit if each of them was scored: a selection or another order of the scored ones. Their ids
    are compared by their digests.

    Raises:
        ValueError: tells everything that differs.
    """
    header, tokenizer = scores.header, rows.header.tokenizer
    now: dict[str, object] = {
        "seq_length": rows.header.seq_length,
        "short_window": short_window,
        "short_stride": short_stride,
        "bos_id": bos_id,
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer is not None else None,
    }
    problems = _differences({name: getattr(header, name) for name in now}, now)
    if header.data_fingerprint != rows.header.fingerprint:
        problem = _unscored_row(scores, rows)
        if problem is not None:
            problems.append(f"made from another dataset than {rows.path} (--data-path): {problem}")
    if problems:
        raise ValueError(f"--scores {scores.path} does not fit this run: " + "; ".join(problems))


def row_keys(rows: TokenRows) -> npt.NDArray[np.int64]:
    """Document, offset and digest of the ids of every row: [R, 3] int64. Reads all rows of a dataset of version 1,
    and compares them with its fingerprint.

    Raises:
        ValueError: such a dataset was changed after it was made.
    """
    digests_R = rows.digests_R
    if digests_R is None:
        check_fingerprint(rows)
        digests_R = np.fromiter((row_digest(rows[row]) for row in range(len(rows))), np.int64, len(rows))
    return np.concatenate([rows.documents_R2, digests_R[:, None]], axis=1)


def nll_digest(nll_T: npt.NDArray[np.float32]) -> int:
    """The first 8 bytes of a hash of a row's NLLs, as a signed integer."""
    digest = hashlib.blake2b(nll_T.astype("<f4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _unscored_row(scores: ScoreRows, rows: TokenRows) -> str | None:
    """The first row that has no scores, or those of other ids."""
    index_R = scores.find(rows.documents_R2)
    for row, index in enumerate(index_R.tolist()):
        digest = row_digest(rows[row]) if rows.digests_R is None else rows.digests_R[row]
        if index < 0 or scores.digests_R[index] != digest:
            document, offset = rows.documents_R2[row].tolist()
            what = "was not scored" if index < 0 else "had other ids when it was scored"
            return f"row {row} (document {document}, offset {offset}) {what}"
    return None


def _as_keys(documents_M2: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(documents_M2, dtype="<i8").view(KEY)[:, 0]


_LABELS = {
    "seq_length": "tokens of a row (--data-path)",
    "rows": "rows (--data-path)",
    "data_fingerprint": "dataset (--data-path)",
    "tokenizer_fingerprint": "tokenizer of the rows (--data-path)",
    "scorer_weights": "weights of the scorer (--load-hf)",
    "device": "device",
}
_NOT_COMPARED = ("scorer", "fingerprint", "digests")


def _flat(header: Mapping[str, object]) -> dict[str, object]:
    """The fields of a header, with those of its dictionaries under names of their own.

    >>> _flat({"bos_id": 1, "scorer_rope": {"rope_theta": 1e4}})
    {'bos_id': 1, "scorer's rope_theta": 10000.0}
    """
    flat: dict[str, object] = {}
    for name, value in header.items():
        if isinstance(value, dict):
            prefix = "" if name == "computation" else "scorer's "
            flat |= {prefix + key: item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """`label: value then, value now` for everything that differs.

    >>> _differences({"short_window": 64, "bos_id": 1}, {"short_window": 32, "bos_id": 1})
    ['--short-window: scored with 64, now 32']
    """
    names = [name for name in {**then, **now} if name not in _NOT_COMPARED and then.get(name) != now.get(name)]
    return [
        f"{_LABELS.get(name) or (name if name.startswith('scorer') else flag(name))}: "
        f"scored with {_short(then.get(name))}, now {_short(now.get(name))}"
        for name in names
    ]


def _short(value: object) -> str:
    """A value for a message: of a long hash, its beginning."""
    text = str(value)
    return text if len(text) <= 32 else text[:12] + "..."
