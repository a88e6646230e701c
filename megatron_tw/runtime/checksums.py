"""Checksums of the files of checkpoints and exports, made when they are written and compared before they are read.

    checksums.json   {"version": 2, "algorithm": "sha256", "files": {name: {"bytes": size, "digest": hex}}, "checksum":
                     hex of all this}

Every rank hashes the files that it wrote, which its host still has in memory; before reading, the files are dealt out
to the ranks by their sizes. sha256 is the fastest strong hash where the processor has instructions for it (all server
processors of the last years), and its library lets go of the interpreter: two files are hashed at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tw.data.files import header_checksum
from megatron_tw.parallel.agree import raise_together

CHECKSUMS_FILE = "checksums.json"
VERSION, ALGORITHM = 2, "sha256"
_FILES_AT_ONCE = 2
_WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp|model-(\d+)-of-\d+\.safetensors")


Entry = dict[str, Any]
"""`bytes` and `digest` of a file."""


def hash_files(directory: Path, known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Size and digest of every file of a checkpoint that was just written, by name; each is on disk when this returns.
    The same on every rank. Collective over the world.

    known: those of files that this rank wrote, as far as it has them already.

    Raises:
        OSError: a file that cannot be read, or not be written to disk.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    error, files = None, {}
    try:
        mine = [name for name in _names_of(directory) if _writer(name) % world_size == rank and name not in known]
        files = {**known, **entries_of(directory, mine)}
    except OSError as failed:
        error = failed
    raise_together(error)
    everywhere: list[dict[str, Entry]] = [{}] * world_size
    dist.all_gather_object(everywhere, files)
    return {name: entry for part in everywhere for name, entry in sorted(part.items())}


def entries_of(directory: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Size and digest of files that were just written, by name; each is on disk when this returns."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: _entry(directory / name), names), strict=True))


def seal(directory: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write the checksums of all files that were just written there. Collective over the world.

    known: those that this rank has already (see `hash_files`).

    Raises:
        OSError: a file cannot be read, or not be written to disk.
    """
    files, error = hash_files(directory, known or {}), None
    if dist.get_rank() == 0:
        content = {"version": VERSION, "algorithm": ALGORITHM, "files": files}
        try:
            with (directory / CHECKSUMS_FILE).open("w") as file:
                file.write(json.dumps({**content, "checksum": header_checksum(content)}, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as failed:
            error = failed
    raise_together(error)


def damage_of(path: Path) -> str | None:
    """What is wrong with one file, by the checksums beside it; None where it is as it was written, or not known."""
    files = _read_checksums(path.parent)
    if isinstance(files, str):
        return f"could not be verified: {files}"
    return _compare(path, files[path.name]) if files is not None and path.name in files else None


def damage(directory: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint or an export; None when all are as they were written,
    or where nothing is known of them (no checksums.json). The same on every rank. Collective over the world."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        answer = [_read_checksums(directory)]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is None or isinstance(answer[0], str):
        return answer[0]
    files: dict[str, dict[str, Any]] = answer[0]
    sizes = {name: entry["bytes"] for name, entry in files.items()}
    mine = deal_out(sizes, dist.get_world_size())[dist.get_rank()]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        found = dict(zip(mine, pool.map(lambda name: _compare(directory / name, files[name]), mine), strict=True))
    wrong = {name: problem for name, problem in found.items() if problem is not None}
    everywhere: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    problems = sorted((name, problem) for part in everywhere for name, problem in part.items())
    return f"{directory / problems[0][0]} {problems[0][1]}" if problems else None


def deal_out(sizes: Mapping[str, int], shares: int) -> list[list[str]]:
    """Names in `shares` lists whose sums of sizes are near each other: the largest first, to whoever has least.

    >>> deal_out({"a": 5, "b": 4, "c": 3, "d": 1}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    lists: list[list[str]] = [[] for _ in range(shares)]
    sums = [0] * shares
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = sums.index(min(sums))
        lists[least].append(name)
        sums[least] += sizes[name]
    return lists


def _read_checksums(directory: Path) -> dict[str, dict[str, Any]] | str | None:
    """The entries of the file, what is wrong with it, or None where there is none."""
    path = directory / CHECKSUMS_FILE
    try:
        content = json.loads(path.read_text())
        if (content["version"], content["algorithm"]) != (VERSION, ALGORITHM):
            found = f"{content['version']!r} with {content['algorithm']!r}"
            return f"{path}: expected version {VERSION} with {ALGORITHM}, got {found}"
        if content.pop("checksum") != header_checksum(content):
            return f"{path} is damaged (it is not what was written with its own checksum)"
        return {
            str(name): {"bytes": int(entry["bytes"]), "digest": str(entry["digest"])}
            for name, entry in content["files"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} is damaged ({' '.join(str(error).split())})"


def _compare(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"is damaged: {entry['bytes']} bytes were written, {size} are there"
        if _digest(path) != entry["digest"]:
            return "is damaged: its content is not what was written (checksums differ)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _names_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _writer(name: str) -> int:
    """The rank that wrote a file: Megatron's files are numbered by rank (and an export's parts nearly so); the others
    are rank 0's."""
    match = _WRITTEN_BY.fullmatch(name)
    return int(match[1] or match[2]) if match else 0


def _entry(path: Path) -> Entry:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "digest": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, ALGORITHM).hexdigest()
