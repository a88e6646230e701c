"""Opens the folder of prepared token rows (rows_format.py) and checks it: against itself, and that it fits a run.

Shapes: R rows, N tokens of a row (`seq_length`), K kinds of marks, B bytes of a row's bits, D documents of a row.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megatron_tw.config.late_compile import compile_late
from megatron_tw.data.files import check_index, check_sizes, index_size, load_int64
from megatron_tw.data.rows_format import (
    DIGESTS_FILE,
    DOCUMENTS_FILE,
    HEADER_FILE,
    MARKS_FILE,
    TOKENIZER_DIR,
    RowsHeader,
    digest_of_all,
    file_digests,
    row_digest,
)


@dataclass(frozen=True)
class Row:
    """One row as it was written. N tokens, D documents.

    tokens: int64 [N]. valid: bool [N - 1], which targets count; None: all do. documents: int64 [D, 2], where each
    document of a packed row begins and its tokens without padding (0: padding alone); None: the row is one document.
    """

    tokens: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_] | None = None
    documents: npt.NDArray[np.int64] | None = None


class TokenRows:
    """A prepared dataset, memory-mapped: `rows[i]` is row i as a new int64 array [N].

    Args:
        path: folder that tools/preprocess_data.py wrote.

    Raises:
        ValueError: another kind of folder, missing, truncated or damaged files, another format version; and on reading
            a row, ids that are not those that were written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header_file = self.path / HEADER_FILE
        if not header_file.is_file():
            raise ValueError(f"{path}: not a dataset folder (no {HEADER_FILE}); make one with tools/preprocess_data.py")
        self.header = RowsHeader.from_file(header_file)
        indexed_dataset = _import_indexed_dataset()
        self._check_files(indexed_dataset.DType[self.header.dtype].value)
        self.documents_R2 = load_int64(self.path / DOCUMENTS_FILE, (len(self), 2), "dataset")
        self.digests_R: npt.NDArray[np.int64] | None = None
        """[R], of the ids as they were written; None: the dataset is of version 1, which kept none."""
        if self.header.digests is not None:
            self.digests_R = load_int64(self.path / DIGESTS_FILE, (len(self),), "dataset")
            if digest_of_all(self.documents_R2, self.digests_R) != self.header.digests:
                raise ValueError(
                    f"{self.path}: {DOCUMENTS_FILE} or {DIGESTS_FILE} is not what was written with {HEADER_FILE}: "
                    "damaged, or of another dataset"
                )
        self._check_tokenizer()
        self._marks_RKB: npt.NDArray[np.uint8] | None = None
        if self.header.marks:
            shape = len(self), self.header.marks, -(-self.header.seq_length // 8)
            self._marks_RKB = np.memmap(self.path / MARKS_FILE, dtype=np.uint8, mode="r", shape=shape)
        # Rows are copied out of its memory map, for a view of a freed map crashes the process.
        self._dataset = indexed_dataset.IndexedDataset(str(self.path / "rows"))

    def __len__(self) -> int:
        return self.header.counts.rows

    @property
    def fingerprint(self) -> str:
        return self.header.fingerprint

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        return self.read(index).tokens

    def read(self, index: int) -> Row:
        """Row `index`, with what is marked in it.

        Raises:
            ValueError: it is not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        row_N: npt.NDArray[np.int64] = self._dataset[int(index)].astype(np.int64)  # a copy, never a view
        bits_KB = None if self._marks_RKB is None else np.array(self._marks_RKB[index])
        if self.digests_R is not None:
            if row_digest(row_N, b"" if bits_KB is None else bits_KB.tobytes()) != self.digests_R[index]:
                what = "ids" if bits_KB is None else f"ids or marks ({MARKS_FILE})"
                raise ValueError(
                    f"{self.path / 'rows.bin'}: the {what} of row {index} are not those that were written: the file is "
                    "damaged; prepare the rows again with tools/preprocess_data.py (--verify finds every such row)"
                )
        elif not 0 <= row_N.min() <= row_N.max() <= self.header.largest_id:
            position = int(np.flatnonzero((row_N < 0) | (row_N > self.header.largest_id))[0])
            raise ValueError(
                f"{self.path / 'rows.bin'}: row {index}, position {position}: id {row_N[position]}, but {HEADER_FILE} "
                f"says that the largest is {self.header.largest_id}: the file is damaged"
            )
        if bits_KB is None:
            return Row(row_N)
        targets_N, *of_packed = np.unpackbits(bits_KB, axis=1, count=len(row_N)).astype(bool)
        return Row(row_N, targets_N[1:], _documents(*of_packed) if of_packed else None)

    def stored_bytes(self, index: int) -> tuple[bytes, bytes]:
        """A row as it lies in rows.bin and in rows_marks.bin, not compared with anything."""
        marks = b"" if self._marks_RKB is None else self._marks_RKB[index].tobytes()
        return self._dataset[int(index)].tobytes(), marks

    def _check_tokenizer(self) -> None:
        """That the tokenizer's files, which checkpoints and exports are given, are those that were written."""
        if self.header.tokenizer is None:
            return
        folder, written = self.path / TOKENIZER_DIR, self.header.tokenizer.files
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: the dataset is incomplete")
        found = file_digests(folder)
        for name, digest in (written or {}).items():
            if found.get(name) != digest:
                what = "is missing: the dataset is incomplete" if name not in found else "is not what was written"
                raise ValueError(f"{folder / name} {what}; prepare the rows again with tools/preprocess_data.py")

    def _check_files(self, dtype_code: int) -> None:
        """What IndexedDataset would meet with an assert, a crash, or not at all."""
        header, counts, boundaries = self.header, self.header.counts, self.header.boundaries
        sizes = {
            "rows.bin": counts.rows * header.seq_length * np.dtype(header.dtype).itemsize,
            "rows.idx": index_size(counts.rows, boundaries),
        }
        if header.marks:
            sizes[MARKS_FILE] = counts.rows * header.marks * -(-header.seq_length // 8)
        check_sizes(self.path, sizes, "dataset")
        itemsize = np.dtype(header.dtype).itemsize
        check_index(self.path / "rows.idx", dtype_code, itemsize, counts.rows, header.seq_length, boundaries, "dataset")


def _documents(starts_N: npt.NDArray[np.bool_], padding_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[D, 2] as `Row` has them.

    >>> _documents(np.array([1, 0, 0, 0, 1, 0], bool), np.array([0, 0, 0, 1, 1, 1], bool)).tolist()
    [[0, 3], [4, 0]]
    """
    starts_D = np.flatnonzero(starts_N)
    return np.stack([starts_D, np.add.reduceat((~padding_N).astype(np.int64), starts_D)], axis=1)


def check_fingerprint(rows: TokenRows, *, progress: Callable[[int], object] = lambda rows: None) -> None:
    """Read all rows and compare them with the dataset's fingerprint.

    progress: called with a number of rows that have been read.

    Raises:
        ValueError: rows or their places in the documents were changed after the dataset was made.
    """
    header = rows.header
    digest = hashlib.sha256(f"{header.seq_length} {header.dtype} ".encode())
    for row in range(len(rows)):
        ids, marks = rows.stored_bytes(row)
        digest.update(ids)
        digest.update(marks)
        progress(1)
    digest.update(rows.documents_R2.tobytes())
    if digest.hexdigest() != header.fingerprint:
        raise ValueError(
            f"{rows.path}: the rows are not those that were written: rows.bin or {DOCUMENTS_FILE} was changed after "
            "the dataset was made; prepare the rows again with tools/preprocess_data.py"
        )


def check_rows(rows: TokenRows, *, seq_length: int, model_vocab_size: int | None = None) -> None:
    """Checks that rows fit a run.

    Raises:
        ValueError: rows of another length than `--seq-length`, or ids that the model's vocabulary (unpadded) has not.
    """
    header = rows.header
    if header.seq_length != seq_length:
        raise ValueError(f"{rows.path}: dataset rows of {header.seq_length} tokens, --seq-length {seq_length}")
    data_vocab_size = header.largest_id + 1 if header.vocab_size is None else header.vocab_size
    if model_vocab_size is not None and data_vocab_size > model_vocab_size:
        made_by = f"tokenizer {header.tokenizer.name}" if header.tokenizer else "ready ids"
        raise ValueError(
            f"{rows.path}: dataset ({made_by}) with a vocabulary of {data_vocab_size} tokens, "
            f"but the model's has {model_vocab_size}"
        )


def _import_indexed_dataset() -> ModuleType:
    """Megatron-Core's module, imported on first use: that takes seconds, which tokenizing processes need not spend."""
    with warnings.catch_warnings(), compile_late():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
        from megatron.core.datasets import indexed_dataset
    module: ModuleType = indexed_dataset
    return module
