"""The folder of prepared token rows: what is in it, how it is written, how it is opened.

    DIR/dataset.json          versioned header (RowsHeader)
    DIR/rows.bin, rows.idx    the rows in Megatron's IndexedDataset format: one sequence a row, one document a document
    DIR/rows_documents.npy    [R, 2] int64: number of the row's document, and the offset in it of the row's first token.
                              A row's BOS is no token of its document: row token i >= 1 is its token offset + i - 1.
                              Ready rows are their whole document: row token i is its token i
    DIR/rows_marks.bin        packed or masked rows alone: bits [R, 1 or 3, N], each row of bits filled up to bytes:
                              which tokens are targets; of packed rows also where documents begin, and which tokens are
                              padding. Their row in rows_documents.npy is the place of the first document
    DIR/rows_digests.npy      [R] int64: a digest of each row's ids and marks, compared whenever a row is read
    DIR/tokenizer/            the tokenizer's files (not with ready ids)

Shapes: R rows, N tokens of a row (`seq_length`).
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_tw.config.late_compile import compile_late
from megatron_tw.data.appending import GrowingArray, flush, open_to_append
from megatron_tw.data.files import (
    PART_ROWS,
    check_index,
    check_sizes,
    header_json,
    index_size,
    load_int64,
    parts_of,
    read_header,
    write_index,
    write_synced,
)

FORMAT = "megatron_tw token rows"
FORMAT_VERSION = 3
"""Version 1 had no digests of the rows, version 2 neither packed nor masked rows."""
HEADER_FILE = "dataset.json"
DOCUMENTS_FILE = "rows_documents.npy"
DIGESTS_FILE = "rows_digests.npy"
MARKS_FILE = "rows_marks.bin"
TOKENIZER_DIR = "tokenizer"
STORED_DTYPES = {"uint16": 8, "int32": 4}
"""And their codes in Megatron's indexed datasets."""
LARGEST_UINT16_VOCABULARY = 65499
"""Megatron's choice."""


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the ids."""

    kind: str
    name: str
    """For people: the name of its folder or file."""
    fingerprint: str
    """Tokenizer.fingerprint: what is compared."""
    files: dict[str, str] | None = None
    """sha256 (hex) of each file under tokenizer/; None: written before they were kept."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What became of the documents."""

    documents: int
    tokens: int
    """Of all documents, without the BOS of the rows."""
    rows: int
    documents_too_short: int
    """Documents that gave no row."""
    tokens_dropped: int
    """Last pieces shorter than a row, and documents too short."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How several documents came into a row."""

    multiple: int
    """Every document begins at a multiple of it, in tokens."""
    documents: int
    """In all rows; one that was cut counts once a piece."""
    padding_tokens: int
    """Tokens of all rows that are of no document."""


@dataclass(frozen=True)
class Row:
    """One row as it was written. N tokens, D documents.

    tokens: int64 [N]. valid: bool [N - 1], which targets count; None: all do. documents: int64 [D, 2], where each
    document of a packed row begins and its tokens without padding (0: padding alone); None: the row is one document.
    """

    tokens: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_] | None = None
    documents: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class RowsHeader:
    """dataset.json."""

    seq_length: int
    vocab_size: int | None
    """None: ready ids whose vocabulary was not given."""
    largest_id: int
    bos_id: int | None
    dtype: str
    """"uint16" or "int32": of the ids in rows.bin."""
    tokenizer: TokenizerInfo | None
    """None: ready ids."""
    counts: RowCounts
    fingerprint: str
    """sha256 (hex) of the rows and their places in the documents: what scores made from these rows refer to."""
    digests: str | None = None
    """sha256 (hex) of rows_documents.npy's and rows_digests.npy's numbers; None in version 1."""
    masked: bool = False
    """Whether the data said which targets count (`loss_mask`)."""
    packing: Packing | None = None
    """None: a row is of one document."""

    @property
    def marks(self) -> int:
        """Kinds of marks that rows_marks.bin holds of every token."""
        return 3 if self.packing is not None else int(self.masked)

    @property
    def boundaries(self) -> int:
        """Document boundaries in rows.idx; a packed row counts as one document there."""
        counts = self.counts
        return 1 + (counts.rows if self.packing is not None else counts.documents - counts.documents_too_short)

    def to_json(self) -> str:
        return header_json(FORMAT, FORMAT_VERSION, self)

    @staticmethod
    def from_file(file: Path) -> "RowsHeader":
        """Raises ValueError for a file of another kind or version, with a field that is missing, unknown or of another
        type, or with fields that contradict each other."""
        remedy = "prepare the rows again with tools/preprocess_data.py"
        header = read_header(file, RowsHeader, FORMAT, (1, 2, FORMAT_VERSION), remedy=remedy)
        if problem := header.contradiction():
            raise ValueError(f"{file}: {problem}; the file is damaged: {remedy}")
        return header

    def contradiction(self) -> str | None:
        """What cannot be, in words; None where all fits."""
        counts = self.counts
        if self.dtype not in STORED_DTYPES:
            return f"dtype: expected one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}"
        if self.seq_length < 2:
            return f"seq_length: expected 2 or more, got {self.seq_length}"
        limit = np.iinfo(self.dtype).max + 1 if self.vocab_size is None else self.vocab_size
        if not 0 <= self.largest_id < limit:
            return f"largest_id {self.largest_id} is no id of a vocabulary of {limit} tokens"
        if self.bos_id is not None and not 0 <= self.bos_id < limit:
            return f"bos_id {self.bos_id} is no id of a vocabulary of {limit} tokens"
        kept = counts.documents - counts.documents_too_short
        most = counts.rows if self.packing is None else self.packing.documents
        if min(dataclasses.astuple(counts)) < 0 or counts.rows < 1 or not 1 <= kept <= most:
            return f"counts: {counts.rows} rows of {kept} documents"
        if self.packing is not None and not (self.packing.multiple >= 1 and self.packing.padding_tokens >= 0):
            return f"packing: {self.packing}"
        return None


