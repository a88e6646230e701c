"""Input files to documents.

    text files      one file is one document (.txt and any other name)
    .jsonl, .json   one JSON object a line is one document
    .parquet        one row of the table is one document
    .arrow          the same: a file of a Hugging Face dataset on disk

All but tables may be compressed (.gz, .zst). A document is text, or the ready token ids of one row. Documents come in
input order. Every error names the file, and the line where there is one.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron_tw.data.files import PARTIAL_SUFFIX
from megatron_tw.data.opening import (
    COMPRESSIONS,
    dataset_files,
    import_pyarrow,
    is_dataset,
    kind_of,
    read_content,
    read_lines,
)

JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"
DIRECTORY_SUFFIXES = (".txt", ".jsonl", PARQUET_SUFFIX)
NO_DOCUMENTS = frozenset(
    {"dataset.json", "tokenizer.json", "tokenizer_config.json", "latest_checkpointed_iteration.txt"}
)
"""A folder that holds one of these is prepared rows, a tokenizer or a model, or a run: its .txt files (merges.txt,
vocab.txt) are no documents."""
MASK_KEY = "loss_mask"
"""JSON key or parquet column beside ready ids: 1 where the token at the same place is to be learned, else 0."""
TABLE_BATCH_ROWS = 256
MEMORY_OF_A_BYTE = 120
"""Bytes that Hugging Face's tokenizers hold for one byte of a document (measured on source code)."""
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class Document:
    """One document as it was read."""

    content: str | npt.NDArray[np.int64]
    """Its text, or its ready token ids [tokens] (not yet checked against a length or a vocabulary)."""
    location: str
    """Where it stands, for errors: FILE or FILE:LINE."""
    file_bytes: int
    """Its share of the input file's bytes, for progress."""
    place: tuple[int, int]
    """Number of its file among all, from 0, and of itself in that file, from 1."""
    targets: npt.NDArray[np.bool_] | None = None
    """Of ready ids: which of them count as targets (`loss_mask`), as many; None: the data does not say."""


def expand_inputs(inputs: Sequence[str | Path]) -> tuple[list[Path], int, list[Path]]:
    """The files that `--input` names, in the order given; a glob's or directory's own files are sorted by path.

    Each file comes once, however often and through whatever links it is named. A directory stands for its .txt, .jsonl
    and .parquet files, compressed or not, and Hugging Face datasets, at any depth, but for folders of this project's
    own, tokenizers and models (NO_DOCUMENTS); other text files need a glob (`DIR/**/*.py`).

    Returns:
        the files, how many more were named that are one of them, and the folders that were skipped.

    Raises:
        ValueError: something names no file, or an empty one.
    """
    files: dict[Path, Path] = {}
    named = 0
    skipped: dict[Path, Path] = {}
    for item in map(str, inputs):
        path = Path(item)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            left: list[Path] = []
            below = _files_below(path, left)
            found = sorted(file for file in below if kind_of(file) in (*DIRECTORY_SUFFIXES, ARROW_SUFFIX))
            if not found:
                but = f" outside {left[0]}, which is rows, a tokenizer, a model or a run" if left else ""
                kinds = ", ".join(DIRECTORY_SUFFIXES)
                raise ValueError(
                    f"--input {item}: the directory holds no {kinds} files and no datasets{but}; name other text "
                    f"files by a glob, such as '{item.rstrip('/')}/**/*.py'"
                )
            skipped |= {folder.resolve(): folder for folder in left}
        else:
            matches = sorted(map(Path, glob.glob(item, recursive=True)))
            found = [file for match in matches for file in _files_of_match(match)]
            if not found:
                raise ValueError(f"--input {item}: no such file or directory, and no glob that matches a file")
        named += len(found)
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise ValueError("--input names no file")
    for file in files.values():  # now, not after an hour of tokenizing
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
        if file.suffix in COMPRESSIONS and kind_of(file) in (PARQUET_SUFFIX, ARROW_SUFFIX):
            raise ValueError(f"{file}: a compressed {kind_of(file)} file cannot be read; decompress it")
        if file.suffix in (".zst", PARQUET_SUFFIX, ARROW_SUFFIX):
            import_pyarrow(file)
    return list(files.values()), named - len(files), list(skipped.values())


def _files_of_match(path: Path) -> list[Path]:
    """The files that a path stands for which a glob matches: itself, or those of a dataset."""
    if path.is_dir():
        return dataset_files(path) if is_dataset(path) else []
    return [path] if path.is_file() else []


