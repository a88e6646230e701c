"""A family's table of tensors, and what is read off it: one line for each parameter of Megatron-Core says how
tensor-parallel ranks cut it, and which Hugging Face tensors, of which shape, it holds.

    whole        every rank holds all of it
    rows         each tensor is cut along its first dimension; the rank's parts stand one after the other
    columns      cut along the second dimension
    vocabulary   rows, padded with zeros to the same number on every rank
    qkv          of each key-value head: the rows of its query heads, its key rows, its value rows; a rank has an equal
                 share of all these rows, part of one head's where there are more ranks than key-value heads

Names count layers where a `*` stands, Megatron-Core's within a model chunk. Where Transformer Engine's layers have
another name for a parameter, it stands second.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_tw.model.architecture import Architecture

Slices = Callable[[str, int, int, int], Tensor]
"""read(name, dim, start, stop): that slice of a Hugging Face tensor along dim."""
Cut = Literal["whole", "rows", "columns", "vocabulary", "qkv"]
Size = Literal["vocabulary", "hidden", "ffn", "queries", "keys", "head"]
"""queries, keys: rows of all query heads, of all key-value heads."""
Shape = tuple[int, ...]
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Parameter:
    """One parameter of Megatron-Core, in every layer where its name has a `*`.

    tensors: Hugging Face name -> sizes; of qkv in the order query, key, value. tied: the tensor that it is instead
    where embeddings are tied; a folder may hold it all the same, as a copy.
    """

    names: tuple[str, ...]
    cut: Cut
    tensors: Mapping[str, tuple[Size, ...]]
    tied: str | None = None


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among `size` tensor-parallel ranks, and the padded vocabulary that they share."""

    rank: int
    size: int
    padded_vocab_size: int


def expected_tensors(architecture: "Architecture") -> dict[str, Shape]:
    """Names and shapes of all tensors of a checkpoint of this architecture."""
    shapes: dict[str, Shape] = {}
    for parameter in architecture.family.tensors:
        if not _is_a_copy(parameter, architecture):
            in_layers = "*" in parameter.names[0]
            for layer in range(architecture.num_layers) if in_layers else (0,):
                shapes |= _shapes(parameter, layer, architecture)
    return shapes


def layer_shapes(architecture: "Architecture", part: str = "") -> list[Shape]:
    """Shapes of all Hugging Face tensors of one layer; part: only of the Megatron-Core parameters whose name has it."""
    parameters = [parameter for parameter in architecture.family.tensors if "*" in parameter.names[0]]
    parameters = [parameter for parameter in parameters if part in parameter.names[0]]
    return [shape for parameter in parameters for shape in _shapes(parameter, 0, architecture).values()]


def tied_copies(architecture: "Architecture") -> dict[str, str]:
    """Tensors that a folder may hold though the model takes another for them: copy -> the other."""
    copies = [parameter for parameter in architecture.family.tensors if _is_a_copy(parameter, architecture)]
    return {name: str(parameter.tied) for parameter in copies for name in parameter.tensors}


def tensor_names(name: str, layer_offset: int, architecture: "Architecture") -> tuple[str, ...]:
    """The Hugging Face tensors in the Megatron-Core parameter `name` of a chunk.

    layer_offset: global number (from 0) of the chunk's first layer; names count layers within their chunk.
    """
    parameter, layer = _find(name, layer_offset, architecture)
    return tuple(_sources(parameter, layer, architecture))


