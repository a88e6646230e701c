"""Input files opened: decompressed where their name says so, and what damage is told of them.

    .gz     by Python's gzip module
    .zst    by pyarrow, which brings Zstandard; frames one after the other are one text, as with .gz

A Hugging Face dataset on disk (`save_to_disk`) is its Arrow files, in the order that its state.json says.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

COMPRESSIONS = {".gz": "gzip", ".zst": "Zstandard"}
DATASET_STATE, DATASET_INFO, DATASET_DICT = "state.json", "dataset_info.json", "dataset_dict.json"
"""Files of a Hugging Face dataset, and of several in one folder."""
_BUFFER_BYTES = 1 << 20
_DAMAGE = (EOFError, zlib.error, OSError)
"""What decompression raises for damaged or truncated files."""


@dataclass(frozen=True)
class Opened:
    """stream: of the content, decompressed. position: bytes of the file, as it lies on disk, that have been read."""

    stream: BinaryIO
    position: Callable[[], int]


def kind_of(file: Path) -> str:
    """The suffix that says what the content is: `.jsonl` of `a.jsonl.gz`."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def import_pyarrow(file: Path) -> ModuleType:
    """pyarrow, on first use.

    Raises:
        ValueError: it is not installed, and `file` needs it.
    """
    try:
        import pyarrow
    except ImportError as error:
        kind = {".zst": "Zstandard", ".parquet": "parquet", ".arrow": "an Arrow file"}[file.suffix]
        raise ValueError(f"{file}: reading {kind} needs pyarrow (pip install pyarrow)") from error
    module: ModuleType = pyarrow
    return module


@contextmanager
def open_content(file: Path) -> Iterator[Opened]:
    """The content of a file; `damage_named` goes around reading it."""
    if file.suffix == ".gz":
        with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
            yield Opened(io.BufferedReader(stream, _BUFFER_BYTES), raw.tell)
    elif file.suffix == ".zst":
        pyarrow = import_pyarrow(file)
        with pyarrow.OSFile(str(file)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
            yield Opened(io.BufferedReader(stream, _BUFFER_BYTES), raw.tell)
    else:
        with file.open("rb", buffering=_BUFFER_BYTES) as stream:
            yield Opened(stream, stream.tell)


def read_content(file: Path) -> bytes:
    """The whole content.

    Raises:
        ValueError: a compressed file is damaged or truncated.
    """
    with open_content(file) as opened:
        try:
            return opened.stream.read()
        except _DAMAGE as error:
            raise _named(file, "", error) from error


def read_lines(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """The number (from 1) and the content of each line, and the bytes of the file on disk that were read for it.

    Raises:
        ValueError: a compressed file is damaged or truncated; names the last line before.
    """
    number = position = 0
    with open_content(file) as opened:
        try:
            for number, line in enumerate(opened.stream, start=1):
                before, position = position, opened.position() if file.suffix in COMPRESSIONS else position + len(line)
                yield number, line, position - before
        except _DAMAGE as error:
            raise _named(file, f" after line {number}", error) from error


def _named(file: Path, place: str, error: Exception) -> Exception:
    if file.suffix not in COMPRESSIONS:
        return error
    return ValueError(f"{file}: damaged or truncated {COMPRESSIONS[file.suffix]} data{place}: {error}")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a Hugging Face dataset.

    Raises:
        ValueError: it holds several (a DatasetDict), one of which must be named.
    """
    if (folder / DATASET_DICT).is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / DATASET_STATE).is_file())
        raise ValueError(
            f"--input {folder}: a DatasetDict of the splits {', '.join(splits)}: name one, such as {folder / splits[0]}"
            if splits
            else f"--input {folder}: a DatasetDict without a split"
        )
    return (folder / DATASET_STATE).is_file() and (folder / DATASET_INFO).is_file()


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a Hugging Face dataset, in their order.

    Raises:
        ValueError: damaged, or incomplete.
    """
    state_file = folder / DATASET_STATE
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        selected = bool(state.get("_indices_data_files"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{state_file}: not the state of a Hugging Face dataset, or damaged: {error!r}") from error
    if selected:
        raise ValueError(f"{folder}: a selection that an old version of datasets saved; save it again with a newer one")
    if not files:
        raise ValueError(f"{folder}: the dataset has no rows")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: the dataset is incomplete")
    return files
