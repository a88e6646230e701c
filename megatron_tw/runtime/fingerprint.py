"""Which model it is, by content: what caches and parts of a long job are keyed by."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tw.data.files import header_checksum
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.families.table import expected_tensors
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.runtime.checksums import CHECKSUMS_FILE
from megatron_tw.runtime.source import ModelSource

HASHED_AT_ONCE = 1 << 26
"""Elements of a tensor that are read for its hash at a time."""


def model_fingerprint(source: ModelSource) -> str:
    """sha256 (hex) of the weights, the plain numbers of the architecture, and the rotary embedding. Collective over the
    world.

    Weights: by the checksums that lie beside them; a Hugging Face folder without some is read; of a checkpoint without
    some, the names, sizes and times of its files count.
    """
    folder = Path(source.name)
    checksums = folder / CHECKSUMS_FILE
    if checksums.is_file():
        weights = hashlib.sha256(checksums.read_bytes()).hexdigest()
    elif source.checkpoint is None:
        weights = weights_fingerprint(folder, source.architecture)
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        states = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        weights = hashlib.sha256("\n".join(states).encode()).hexdigest()
    content = {"weights": weights, "shape": plain_numbers(source.architecture), "rope": source.architecture.rope}
    answer: list[Any] = [header_checksum(content)]
    dist.broadcast_object_list(answer, src=0)  # times of files may be seen differently
    return str(answer[0])


def plain_numbers(architecture: Architecture) -> dict[str, int | float | bool | None]:
    """The plain numbers of an architecture."""
    values = {field.name: getattr(architecture, field.name) for field in dataclasses.fields(architecture)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, int | float)}


def weights_fingerprint(folder: str | Path, architecture: Architecture) -> str:
    """sha256 (hex) over name, dtype, shape and content of the model's tensors in the order of their names: the same
    however they are spread over files. The ranks share the reading. Collective over the world.

    Raises:
        ValueError: files or tensors missing, truncated or of other shapes (see SafetensorsFolder).
    """
    tensors = SafetensorsFolder(folder, architecture)
    shapes = sorted(expected_tensors(architecture).items())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = {name: _tensor_digest(tensors, name, shape) for name, shape in shapes[rank::world_size]}
    everywhere: list[dict[str, str] | None] = [None] * world_size
    dist.all_gather_object(everywhere, mine)
    digests = {name: digest for part in everywhere if part for name, digest in part.items()}
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _tensor_digest(tensors: SafetensorsFolder, name: str, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    rows_at_once = max(1, HASHED_AT_ONCE * shape[0] // int(np.prod(shape)))
    for start in range(0, shape[0], rows_at_once):
        part = tensors.read(name, 0, start, min(start + rows_at_once, shape[0]))
        if start == 0:
            digest.update(f"{part.dtype} {shape} ".encode())
        digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