def import_parameter(
    name: str, layer_offset: int, architecture: "Architecture", tp: TensorParallel, read: Slices
) -> Tensor:
    """This rank's shard of the Megatron-Core parameter `name`, in the checkpoint's dtype, on the CPU."""
    parameter, layer = _find(name, layer_offset, architecture)
    sources = _sources(parameter, layer, architecture)
    if parameter.cut == "qkv":
        return _import_qkv(architecture, sources, tp, read)
    parts = []
    for tensor, shape in sources.items():
        if parameter.cut == "whole":
            parts.append(read(tensor, 0, 0, shape[0]))
        elif parameter.cut == "vocabulary":
            rows = tp.padded_vocab_size // tp.size
            start, stop = (min(bound, shape[0]) for bound in (tp.rank * rows, (tp.rank + 1) * rows))
            part = read(tensor, 0, start, stop)
            parts += [part, part.new_zeros(rows - len(part), *shape[1:])]
        else:
            dim = 1 if parameter.cut == "columns" else 0
            width = shape[dim] // tp.size
            parts.append(read(tensor, dim, tp.rank * width, (tp.rank + 1) * width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def export_parameter(
    name: str, layer_offset: int, architecture: "Architecture", shards: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors held by a Megatron-Core parameter whose shards, in tensor-parallel order, are
    `shards`; none where it is a copy of another."""
    parameter, layer = _find(name, layer_offset, architecture)
    if _is_a_copy(parameter, architecture):
        return
    sources = _shapes(parameter, layer, architecture)
    if parameter.cut == "qkv":
        yield from _export_qkv(architecture, sources, shards)
        return
    parts = [shard.chunk(len(sources)) for shard in shards]
    for number, (tensor, shape) in enumerate(sources.items()):
        mine = [part[number] for part in parts]
        if parameter.cut == "whole":
            yield tensor, mine[0]
        else:
            yield tensor, torch.cat(mine, dim=1 if parameter.cut == "columns" else 0)[: shape[0]]


def _import_qkv(architecture: "Architecture", sources: dict[str, Shape], tp: TensorParallel, read: Slices) -> Tensor:
    # Whole groups that this rank has a part of: several, or one of which it has some rows.
    groups = architecture.num_query_groups
    first, last = tp.rank * groups // tp.size, -(-(tp.rank + 1) * groups // tp.size)
    parts = []
    for tensor, shape in sources.items():
        rows = shape[0] // groups
        parts.append(read(tensor, 0, first * rows, last * rows).reshape(last - first, rows, *shape[1:]))
    whole = torch.cat(parts, dim=1)
    rows = groups * whole.shape[1] // tp.size
    start = tp.rank * rows - first * whole.shape[1]
    return whole.flatten(0, 1)[start : start + rows]


def _export_qkv(
    architecture: "Architecture", sources: dict[str, Shape], shards: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    groups = architecture.num_query_groups
    rows = [shape[0] // groups for shape in sources.values()]
    whole = torch.cat(shards).unflatten(0, (groups, sum(rows)))
    for tensor, part in zip(sources, whole.split(rows, dim=1), strict=True):
        yield tensor, part.flatten(0, 1)


def _find(name: str, layer_offset: int, architecture: "Architecture") -> tuple[Parameter, int]:
    """The line of the table for a Megatron-Core parameter, and its layer's number in the whole model."""
    match = _LAYER.fullmatch(name)
    pattern, layer = (f"decoder.layers.*.{match[2]}", int(match[1]) + layer_offset) if match else (name, 0)
    for parameter in architecture.family.tensors:
        if pattern in parameter.names:
            return parameter, layer
    raise KeyError(f"{name} is not in the table of {architecture.family.model_type}")


def _sources(parameter: Parameter, layer: int, architecture: "Architecture") -> dict[str, Shape]:
    """The tensors that a parameter is read from."""
    shapes = _shapes(parameter, layer, architecture)
    if _is_a_copy(parameter, architecture):
        return dict(zip((str(parameter.tied),), shapes.values(), strict=True))
    return shapes


def _shapes(parameter: Parameter, layer: int, architecture: "Architecture") -> dict[str, Shape]:
    a = architecture
    sizes: dict[Size, int] = {
        "vocabulary": a.vocab_size,
        "hidden": a.hidden_size,
        "ffn": a.ffn_hidden_size,
        "queries": a.num_attention_heads * a.head_dim,
        "keys": a.num_query_groups * a.head_dim,
        "head": a.head_dim,
    }
    return {
        name.replace("*", str(layer)): tuple(sizes[size] for size in shape) for name, shape in parameter.tensors.items()
    }


def _is_a_copy(parameter: Parameter, architecture: "Architecture") -> bool:
    return parameter.tied is not None and architecture.tied_embeddings
