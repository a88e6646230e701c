"""Writes the folder of prepared token rows (rows_format.py), and goes on behind what another process has written.

Shapes: R rows, N tokens of a row (`seq_length`), K kinds of marks, P rows of a part.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_tw.data.appending import GrowingArray, flush, open_to_append
from megatron_tw.data.files import parts_of, write_index, write_synced
from megatron_tw.data.rows_format import (
    DIGESTS_FILE,
    DOCUMENTS_FILE,
    HEADER_FILE,
    LARGEST_UINT16_VOCABULARY,
    MARKS_FILE,
    STORED_DTYPES,
    Packing,
    RowCounts,
    RowsHeader,
    TokenizerInfo,
    digest_of_all,
    row_digest,
)


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
