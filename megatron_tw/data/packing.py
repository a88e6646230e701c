"""Documents to packed rows: several in a row, each padded up to a multiple, in the order in which they come.

A document goes into the first open row that has room for it. Where none has, the fullest is closed, which gives it its
place among the rows, and a new one is opened; so memory is bounded, and the rows depend on the documents alone. What is
left of a row is padding, of which every multiple counts as a document without targets.

Shapes: N tokens of a row, K = 3 kinds of marks (see rows_format.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

OPEN_ROWS = 64
PADDING_ID = 0


@dataclass(frozen=True)
class Piece:
    """A document, or the piece of one, as it will stand in a row.

    ids: int32 [tokens]. targets: bool [tokens], which of them count as targets; None: all but the first. document,
    offset: where it is from, as in rows_documents.npy.
    """

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_] | None
    document: int
    offset: int


@dataclass(frozen=True)
class PackedRow:
    """ids: int32 [N]. marks: bool [K, N]. document, offset: of its first document."""

    ids: npt.NDArray[np.int32]
    marks: npt.NDArray[np.bool_]
    document: int
    offset: int


@dataclass
class _OpenRow:
    room: int
    pieces: list[Piece] = field(default_factory=list)


class Packer:
    """Fills rows of `seq_length` tokens, a multiple of `multiple`.

    >>> packer = Packer(8, 2)
    >>> pieces = [Piece(np.arange(1, 1 + n, dtype=np.int32), None, d, 0) for d, n in enumerate((5, 3, 2))]
    >>> rows = [row for piece in pieces for row in packer.add(piece)] + list(packer.finish())
    >>> [row.ids.tolist() for row in rows]
    [[1, 2, 3, 4, 5, 0, 1, 2], [1, 2, 3, 0, 0, 0, 0, 0]]
    >>> rows[1].marks.astype(int).tolist()
    [[0, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    """

    def __init__(self, seq_length: int, multiple: int, begun: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        """begun: the `state` of another one, to go on with."""
        assert seq_length % multiple == 0
        self.seq_length = seq_length
        self.multiple = multiple
        self._open: list[_OpenRow] = []
        if begun:
            self._begin(begun)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The open rows, as arrays: of each of P pieces its row, document, offset, length and whether it has targets of
        its own, int64 [P, 5]; the ids of all, int32, and their targets, bool."""
        placed = [(number, piece) for number, row in enumerate(self._open) for piece in row.pieces]
        pieces = [(number, p.document, p.offset, len(p.ids), p.targets is not None) for number, p in placed]
        targets = [np.ones(len(p.ids), dtype=bool) if p.targets is None else p.targets for _, p in placed]
        return {
            "pieces": np.array(pieces, dtype=np.int64).reshape(-1, 5),
            "ids": np.concatenate([piece.ids for _, piece in placed] or [np.zeros(0, dtype=np.int32)]),
            "targets": np.concatenate(targets or [np.zeros(0, dtype=bool)]),
        }

    def _begin(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        place = 0
        for number, document, offset, length, has_targets in state["pieces"].tolist():
            if number == len(self._open):
                self._open.append(_OpenRow(self.seq_length))
            of_piece = slice(place, place + length)
            targets = state["targets"][of_piece] if has_targets else None
            piece = Piece(state["ids"][of_piece], targets, document, offset)
            self._open[number].pieces.append(piece)
            self._open[number].room -= self._padded(piece)
            place += length

    def add(self, piece: Piece) -> Iterator[PackedRow]:
        """Takes a piece of at most N tokens; gives the rows that it closes."""
        length = self._padded(piece)
        assert 0 < length <= self.seq_length
        row = next((row for row in self._open if row.room >= length), None)
        if row is None:
            if len(self._open) == OPEN_ROWS:
                yield self._close(min(self._open, key=lambda row: row.room))
            row = _OpenRow(self.seq_length)
            self._open.append(row)
        row.pieces.append(piece)
        row.room -= length
        if row.room == 0:
            yield self._close(row)

    def finish(self) -> Iterator[PackedRow]:
        """The rows that are still open."""
        while self._open:
            yield self._close(self._open[0])

    def _padded(self, piece: Piece) -> int:
        return -(-len(piece.ids) // self.multiple) * self.multiple

    def _close(self, row: _OpenRow) -> PackedRow:
        self._open.remove(row)
        ids_N = np.full(self.seq_length, PADDING_ID, dtype=np.int32)
        marks_KN = np.zeros((3, self.seq_length), dtype=bool)
        targets_N, starts_N, padding_N = marks_KN
        padding_N[:] = True
        place = 0
        for piece in row.pieces:
            of_piece = slice(place, place + len(piece.ids))
            ids_N[of_piece] = piece.ids
            targets_N[of_piece] = True if piece.targets is None else piece.targets
            targets_N[place] = False
            starts_N[place] = True
            padding_N[of_piece] = False
            place += self._padded(piece)
        starts_N[place :: self.multiple] = True
        return PackedRow(ids_N, marks_KN, row.pieces[0].document, row.pieces[0].offset)
