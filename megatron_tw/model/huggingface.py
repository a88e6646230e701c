"""The tensors of a Hugging Face folder, one file or sharded, compared with what config.json says and read slice by
slice."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tw.model.architecture import Architecture
from megatron_tw.model.families.table import Shape, expected_tensors, tied_copies

_DTYPES = ("F32", "BF16", "F16")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint folder, read slice by slice.

    copies: tensors that the folder holds though the model takes others for them (tied embeddings): copy -> the other.

    Raises (on construction, from the files' headers alone):
        ValueError: a file is missing, truncated or no safetensors file; index and files name other tensors than
        config.json gives, or tensors of another shape, or of no floating-point type.
    """

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        self.directory = Path(directory)
        self._handles: dict[str, safe_open] = {}
        self._file_of = self._find_tensors()
        expected, copies = expected_tensors(architecture), tied_copies(architecture)
        missing = sorted(set(expected) - set(self._file_of))
        if missing:
            raise ValueError(f"{self.directory}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
        self.copies = {copy: other for copy, other in copies.items() if copy in self._file_of}
        known = expected | {copy: expected[other] for copy, other in self.copies.items()}
        extra = sorted(
            name for name in set(self._file_of) - set(known) if not re.fullmatch(architecture.family.buffers, name)
        )
        if extra:
            raise ValueError(
                f"{self.directory}: tensor {extra[0]} is none of a {architecture.family.model_type} model with "
                f"{architecture.num_layers} layers, as config.json says ({len(extra)} such in all)"
            )
        for name, shape in known.items():
            self._check(name, shape)

    def _check(self, name: str, shape: Shape) -> None:
        file = self.directory / self._file_of[name]
        part = self._handles[self._file_of[name]].get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(f"{file}: {name}: expected shape {shape}, got {tuple(part.get_shape())}")
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: {name}: expected numbers of {', '.join(_DTYPES)}, got {part.get_dtype()}")

    def _find_tensors(self) -> dict[str, str]:
        """Tensor -> file, with all files open."""
        index, single = self.directory / _INDEX, self.directory / _SINGLE
        if index.is_file() and single.is_file():
            raise ValueError(f"{self.directory}: expected {_SINGLE} or {_INDEX}, found both")
        if single.is_file():
            return dict.fromkeys(self._open(single.name), single.name)
        if not index.is_file():
            raise ValueError(f"{self.directory}: neither {_SINGLE} nor {_INDEX} found")
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            named = dict(content["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
        if not all(isinstance(file, str) for file in named.values()):
            raise ValueError(f"{index}: not a safetensors index (weight_map: expected names of files)")
        held = {file: set(self._open(file)) for file in sorted(set(named.values()))}
        for name, file in named.items():
            if name not in held[file]:
                raise ValueError(f"{self.directory / file}: tensor {name} is missing, though {index.name} names it")
        for file, names in held.items():
            unnamed = sorted(name for name in names if named.get(name) != file)
            if unnamed:
                raise ValueError(f"{index}: tensor {unnamed[0]} of {file} is missing ({len(unnamed)} missing in all)")
        return named

    def _open(self, name: str) -> list[str]:
        """Names of the tensors of a file, whose handle is kept."""
        path = self.directory / name
        if not path.is_file():
            raise ValueError(f"{path}: not found, though the index names it")
        try:
            self._handles[name] = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            found, expected = path.stat().st_size, _size_by_header(path)
            sizes = "" if expected in (None, found) else f"; by its header {expected:,} bytes, found {found:,}"
            raise ValueError(f"{path}: truncated or not a safetensors file ({error}{sizes})") from error
        return list(self._handles[name].keys())

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice [start:stop] of a tensor along dim 0 or 1; only those bytes are read (dim 0) or copied (dim 1)."""
        part = self._handles[self._file_of[name]].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]

    def read_finite(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """As `read`. Raises ValueError where NaN or infinity is in the slice."""
        part = self.read(name, dim, start, stop)
        if not bool(part.isfinite().all()):
            raise ValueError(f"{self.directory}: NaN or infinity in tensor {name}")
        return part


def _size_by_header(path: Path) -> int | None:
    """Bytes of a safetensors file as its header says: 8 bytes with the header's length, the header, and its tensors'
    bytes. None where there is no such header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        try:
            tensors = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
            return 8 + length + int(max(ends, default=0))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
