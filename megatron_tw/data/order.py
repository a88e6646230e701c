"""Which row each sample of a run is: a pure function of plain integers."""

from typing import Any

import numpy as np
import numpy.typing as npt


class RowOrder:
    """Which row each sample is. Epoch e is samples e*num_rows .. (e+1)*num_rows - 1 and takes every row once.

    Args:
        num_rows: rows of the dataset.
        seed: of the shuffle, >= 0.
        shuffle: False: input order in every epoch.
        folder: number of the dataset among several.

    Raises:
        ValueError: negative seed.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool, folder: int = 0) -> None:
        assert num_rows > 0
        if seed < 0:
            raise ValueError(f"--seed {seed}: the data order needs a seed >= 0")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self._folder = folder
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getitem__(self, sample: int) -> int:
        """The row of a sample; samples are expected to come epoch after epoch (one epoch's permutation is kept)."""
        epoch, position = divmod(sample, self.num_rows)
        if not self.shuffle:
            return position
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, epoch_permutation(self.num_rows, seed=self.seed, epoch=epoch, folder=self._folder)
        return int(self._cached[1][position])

    def identity(self) -> dict[str, Any]:
        """What must be the same for a sample to be the same row, as plain values."""
        return {"seed": self.seed, "shuffle": self.shuffle, "num_rows": self.num_rows}


def epoch_permutation(num_rows: int, *, seed: int, epoch: int, folder: int = 0) -> npt.NDArray[np.int64]:
    """The rows of an epoch in their order, int64 [num_rows]; each folder of several has its own.

    Rows are sorted by random 64-bit keys. numpy promises that the raw numbers of a bit generator stay the same for ever
    and everywhere, but not so for `Generator.permutation`; and a resumed run must find its order again.
    """
    entropy = [seed, epoch] if folder == 0 else [seed, epoch, folder]
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(num_rows)
    return np.argsort(keys, kind="stable").astype(np.int64)
