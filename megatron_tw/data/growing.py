"""A folder of rows while it is being made: a run that was killed goes on where it was.

    OUTPUT.partial/plan.json       what decides the rows: another command is refused
    OUTPUT.partial/progress.json   how far the files in rows/ are complete (Written); replaced as a whole
    OUTPUT.partial/open_rows_D.npz with --pack: documents that are to go into rows that are not full, after document D
    OUTPUT.partial/rows/           what becomes OUTPUT; what stands beyond the progress is cut off
    OUTPUT.partial/lock            held by the process that is at it (flock), for as long as it lives

`save` first waits until the rows are on the disk, and then replaces progress.json: whenever a process or a machine
dies, the progress tells of rows that are there. The rows depend on the plan alone, so they are the same byte for byte,
however often the work was cut off.
"""

import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tw.data.files import (
    check_new_folder,
    header_json,
    making,
    numpy_file,
    partial_folder,
    read_header,
    sync,
    write_synced,
)
from megatron_tw.data.rows_format import HEADER_FILE
from megatron_tw.data.rows_writer import RowsSoFar

FORMAT_VERSION = 1
PLAN, PROGRESS, ROWS, LOCK = "plan.json", "progress.json", "rows", "lock"
AGAIN = "damaged, and removed; run the same command again to begin anew"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the rows."""

    seq_length: int
    vocab_size: int | None
    bos_id: int | None
    text_key: str
    tokenizer: str | None
    """Its fingerprint; None: ready ids."""
    library: str | None
    """Name and version of the library that tokenizes."""
    files: int
    """Number of input files."""
    pack_multiple: int | None
    """--pack-multiple; None: without --pack."""
    inputs: str
    """sha256 (hex) of their names, sizes and times of change, in their order."""

    def differences(self, now: "Plan") -> list[str]:
        """`--option: begun with this, now that`, for all that is not as it was."""
        options = {
            "vocab_size": "--vocab-size",
            "seq_length": "--seq-length",
            "bos_id": "--bos-id",
            "text_key": "--text-key",
            "pack_multiple": "--pack-multiple (of --pack)",
            "tokenizer": "--tokenizer",
            "library": "the library that tokenizes",
            "files": "files of --input",
        }
        then, of_now = dataclasses.asdict(self), dataclasses.asdict(now)
        found = [
            f"{option}: begun with {_short(then[name])}, now {_short(of_now[name])}"
            for name, option in options.items()
            if then[name] != of_now[name]
        ]
        if self.inputs != now.inputs and self.files == now.files:
            found.append("--input: other files than it was begun with, in another order, or changed since")
        return found


@dataclass(frozen=True, kw_only=True)
class Written:
    """What has been done: documents up to a place in the input, and the rows that they gave."""

    file: int = 0
    """Number of the input file, from 0, in which the last document stands."""
    documents_of_file: int = 0
    """So many of its documents have been read."""
    documents: int = 0
    tokens: int = 0
    documents_too_short: int = 0
    tokens_dropped: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    masked: bool | None = None
    """Whether the documents have a loss mask; None before the first one."""
    input_bytes: int = 0
    """Of the input files, for the progress bar."""
    written: RowsSoFar = field(default_factory=RowsSoFar)


class GrowingFolder:
    """OUTPUT.partial, held by this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = path / ROWS

    def written(self) -> Written:
        """What an earlier process did.

        Raises:
            ValueError: damaged.
        """
        file = self.path / PROGRESS
        if not file.is_file():
            return Written()
        return read_header(file, Written, _kind("progress"), (FORMAT_VERSION,), remedy=AGAIN)

    def open_rows(self, written: Written) -> dict[str, npt.NDArray[Any]]:
        """What `save` was given with it; empty before the first document.

        Raises:
            ValueError: damaged.
        """
        if written.documents == 0:
            return {}
        file = self._open_rows_file(written)
        if not file.is_file():
            raise ValueError(f"{file} is missing: {AGAIN}")
        arrays: dict[str, npt.NDArray[Any]] = numpy_file(file.read_bytes(), file)
        return arrays

    def _open_rows_file(self, written: Written) -> Path:
        return self.path / f"open_rows_{written.documents}.npz"

    def save(self, written: Written, open_rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Note that so much is on the disk, as `RowsWriter.flush` sees to, and what is to go into rows that are not
        full (`Packer.state`)."""
        file = self._open_rows_file(written)
        if open_rows:
            content = io.BytesIO()
            np.savez(content, **open_rows)  # type: ignore[arg-type]
            write_synced(file, content.getvalue())
        write_synced(self.path / PROGRESS, header_json(_kind("progress"), FORMAT_VERSION, written).encode())
        for earlier in set(self.path.glob("open_rows_*.npz")) - {file}:
            earlier.unlink()


@contextmanager
def growing_folder(output: Path, plan: Plan) -> Iterator[GrowingFolder]:
    """A folder that becomes `output` when the block ends well. When it does not, what was noted with `save` is kept
    for the same command to go on with, except where the input is wrong or the folder is damaged (ValueError).

    Raises:
        ValueError: `output` holds something, another command was begun there, or another process is at it.
    """
    partial = partial_folder(output)
    if (output / HEADER_FILE).is_file() and partial.is_dir() and not (partial / ROWS).exists():
        shutil.rmtree(partial)  # of a run that was killed when all was done
    check_new_folder(output)
    with making(output):
        partial.mkdir(exist_ok=True)
    with _held(partial, output):
        _check_plan(partial, plan)
        folder = GrowingFolder(partial)
        folder.rows.mkdir(exist_ok=True)
        try:
            yield folder
            for file in folder.rows.rglob("*"):  # the name may be on the disk before what it names
                if file.is_file():
                    sync(file)
            folder.rows.rename(output)  # replaces an empty folder, and nothing else
        except BaseException as error:
            if isinstance(error, ValueError) or not (partial / PROGRESS).is_file():
                shutil.rmtree(partial)
            raise
        shutil.rmtree(partial)


def input_states(files: Sequence[Path]) -> list[str]:
    """Name, size and time of change of each file. Reads none of them."""
    return [f"{file.name}\0{(found := file.stat()).st_size}\0{found.st_mtime_ns}\n" for file in files]


def inputs_digest(states: Sequence[str]) -> str:
    """sha256 (hex) of files' `input_states`, in their order."""
    digest = hashlib.sha256()
    for state in states:
        digest.update(state.encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_unchanged(files: Sequence[Path], states: Sequence[str]) -> None:
    """That files which have been read are as they were before.

    Raises:
        ValueError: one was changed or removed meanwhile: what was read of it may be of neither.
    """
    changed = [str(file) for file, state in zip(files, states, strict=True) if not file.is_file()
               or input_states([file]) != [state]]  # fmt: skip
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"--input: {', '.join(changed[:3])}{more}: changed while it was read; run the same command again when "
            "nothing writes there"
        )


def _check_plan(partial: Path, plan: Plan) -> None:
    file = partial / PLAN
    if file.is_file() and (partial / PROGRESS).is_file():
        begun = read_header(file, Plan, _kind("plan"), (FORMAT_VERSION,), remedy=f"remove {partial}")
        if differences := begun.differences(plan):
            raise ValueError(
                f"{partial} holds the beginning of other rows: {'; '.join(differences)}. Remove it to start anew, or "
                "choose another --output"
            )
    else:
        shutil.rmtree(partial / ROWS, ignore_errors=True)  # of a start that saved nothing
    write_synced(file, header_json(_kind("plan"), FORMAT_VERSION, plan).encode())


@contextmanager
def _held(partial: Path, output: Path) -> Iterator[None]:
    """The lock of a folder. Where the storage has none, there is none.

    Raises:
        ValueError: another process holds it.
    """
    descriptor = os.open(partial / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"--output {output}: another process is at it ({partial})") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _kind(what: str) -> str:
    return f"megatron_tw token rows, {what}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 32 else text[:12] + "..."
