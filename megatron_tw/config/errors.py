"""A user's mistake ends a program with one line on stderr and exit status 2; a bug keeps its traceback."""

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from megatron_tw.config.options import flag
from megatron_tw.config.quiet import quiet_libraries

_PROJECT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0
INTERRUPTED = 130
_TARGETS = ("save", "save_hf", "output", "tensorboard_dir")


class FaultError(Exception):
    """What went wrong while a program ran and is no mistake of the user's, such as a rank that hangs: told in one line
    like a mistake, with exit status 1."""


class _Remembered:
    """Options as the program was given them: values by name, and the YAML file of each that no flag gave."""

    values: Mapping[str, Any] = {}
    files: Mapping[str, str] = {}


def remember_options(values: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Keep what the errors of this program should be able to tell: each option's value, and the YAML file that it came
    from (none for flags and defaults)."""
    _Remembered.values, _Remembered.files = values, files


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a tool's `main`: turn an OSError, or a ValueError that this project raised, into one line `error: ...` and
    exit status 2; a FaultError into the same and status 1; Ctrl-C into `interrupted` and status 130.

    A ValueError from inside a library is nobody's wrong option and keeps its traceback. An option whose value came from
    a YAML file is told with that file's name. Where nobody reads the output any more (`| head`), the program goes on.
    Warnings of libraries that help nobody are not shown.

    Under a launcher most mistakes are seen by every rank at once; rank 0 tells. The others wait GRACE_SECONDS first, in
    which the launcher ends them: without that, the first of them to leave would make the launcher end rank 0 before it
    has spoken. What only one of them saw (a file missing on its machine), it then says itself. Under torchrun the line
    goes into the file from which torchrun makes its summary, so that it stands there, at the end, once.
    """
    _outlive_readers()
    quiet_libraries()
    try:
        yield
    except (OSError, ValueError, FaultError) as error:
        if isinstance(error, ValueError) and not _raised_here(error):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0:
            time.sleep(GRACE_SECONDS)
        where = f" (rank {rank})" if rank != 0 else ""
        text = _os_error_in_words(error) if isinstance(error, OSError) else str(error)
        tell(f"error{where}: {_with_files(' '.join(text.split()))}")
        sys.exit(1 if isinstance(error, FaultError) else 2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


@contextmanager
def as_options(option: Callable[[str], str] = flag) -> Iterator[None]:
    """Around calls of the library with what options say: in its errors an `argument` becomes the option's name.

    option: the flag that stands for an argument.
    """
    try:
        yield
    except ValueError as error:
        if not _raised_here(error):
            raise
        raise ValueError(re.sub(r"`(\w+)`", lambda match: option(match[1]), str(error))) from error


def _raised_here(error: BaseException) -> bool:
    """Whether the statement that raised is in this project's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename).resolve()
    return path.is_relative_to(_PROJECT) and "site-packages" not in path.relative_to(_PROJECT).parts


def tell(line: str) -> None:
    """Print a line on stderr, or where torchrun makes its summary from; or on both, where that may not come."""
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        with suppress(OSError):
            message = {"message": line, "timestamp": str(int(time.time()))}
            Path(summary).write_text(json.dumps(message), encoding="utf-8")
            if _is_summarized():
                return
    print(line, file=sys.stderr, flush=True)


def _is_summarized() -> bool:
    """Whether torchrun is sure to end with its summary: not where it starts the ranks again, nor where it is one of
    several nodes' launchers, which a scheduler ends with the first of them."""
    names = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"
    restarts, most, nodes = (int(os.environ.get(name, "0")) for name in names)
    return restarts >= most and nodes <= 1


def _os_error_in_words(error: OSError) -> str:
    """What the system said, with the path it was about and the option that names the path."""
    if error.errno is None or error.strerror is None:
        return str(error)
    words = error.strerror[:1].lower() + error.strerror[1:]
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    name = error.filename2 if full and error.filename2 is not None else error.filename  # of a copy, the one written
    path = None if name is None else os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    option = "" if path is None else _option_of(path)
    targets = [f"{flag(name)} {_Remembered.values[name]}" for name in _TARGETS if _Remembered.values.get(name)]
    if full and targets and not option:  # a file that is to become one of them
        return f"{', '.join(targets)}: {words}"
    return words if path is None else f"{option}{path}: {words}"


def _option_of(path: str) -> str:
    """`--option: ` of the option that names this path or a folder above it, the nearest; nothing without one."""
    wanted = Path(path).absolute()
    depth: dict[str, int] = {}
    for name, value in _Remembered.values.items():
        for given in value if isinstance(value, list | tuple) else [value]:
            if isinstance(given, str | Path) and str(given) and wanted.is_relative_to(Path(given).absolute()):
                depth[name] = max(depth.get(name, 0), len(Path(given).absolute().parts))
    return f"{flag(max(depth, key=lambda name: depth[name]))}: " if depth else ""


def _with_files(text: str) -> str:
    """The text, with the YAML file's name after the first mention of each option (and its value) that a file set."""
    for name, file in _Remembered.files.items():
        mention = re.search(
            rf"{re.escape(flag(name))}(?![\w-])(?: {re.escape(str(_Remembered.values.get(name)))}\b)?", text
        )
        if mention is not None:
            text = f"{text[: mention.end()]} ({Path(file).name}){text[mention.end() :]}"
    return text


class _Unbroken:
    """A text stream that goes silent once nobody reads it, instead of raising BrokenPipeError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        try:
            action()
        except BrokenPipeError:
            # From here on into nothing; also what the interpreter flushes when it ends.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _outlive_readers() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Unbroken):
            setattr(sys, name, _Unbroken(stream))
