"""What the project's own folders have in common: versioned and typed JSON headers, files whose sizes are known,
Megatron's index files, and that a folder appears complete or not at all.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import struct
import tokenize
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

Header = TypeVar("Header")

_OF_NUMPY = (
    *(ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, KeyError),
    *(tokenize.TokenError, SyntaxError, TypeError, IndexError, OverflowError, MemoryError, RuntimeError, UserWarning),
)
"""What `numpy.load` raises for damaged files."""
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_INDEX_SEQUENCE_BYTES, _INDEX_BOUNDARY_BYTES = 12, 8  # what follows for each
PARTIAL_SUFFIX = ".partial"
"""Of a folder that is not complete."""
PART_ROWS = 1 << 16
"""Rows whose places or digests are held at a time while they are written."""


def header_json(kind: str, version: int, header: Any, **extras: Any) -> str:
    """A header file's content: `kind`, `version`, the fields of a dataclass, `extras`, and a checksum of all that."""
    content = {"format": kind, "format_version": version, **dataclasses.asdict(header), **extras}
    return json.dumps({**content, "checksum": header_checksum(content)}, indent=2) + "\n"


def header_checksum(content: Mapping[str, Any]) -> str:
    """sha256 (hex) of a header's fields, in whatever order they stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_header(
    file: Path, header: type[Header], kind: str, versions: tuple[int, ...], *, remedy: str, extras: tuple[str, ...] = ()
) -> Header:
    """A header file as an instance of the dataclass `header`, every field of the type that its annotation says.

    Args:
        versions: that this program reads.
        remedy: what to do about another version, in words.
        extras: fields that the file may have besides those of the dataclass; they are left out.

    Raises:
        ValueError: not JSON, a file of another kind or version, a field that is missing, unknown or of another type, or
            one that was changed after it was written.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f'{file}: not a header of "{kind}"')
    found = content.get("format_version")
    if found not in versions:
        known = " and ".join(map(str, versions))
        raise ValueError(f"{file}: format version {found}, but this program reads version {known}; {remedy}")
    checksum, written = content.pop("checksum", None), dict(content)
    own = ("format", "format_version", *extras)
    instance: Header = typed(header, {name: content[name] for name in content if name not in own}, str(file))
    if (found != 1 or checksum is not None) and checksum != header_checksum(written):  # version 1 of all had none
        raise ValueError(f"{file}: its fields are not those that were written with its checksum: damaged or edited")
    return instance