def _files_below(folder: Path, skipped: list[Path]) -> Iterator[Path]:
    """All files in a folder and the folders below, links to folders included; each folder once, so that loops end. Of
    a dataset those of its data alone. Folders without documents are left out, and added to `skipped`: that of a
    preprocessing which goes on too, so that its input is what it was at the start."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(name)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        if not NO_DOCUMENTS.isdisjoint(files) or (Path(name) != folder and name.endswith(PARTIAL_SUFFIX)):
            folders.clear()
            skipped.append(Path(name))
            continue
        if is_dataset(Path(name)):
            folders.clear()
            yield from dataset_files(Path(name))
            continue
        folders.sort()
        yield from (file for file in (Path(name) / file for file in files) if file.is_file())


def check_memory(files: Sequence[Path]) -> None:
    """That the memory of this machine holds each text file, which is one document, while it is tokenized. Of a
    compressed file only the size on disk is known. Reads nothing.

    Raises:
        ValueError: one takes more than is available.
    """
    available = psutil.virtual_memory().available
    for file in files:
        if kind_of(file) in (*JSON_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX):
            continue
        size = file.stat().st_size
        needed = size * MEMORY_OF_A_BYTE
        if needed > available:
            raise ValueError(
                f"{file}: a text file is one document, which is held whole while it is tokenized: {_gb(size)} GB take "
                f"about {_gb(needed)} GB of memory, {_gb(available)} GB are available; make it several documents, "
                "each a line of a .jsonl file"
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e11 else f"{size / 1e9:,.0f}"


def read_documents(
    files: Sequence[Path], *, key: str, ready_ids: bool, after: tuple[int, int] = (0, 0)
) -> Iterator[Document]:
    """The documents of `files`, in order.

    Args:
        key: JSON key or parquet column that holds the text or the ids.
        ready_ids: the documents are token ids, not text.
        after: the `place` of a document that was read before, to go on behind it.

    Raises:
        ValueError: text that is not UTF-8, malformed JSON, no documents, missing key, value of another kind.
        OSError: a file cannot be read.
    """
    first, done = after
    for number, file in enumerate(files[first:], start=first):
        skip = done if number == first else 0
        if kind_of(file) in JSON_SUFFIXES:
            yield from _read_json_lines(file, number, skip, key, ready_ids)
        elif file.suffix in (PARQUET_SUFFIX, ARROW_SUFFIX):
            yield from _read_table(file, number, skip, key, ready_ids)
        elif ready_ids:
            raise ValueError(
                f"{file}: --tokenizer none reads ready ids from .jsonl or .parquet; a text file needs a tokenizer"
            )
        elif skip == 0:
            text = _decode(read_content(file), file)
            if not text:  # compressed, or a byte-order mark alone
                raise ValueError(f"{file}: the file is empty")
            yield Document(text, str(file), file.stat().st_size, (number, 1))


def _read_json_lines(file: Path, number: int, skip: int, key: str, ready_ids: bool) -> Iterator[Document]:
    count = 0
    for line_number, line, file_bytes in read_lines(file):
        if not line.strip():
            continue
        count += 1
        if count <= skip:
            continue
        location = f"{file}:{line_number}"
        record = _json(_decode(line, file, first_line=line_number), location)
        if not isinstance(record, dict):
            raise ValueError(f"{location}: expected a JSON object, got {type(record).__name__}")
        if key not in record:
            raise ValueError(f'{location}: no key "{key}" among {list(record)} (see --text-key)')
        if MASK_KEY in record:
            _check_mask_wanted(ready_ids, location)
        content = _content(record[key], key, ready_ids, location)
        targets = _targets(record[MASK_KEY], content, location) if ready_ids and MASK_KEY in record else None
        yield Document(content, location, file_bytes, (number, count), targets)
    if count == 0:
        raise ValueError(f"{file}: the file holds no documents, only blank lines")


def _json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: malformed JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:  # sys.get_int_max_str_digits
        raise ValueError(f"{location}: the JSON holds an integer of thousands of digits") from error
    except RecursionError as error:
        raise ValueError(f"{location}: the JSON is nested too deeply") from error


def _check_mask_wanted(ready_ids: bool, location: str) -> None:
    if not ready_ids:
        raise ValueError(
            f'{location}: "{MASK_KEY}" has a number for each of ready ids (--tokenizer none), got one beside text; '
            "give the ids, or remove it"
        )


def _read_table(file: Path, number: int, skip: int, key: str, ready_ids: bool) -> Iterator[Document]:
    pyarrow = import_pyarrow(file)
    kind = file.suffix.removeprefix(".")
    row_number = 0
    try:
        with (_open_parquet if file.suffix == PARQUET_SUFFIX else _open_arrow)(file) as (names, batches):
            if key not in names:
                raise ValueError(f'{file}: no column "{key}" among {names} (see --text-key)')
            masked = MASK_KEY in names
            if masked:
                _check_mask_wanted(ready_ids, str(file))
            for name in (key, MASK_KEY):
                if names.count(name) > 1:
                    raise ValueError(f'{file}: expected one column "{name}", got {names.count(name)}')
            for batch, batch_bytes in batches([key, MASK_KEY] if masked else [key]):
                masks = batch.column(MASK_KEY) if masked else [None] * len(batch)
                for value, mask in zip(batch.column(key), masks, strict=True):
                    row_number += 1
                    if row_number <= skip:
                        continue
                    location = f"{file}: row {row_number}"
                    content = _content(_cell(value, key, location), key, ready_ids, location)
                    targets = _targets(mask.as_py(), content, location) if masked else None
                    yield Document(content, location, batch_bytes // len(batch), (number, row_number), targets)
    except (pyarrow.ArrowException, OSError) as error:
        place = f" after row {row_number}" if row_number else ""
        raise ValueError(f"{file}: not a readable {kind} file{place}: {' '.join(str(error).split())}") from error
    if row_number == 0:
        raise ValueError(f"{file}: the table has no rows")


def _cell(value: Any, key: str, location: str) -> Any:
    """A value of a table as Python's own. Arrow does not look whether text is UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f'{location}: "{key}" is not UTF-8 text (byte 0x{byte:02x})') from error


