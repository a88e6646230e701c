"""Which targets of rows count, and packed rows taken apart into their documents.

An evaluation has a document a row, so that a column is a position in the document, whatever stood beside it in the
packed row, and documents are what standard errors are over.

Shape suffixes: R rows, T targets of a row, D documents, W targets of the longest document.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tw.data.rows import TokenRows


@dataclass(frozen=True)
class RowTargets:
    """Of the first R rows of a dataset.

    valid: bool [R, T]. documents: int64 [D, 3] of packed rows, in order: row, where it begins there, tokens (2 or
    more); None: each row is one document.
    """

    valid: npt.NDArray[np.bool_]
    documents: npt.NDArray[np.int64] | None

    @staticmethod
    def of_rows(rows: TokenRows, num_rows: int) -> "RowTargets":
        """Reads the marked rows. Raises ValueError where they are damaged."""
        valid_RT = np.ones((num_rows, rows.header.seq_length - 1), dtype=bool)
        documents = []
        for index in range(num_rows if rows.header.marks else 0):
            row = rows.read(index)
            assert row.valid is not None
            valid_RT[index] = row.valid
            if row.documents is not None:
                documents.append(np.insert(row.documents[row.documents[:, 1] > 1], 0, index, axis=1))
        return RowTargets(valid_RT, np.concatenate(documents) if documents else None)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; of rows of one document, of a row."""
        return self.valid.shape[1] + 1 if self.documents is None else int(self.documents[:, 2].max())

    @property
    def position(self) -> npt.NDArray[np.int64] | None:
        """[R, T] of packed rows: of each valid target, its position in its document; None: column j is position
        j + 1."""
        if self.documents is None:
            return None
        position_RT = np.zeros(self.valid.shape, dtype=np.int64)
        for row, start, tokens in self.documents.tolist():
            position_RT[row, start : start + tokens - 1] = np.arange(1, tokens)
        return position_RT

    @property
    def names(self) -> npt.NDArray[np.int64]:
        """[D]: of each document the row's index, times the tokens of a row, plus where it begins there (what training
        breaks ties by); [R], the rows' indices, of rows of one document."""
        if self.documents is None:
            return np.arange(len(self.valid))
        rows_D, starts_D, _ = self.documents.T
        return rows_D * (self.valid.shape[1] + 1) + starts_D

    def by_document(self, array_RT: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[D, W], 0 where a document has ended; `array_RT` itself, of rows of one document."""
        if self.documents is None:
            return array_RT
        array_DW = np.zeros((len(self.documents), self.longest - 1), dtype=array_RT.dtype)
        for place, (row, start, tokens) in enumerate(self.documents.tolist()):
            array_DW[place, : tokens - 1] = array_RT[row, start : start + tokens - 1]
        return array_DW
