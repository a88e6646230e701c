"""The folder of prepared token rows: what is in it.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_tw.data.files import PART_ROWS, header_json, read_header

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


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 (hex) of each file in a folder, by its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