@dataclass(frozen=True, kw_only=True)
class RowsSoFar:
    """What a writer must know of the rows before, to go on behind them."""

    rows: int = 0
    largest_id: int = 0
    marks: int = 0
    """Kinds of marks that rows_marks.bin holds of every token."""
    packed_documents: int = 0
    padding_tokens: int = 0


class RowsWriter:
    """Writes rows into an existing folder; `close` completes it. Its memory does not grow with the rows.

    Args:
        seq_length: N.
        vocab_size: decides the ids' dtype (None: int32).
        pack_multiple: of packed rows; None: each row is of one document.
        begun: what another writer flushed there, to go on with; what stands beyond is cut off.

    Raises:
        ValueError: the folder holds fewer rows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seq_length: int,
        vocab_size: int | None,
        bos_id: int | None,
        pack_multiple: int | None = None,
        begun: RowsSoFar = RowsSoFar(),
    ) -> None:
        self._folder = folder
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._bos_id = bos_id
        self._pack_multiple = pack_multiple
        self.so_far = begun
        small = vocab_size is not None and vocab_size <= LARGEST_UINT16_VOCABULARY
        self._dtype = np.dtype("uint16" if small else "int32")
        self._rows = open_to_append(folder / "rows.bin", begun.rows * self._row_bytes)
        self._documents = GrowingArray(folder / DOCUMENTS_FILE, (2,), begun.rows)
        self._digests = GrowingArray(folder / DIGESTS_FILE, (), begun.rows)
        self._marks: BinaryIO | None = None
        if begun.marks:
            self._marks = open_to_append(folder / MARKS_FILE, begun.rows * begun.marks * -(-seq_length // 8))
        self._digest = hashlib.sha256(f"{seq_length} {self._dtype.name} ".encode())
        self._digest_again()

    @property
    def _row_bytes(self) -> int:
        return self._seq_length * self._dtype.itemsize

    def _digest_again(self) -> None:
        """Bring the digest to where it was after the rows that are there."""
        if self._marks is None:
            with (self._folder / "rows.bin").open("rb") as stream:
                while content := stream.read(1 << 20):
                    self._digest.update(content)
            return
        bytes_of_marks = self.so_far.marks * -(-self._seq_length // 8)
        with (self._folder / "rows.bin").open("rb") as ids, (self._folder / MARKS_FILE).open("rb") as marks:
            for _ in range(self.so_far.rows):
                self._digest.update(ids.read(self._row_bytes))
                self._digest.update(marks.read(bytes_of_marks))

    def add_document(
        self,
        rows_RN: npt.NDArray[np.integer],
        document: int,
        offsets_R: npt.NDArray[np.int64],
        marks_KN: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Appends the rows of one document, given its number and each row's token offset in it; or one packed row.

        marks_KN: of a single row, as rows_marks.bin has them; in every call, or in none.
        """
        assert rows_RN.shape == (len(offsets_R), self._seq_length)
        assert len(offsets_R) > 0
        assert marks_KN is None or len(rows_RN) == 1
        assert self.so_far.rows == 0 or (self._marks is None) == (marks_KN is None)
        smallest, largest = int(rows_RN.min()), int(rows_RN.max())
        assert 0 <= smallest <= largest <= np.iinfo(self._dtype).max
        assert self._vocab_size is None or largest < self._vocab_size
        rows_RN = np.ascontiguousarray(rows_RN, dtype=self._dtype)
        content, bits = rows_RN.tobytes(), b""
        self._rows.write(content)
        self._digest.update(content)
        if marks_KN is not None:
            bits = self._write_marks(marks_KN)
        self._digests.append(np.fromiter((row_digest(row_N, bits) for row_N in rows_RN), np.int64, len(rows_RN)))
        self._documents.append(np.stack([np.full_like(offsets_R, document), offsets_R], axis=1))
        self.so_far = dataclasses.replace(
            self.so_far, rows=self.so_far.rows + len(rows_RN), largest_id=max(self.so_far.largest_id, largest)
        )

    def _write_marks(self, marks_KN: npt.NDArray[np.bool_]) -> bytes:
        bits = np.packbits(marks_KN, axis=1).tobytes()
        if self._marks is None:
            self._marks = open_to_append(self._folder / MARKS_FILE, 0)
            self.so_far = dataclasses.replace(self.so_far, marks=len(marks_KN))
        self._marks.write(bits)
        self._digest.update(bits)
        if self._pack_multiple is not None:
            _, starts_N, padding_N = marks_KN
            self.so_far = dataclasses.replace(
                self.so_far,
                padding_tokens=self.so_far.padding_tokens + int(padding_N.sum()),
                packed_documents=self.so_far.packed_documents + int((starts_N & ~padding_N).sum()),
            )
        return bits

    def flush(self) -> None:
        """Wait until all rows are on disk."""
        flush(self._rows)
        self._documents.flush()
        self._digests.flush()
        if self._marks is not None:
            flush(self._marks)

    def close(self, counts: RowCounts, tokenizer: TokenizerInfo | None) -> RowsHeader:
        """Writes the index, the places in the documents and the header."""
        assert counts.rows == self.so_far.rows
        self.flush()
        self._rows.close()
        self._documents.close()
        self._digests.close()
        if self._marks is not None:
            self._marks.close()
        packed = self._pack_multiple is not None
        write_index(
            self._folder / "rows.idx",
            STORED_DTYPES[self._dtype.name],
            self._dtype.itemsize,
            counts.rows,
            self._seq_length,
            _each_row(counts.rows) if packed else _boundaries(self._documents.parts()),
        )
        for documents_P2 in self._documents.parts():
            self._digest.update(documents_P2.tobytes())
        header = RowsHeader(
            seq_length=self._seq_length,
            vocab_size=self._vocab_size,
            largest_id=self.so_far.largest_id,
            bos_id=self._bos_id,
            dtype=self._dtype.name,
            tokenizer=tokenizer,
            counts=counts,
            fingerprint=self._digest.hexdigest(),
            digests=digest_of_all(self._documents.parts(), self._digests.parts()),
            masked=self._marks is not None and self._pack_multiple is None,
            packing=None
            if self._pack_multiple is None
            else Packing(
                multiple=self._pack_multiple,
                documents=self.so_far.packed_documents,
                padding_tokens=self.so_far.padding_tokens,
            ),
        )
        write_synced(self._folder / HEADER_FILE, header.to_json().encode())
        return header


