"""The rows of several folders as one dataset.

    Blend          the folders behind one numbering of the rows: those of folder f begin at `starts[f]`
    place          sample -> its folder, and which sample of that folder it is
    BlendOrder     sample -> row: each folder in epochs of its own, shuffled by (seed, epoch, folder)

All are pure functions of plain integers: any rank finds any sample at once, and nothing grows with their number. A
single folder has the rows, numbers and order that it has alone.

Shapes: F folders, N tokens of a row.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tw.data.order import RowOrder
from megatron_tw.data.rows import Row, TokenRows
from megatron_tw.data.rows_format import RowsHeader


class Blend:
    """The rows of one folder or several: `blend[i]` is row i as a new int64 array [N].

    Args:
        parts: the folders, opened.
        weights: of each folder, > 0; its part of their sum is its share of the samples. None: by the number of rows.

    Raises:
        ValueError: folders whose rows do not go together; names two of them and all that differs.
    """

    def __init__(self, parts: Sequence[TokenRows], weights: Sequence[Fraction] | None = None) -> None:
        assert len(parts) > 0
        self.parts = tuple(parts)
        numbers = [Fraction(len(part)) for part in parts] if weights is None else list(weights)
        assert len(numbers) == len(parts)
        self.shares = tuple(number / sum(numbers) for number in numbers)
        """[F], of the samples; their sum is 1."""
        self.starts = [0]
        """[F + 1]: the number of each folder's first row, and that of all rows."""
        for part in parts:
            self.starts.append(self.starts[-1] + len(part))
        for part in parts[1:]:
            _check_same_kind(part, parts[0])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        return self.read(index).tokens

    def read(self, index: int) -> Row:
        """Row `index`, with what is marked in it (TokenRows.read)."""
        part, row = self.at(index)
        return part.read(row)

    def at(self, index: int) -> tuple[TokenRows, int]:
        """The folder of a row, and the row's number there."""
        folder = self.folder_of(index)
        return self.parts[folder], index - self.starts[folder]

    def folder_of(self, index: int) -> int:
        """Number of the folder that holds a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    @property
    def header(self) -> RowsHeader:
        """That of the first folder: its length of rows, vocabulary, BOS and tokenizer are those of all."""
        return self.parts[0].header

    @property
    def path(self) -> Path:
        """The first folder."""
        return self.parts[0].path

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all rows in their order."""
        return joined_fingerprint([part.fingerprint for part in self.parts])

    def order(self, *, seed: int, shuffle: bool) -> "BlendOrder":
        """The order of the rows in a run."""
        return BlendOrder([len(part) for part in self.parts], self.shares, seed=seed, shuffle=shuffle)


class BlendOrder:
    """Which row of a `Blend` each sample is. Of each folder's own samples, epoch e takes every row once.

    Args:
        num_rows: [F], rows of the folders.
        shares: [F], of the samples; their sum is 1.
        seed: of the shuffle, >= 0.
        shuffle: False: each folder in input order in every epoch.

    Raises:
        ValueError: negative seed.
    """

    def __init__(self, num_rows: Sequence[int], shares: Sequence[Fraction], *, seed: int, shuffle: bool) -> None:
        self.num_rows = sum(num_rows)
        self.seed = seed
        self.shuffle = shuffle
        self.shares = tuple(shares)
        self._starts = [sum(num_rows[:folder]) for folder in range(len(num_rows))]
        self._orders = [
            RowOrder(rows, seed=seed, shuffle=shuffle, folder=folder) for folder, rows in enumerate(num_rows)
        ]

    def __getitem__(self, sample: int) -> int:
        """The row of a sample; samples are expected to come in order (one permutation a folder is kept)."""
        folder, own_sample = place(sample, self.shares)
        return self._starts[folder] + self._orders[folder][own_sample]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a sample to be the same row, as plain values."""
        shares = {"shares": [str(share) for share in self.shares]} if len(self.shares) > 1 else {}
        return {"seed": self.seed, "shuffle": self.shuffle, "num_rows": self.num_rows, **shares}


def place(sample: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The folder of a sample, and how many samples before it are of that folder.

    The folders are halved until one is left. At each halving, of the first n samples that came so far, the left half
    gets its part, rounded: so n says whether the next one is to go left, and how many went there before. No folder is
    ever further from its share than half a sample a halving.

    >>> [place(sample, [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]) for sample in range(4)]
    [(0, 0), (1, 0), (0, 1), (2, 0)]
    """
    bounds = _bounds(shares)
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        left = bounds[middle] - bounds[low], bounds[high] - bounds[low]
        before = _part(sample, *left)
        if _part(sample + 1, *left) > before:
            sample, high = before, middle
        else:
            sample, low = sample - before, middle
    return low, sample


def taken(samples: int, shares: Sequence[Fraction]) -> list[int]:
    """How many of the first `samples` samples are of each folder.

    >>> taken(7, [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)])
    [4, 2, 1]
    """
    bounds = _bounds(shares)

    def split(samples: int, low: int, high: int) -> list[int]:
        if high - low == 1:
            return [samples]
        middle = (low + high) // 2
        left = _part(samples, bounds[middle] - bounds[low], bounds[high] - bounds[low])
        return split(left, low, middle) + split(samples - left, middle, high)

    return split(samples, 0, len(shares))


def joined_fingerprint(fingerprints: Sequence[str]) -> str:
    """Of several things in their order: a single one has its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def _bounds(shares: Sequence[Fraction]) -> list[int]:
    """[F + 1]: the sums of the shares before each folder, as integers of a common denominator."""
    denominator = lcm(*(share.denominator for share in shares))
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + share.numerator * (denominator // share.denominator))
    return bounds


def _part(samples: int, part: int, whole: int) -> int:
    """samples * part / whole, rounded (halves up): grows by 0 or 1 with each sample."""
    return (2 * samples * part + whole) // (2 * whole)


def _check_same_kind(rows: TokenRows, first: TokenRows) -> None:
    ours, theirs = _kind(rows), _kind(first)
    different = [f"{name} {ours[name][1]} and {theirs[name][1]}" for name in ours if ours[name][0] != theirs[name][0]]
    if different:
        raise ValueError(
            f"--data-path: expected folders whose rows go together, got {rows.path} and {first.path} with "
            + ", ".join(different)
        )


def _kind(rows: TokenRows) -> dict[str, tuple[object, object]]:
    """What all folders must have in common, to compare and to show."""
    header = rows.header
    tokenizer, packing = header.tokenizer, header.packing
    values = {
        "tokens of a row": header.seq_length,
        "vocabulary": header.vocab_size,
        "BOS": header.bos_id,
        "--pack-multiple": packing.multiple if packing else None,
        "loss masks": header.masked,
    }
    made_by = (tokenizer.fingerprint, tokenizer.name) if tokenizer else (None, "none")
    return {"tokenizer": made_by, **{name: (value, value) for name, value in values.items()}}
