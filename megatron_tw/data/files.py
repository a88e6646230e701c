"""What the project's own folders have in common: versioned JSON headers, files whose sizes are known, Megatron's index
files, and that a folder appears complete or not at all.
"""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_INDEX_SEQUENCE_BYTES, _INDEX_BOUNDARY_BYTES = 12, 8  # what follows for each


def header_json(kind: str, version: int, header: Any) -> str:
    """A header file's content: `kind`, `version` and the fields of a dataclass."""
    return json.dumps({"format": kind, "format_version": version, **dataclasses.asdict(header)}, indent=2) + "\n"


def read_header(file: Path, kind: str, version: int, *, remedy: str) -> dict[str, Any]:
    """The fields in a header file.

    remedy: what to do about another version, in words.

    Raises:
        ValueError: not JSON, or a file of another kind or version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is truncated or no JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != kind:
        raise ValueError(f'{file}: not a header of "{kind}"')
    found = content.pop("format_version", None)
    if found != version:
        raise ValueError(f"{file}: format version {found}, but this program reads version {version}; {remedy}")
    return content


def check_sizes(folder: Path, sizes: Mapping[str, int], what: str) -> None:
    """That files are there and have these sizes in bytes.

    Raises:
        ValueError: one is missing or of another size. `what` names what they are files of.
    """
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: the {what} is incomplete")
        if file.stat().st_size != size:
            raise ValueError(
                f"{file} is truncated or of another {what}: {size} bytes expected, {file.stat().st_size} there"
            )


def load_int64(file: Path, shape: tuple[int, ...], what: str) -> npt.NDArray[np.int64]:
    """An int64 array from a .npy file.

    Raises:
        ValueError: the file is missing or truncated, or holds another dtype or shape.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: the {what} is incomplete")
    try:
        array: npt.NDArray[np.int64] = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is truncated or no numpy file: {error}") from error
    if array.shape != shape or array.dtype != np.int64:
        raise ValueError(f"{file}: expected int64 {list(shape)}, got {array.dtype} {list(array.shape)}")
    return array


def index_size(sequences: int, boundaries: int) -> int:
    """Bytes of an index file of Megatron's IndexedDataset."""
    return _INDEX_HEADER.size + _INDEX_SEQUENCE_BYTES * sequences + _INDEX_BOUNDARY_BYTES * boundaries


def check_index(file: Path, dtype_code: int, sequences: int, length: int, boundaries: int, what: str) -> None:
    """That an index file of Megatron's IndexedDataset is of so many sequences, all of this length and dtype.

    Raises:
        ValueError: it is not.
    """
    with file.open("rb") as stream:
        same = stream.read(_INDEX_HEADER.size) == _INDEX_HEADER.pack(
            b"MMIDIDX\0\0", 1, dtype_code, sequences, boundaries
        )
        same = same and bool((np.fromfile(stream, dtype="<i4", count=sequences) == length).all())
    if not same:
        raise ValueError(f"{file} does not fit the header: it is of another {what}")


def check_new_folder(output: Path) -> None:
    """That `output` can become a new folder: it makes the folder above it.

    Raises:
        ValueError: `output` is a file or a folder that holds something.
        OSError: the folder above cannot be made or written to.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} already exists and is not an empty folder")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"--output {output}: the folder above it cannot be written to")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends well, and is removed when not.

    Raises:
        ValueError: `output` is a file or a folder that holds something.
    """
    check_new_folder(output)
    temporary = output.absolute().parent / f".{output.name}.{os.getpid()}.partial"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)  # replaces an empty folder, and nothing else
    except BaseException:
        shutil.rmtree(temporary)
        raise