def _each_row(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """Of packed rows: each is one document of the index."""
    return (np.arange(part.start, part.stop) for part in parts_of(rows + 1))


def _boundaries(parts: Iterable[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.int64]]:
    """Where documents begin among the rows, and where the last one ends, from rows_documents.npy.

    >>> [part.tolist() for part in _boundaries([np.array([[4, 0], [4, 9]]), np.array([[4, 18], [7, 0]])])]
    [[0], [3], [4]]
    """
    last, rows = -1, 0
    for documents_P2 in parts:
        numbers_P = documents_P2[:, 0]
        yield rows + np.flatnonzero(np.diff(numbers_P, prepend=last))
        last, rows = int(numbers_P[-1]), rows + len(numbers_P)
    yield np.array([rows])


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


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 (hex) of each file in a folder, by its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _documents(starts_N: npt.NDArray[np.bool_], padding_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[D, 2] as `Row` has them.

    >>> _documents(np.array([1, 0, 0, 0, 1, 0], bool), np.array([0, 0, 0, 1, 1, 1], bool)).tolist()
    [[0, 3], [4, 0]]
    """
    starts_D = np.flatnonzero(starts_N)
    return np.stack([starts_D, np.add.reduceat((~padding_N).astype(np.int64), starts_D)], axis=1)


def row_digest(row_N: npt.NDArray[np.integer], marks: bytes = b"") -> int:
    """The first 8 bytes of a hash of a row's ids and marks, as a signed integer."""
    digest = hashlib.blake2b(row_N.astype("<i4").tobytes() + marks, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def digest_of_all(*arrays: npt.NDArray[np.int64] | Iterator[npt.NDArray[np.int64]]) -> str:
    """sha256 (hex) of the numbers of arrays, which may come in parts, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        for part in [array] if isinstance(array, np.ndarray) else array:
            for start in range(0, len(part), PART_ROWS):  # without a copy of all
                digest.update(part[start : start + PART_ROWS].astype("<i8").tobytes())
    return digest.hexdigest()


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
