"""Files that grow at their end, and are cut back to what is known to be whole where a process died over them."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_tw.data.files import PART_ROWS


class GrowingArray:
    """A .npy file of int64 rows that grows; what `numpy.save` would have written, once it is closed.

    Args:
        shape: of one row.
        rows: how many the file has already; what stands beyond them is cut off.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], rows: int = 0) -> None:
        self._file = file
        self._row_bytes = 8 * int(np.prod(shape, dtype=np.int64))
        self._shape, self._rows = shape, rows
        self._stream = open_to_append(file, (len(self._header()) + rows * self._row_bytes) if rows else 0)
        if rows == 0:
            self._stream.write(self._header())

    def append(self, rows_R: npt.NDArray[np.int64]) -> None:
        self._stream.write(rows_R.astype("<i8").tobytes())
        self._rows += len(rows_R)

    def flush(self) -> None:
        """Wait until it is on disk."""
        flush(self._stream)

    def close(self) -> None:
        self._stream.seek(0)
        self._stream.write(self._header())
        self.flush()
        self._stream.close()

    def parts(self) -> Iterator[npt.NDArray[np.int64]]:
        """What has been written and flushed, a part of the rows at a time."""
        with self._file.open("rb") as stream:
            stream.seek(len(self._header()))
            while content := stream.read(PART_ROWS * self._row_bytes):
                yield np.frombuffer(content, dtype="<i8").reshape(-1, *self._shape)

    def _header(self) -> bytes:
        """Of the same length whatever the number of rows: numpy leaves room for it."""
        stream = io.BytesIO()
        description = {"descr": "<i8", "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(stream, description)
        return stream.getvalue()


def open_to_append(file: Path, size: int) -> BinaryIO:
    """A file open for writing behind its first `size` bytes; what stands beyond them is cut off.

    Raises:
        ValueError: it has fewer.
    """
    found = file.stat().st_size if file.is_file() else 0
    if found < size:
        raise ValueError(
            f"{file}: {size} bytes were written, {found} are there: damaged, and removed; run the same command again "
            "to begin anew"
        )
    stream = file.open("r+b" if file.is_file() else "w+b")
    stream.truncate(size)
    stream.seek(size)
    return stream


def flush(stream: BinaryIO) -> None:
    """Wait until what was written is on disk."""
    stream.flush()
    os.fsync(stream.fileno())