def typed(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type `hint`: a number, text, a dict, a dataclass, or a union of them.

    Raises:
        ValueError: it is of another type, or a dataclass' field is missing or unknown; `where` names the place.
    """
    if get_origin(hint) in (Union, UnionType):
        arms = get_args(hint)
        if value is None and NoneType in arms:
            return None
        plain = [arm for arm in arms if arm is not NoneType]
        if len(plain) == 1:
            return typed(plain[0], value, where)
        if any(_is_of(arm, value) for arm in plain):
            return value
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        fields, hints = {field.name: field for field in dataclasses.fields(hint)}, get_type_hints(hint)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in value]:
            raise ValueError(f"{where}: missing fields: {', '.join(missing)}")
        if unknown := [name for name in value if name not in fields]:
            raise ValueError(f"{where}: unknown fields: {', '.join(unknown)}")
        make: Any = hint
        return make(**{name: typed(hints[name], item, f"{where}: {name}") for name, item in value.items()})
    elif get_origin(hint) is dict and isinstance(value, dict):
        return {name: typed(get_args(hint)[1], item, f"{where}: {name}") for name, item in value.items()}
    elif _is_of(hint, value):
        return value
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    raise ValueError(f"{where}: expected {names.get(hint, 'a JSON object')}, got {json.dumps(value)[:80]}")


def _is_of(hint: Any, value: Any) -> bool:
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint in (object, Any) or (isinstance(hint, type) and isinstance(value, hint))


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
    array: npt.NDArray[np.int64] = numpy_file(file.read_bytes(), file)
    if array.shape != shape or array.dtype != np.int64:
        raise ValueError(f"{file}: expected int64 {list(shape)}, got {array.dtype} {list(array.shape)}")
    return array


def numpy_file(content: bytes, file: Path) -> Any:
    """The array in a .npy file, or the arrays of a .npz file by name; `file` is its name, for errors.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of numpy, which repairs some headers
            found = np.load(io.BytesIO(content), allow_pickle=False)
            return {name: found[name] for name in found.files} if isinstance(found, np.lib.npyio.NpzFile) else found
    except _OF_NUMPY as error:
        raise ValueError(f"{file} is truncated or no numpy file: {' '.join(str(error).split())}") from error


def index_size(sequences: int, boundaries: int) -> int:
    """Bytes of an index file of Megatron's IndexedDataset."""
    return _INDEX_HEADER.size + _INDEX_SEQUENCE_BYTES * sequences + _INDEX_BOUNDARY_BYTES * boundaries


def check_index(
    file: Path, dtype_code: int, itemsize: int, sequences: int, length: int, boundaries: int, what: str
) -> None:
    """That an index file of Megatron's IndexedDataset is of so many sequences, all of this length and dtype, one after
    the other, and of so many document boundaries.

    Raises:
        ValueError: it is not.
    """
    with file.open("rb") as stream:
        same = stream.read(_INDEX_HEADER.size) == _INDEX_HEADER.pack(
            b"MMIDIDX\0\0", 1, dtype_code, sequences, boundaries
        )
        lengths = np.fromfile(stream, dtype="<i4", count=sequences)
        pointers = np.fromfile(stream, dtype="<i8", count=sequences)
        documents = np.fromfile(stream, dtype="<i8", count=boundaries)
    same = same and bool((lengths == length).all())
    same = same and np.array_equal(pointers, np.arange(sequences, dtype=np.int64) * (length * itemsize))
    same = same and len(documents) == boundaries and bool(documents[0] == 0 and documents[-1] == sequences)
    if not (same and bool((np.diff(documents) > 0).all())):
        raise ValueError(f"{file} does not fit the header: it is damaged, or of another {what}")


def write_index(
    file: Path, dtype_code: int, itemsize: int, sequences: int, length: int, boundaries: Iterable[npt.NDArray[np.int64]]
) -> None:
    """An index file of Megatron's IndexedDataset, as `check_index` wants it, without ever holding it whole.

    boundaries: the document boundaries, 0 first and `sequences` last, a part of them at a time.
    """
    with file.open("wb") as stream:
        stream.write(bytes(_INDEX_HEADER.size))  # it holds the number of boundaries
        for part in parts_of(sequences):
            stream.write(np.full(len(part), length, dtype="<i4").tobytes())
        for part in parts_of(sequences):
            stream.write((np.arange(part.start, part.stop, dtype="<i8") * (length * itemsize)).tobytes())
        count = 0
        for some in boundaries:
            stream.write(some.astype("<i8").tobytes())
            count += len(some)
        stream.seek(0)
        stream.write(_INDEX_HEADER.pack(b"MMIDIDX\0\0", 1, dtype_code, sequences, count))


def parts_of(count: int) -> Iterator[range]:
    """0 .. count - 1, a part at a time."""
    return (range(start, min(start + PART_ROWS, count)) for start in range(0, count, PART_ROWS))


def partial_folder(output: Path) -> Path:
    """Where a folder lies while it is being made: beside `output`, which it becomes."""
    return output.absolute().parent / f"{output.absolute().name}{PARTIAL_SUFFIX}"


def check_place(output: Path, option: str = "--output") -> None:
    """That a folder which is made beside `output` can be renamed to it: that replaces an empty folder, but neither a
    link nor a mount point. Only looks.

    Raises:
        ValueError: it cannot.
    """
    if output.name in ("", ".."):
        raise ValueError(f"{option} {output}: expected the name of a new folder, such as {output / 'out'}")
    if output.is_symlink():
        there = os.path.realpath(output)
        raise ValueError(f"{option} {output}: expected a new or empty folder, found a link; give the folder: {there}")
    if os.path.ismount(output):
        raise ValueError(
            f"{option} {output}: expected a new or empty folder, found a mount point; give a folder in it, such as "
            f"{output / 'out'}"
        )


def check_new_folder(output: Path) -> None:
    """That `output` can become a new folder: it makes the folder above it.

    Raises:
        ValueError: `output` is a file or a folder that holds something, or no place for a folder (`check_place`).
        OSError: the folder above cannot be made or written to.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} already exists and is not an empty folder")
    check_place(output)
    with making(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"--output {output}: the folder above it cannot be written to")


def write_synced(file: Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all, after a crash of the machine too."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(file: Path) -> None:
    """Wait until the file is on disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def making(output: Path) -> Iterator[None]:
    """Around making the folder of `output` or one beside it: an error names the option."""
    try:
        yield
    except OSError as error:
        raise OSError(f"--output {output}: cannot be written to: {error.strerror} ({error.filename})") from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends well, and is removed when not.

    Raises:
        ValueError: `output` is a file or a folder that holds something.
    """
    check_new_folder(output)
    temporary = output.absolute().parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    with making(output):
        temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)  # replaces an empty folder, and nothing else
    except BaseException:
        shutil.rmtree(temporary)
        raise