Batches = Callable[[list[str]], Iterator[tuple[Any, int]]]
"""The batches of some columns of a table, and the bytes of the file that are read for each."""


@contextmanager
def _open_parquet(file: Path) -> Iterator[tuple[list[str], Batches]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:

        def batches(columns: list[str]) -> Iterator[tuple[Any, int]]:
            row_bytes = file.stat().st_size / max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=TABLE_BATCH_ROWS, columns=columns):
                yield batch, int(row_bytes * len(batch))

        yield table.schema_arrow.names, batches


@contextmanager
def _open_arrow(file: Path) -> Iterator[tuple[list[str], Batches]]:
    """A stream of Arrow's messages, as Hugging Face's datasets writes it."""
    import pyarrow

    with file.open("rb") as raw:  # a stream that was cut between two messages looks whole but for this
        raw.seek(-min(len(ARROW_END), file.stat().st_size), os.SEEK_END)
        if raw.read() != ARROW_END:
            raise OSError("the mark of its end is missing: truncated, or no stream of Arrow's")
    with pyarrow.memory_map(str(file)) as raw, pyarrow.ipc.open_stream(raw) as stream:

        def batches(columns: list[str]) -> Iterator[tuple[Any, int]]:
            position = 0
            for whole in stream:
                before, position = position, raw.tell()
                whole.select(columns).validate(full=True)  # else wrong offsets are followed, outside the memory too
                for start in range(0, len(whole), TABLE_BATCH_ROWS):
                    batch = whole.select(columns).slice(start, TABLE_BATCH_ROWS)
                    yield batch, (position - before) * len(batch) // len(whole)

        yield stream.schema.names, batches


def _content(value: Any, key: str, ready_ids: bool, location: str) -> str | npt.NDArray[np.int64]:
    if not ready_ids:
        if not isinstance(value, str):
            raise ValueError(f'{location}: "{key}" must be text, got {type(value).__name__}')
        try:  # JSON's \ud800 makes a string that is no Unicode text: tokenizers refuse it without saying where
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'{location}: "{key}" holds an unpaired surrogate at character {error.start}') from error
        return value
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f'{location}: "{key}" must be a list of integers (token ids)')
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f'{location}: "{key}" holds an id beyond 64 bits') from error


def _targets(value: Any, ids: str | npt.NDArray[np.int64], location: str) -> npt.NDArray[np.bool_]:
    """The mask beside ready ids; its first entry means nothing, for the first token is nobody's target."""
    if not isinstance(value, list) or not all(item in (0, 1) for item in value):
        raise ValueError(f'{location}: "{MASK_KEY}" must be a list of 0 and 1')
    if len(value) != len(ids):
        raise ValueError(f'{location}: "{MASK_KEY}" must have as many entries as there are ids, {len(ids)}; got '
                         f"{len(value)}")  # fmt: skip
    targets = np.array(value, dtype=bool)
    if not targets[1:].any():
        raise ValueError(f'{location}: "{MASK_KEY}" leaves no target')
    return targets


def _decode(content: bytes, file: Path, first_line: int = 1) -> str:
    """UTF-8 text, without the byte-order mark that some editors put in front."""
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{file}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
