"""Weights of the Llama family between Hugging Face's names and Megatron-Core's shards.

Every Megatron-Core parameter is one of a few kinds; a kind says which Hugging Face tensors it holds and how a
tensor-parallel rank slices them. Import reads just those slices from the safetensors files; export is the same table
backwards. Both are bit-exact.

A fused QKV weight holds, for each key-value head, the rows of its query heads, then its key rows, then its value
rows; a rank owns an equal share of all these rows, which is part of one head's where there are more ranks than
key-value heads. A fused gate/up weight holds the rank's gate rows, then its up rows.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tw.model.architecture import Architecture

Slices = Callable[[str, int, int, int], Tensor]
"""read(name, dim, start, stop): that slice of a Hugging Face tensor along dim."""


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among `size` tensor-parallel ranks, and the padded vocabulary that they share."""

    rank: int
    size: int
    padded_vocab_size: int


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_KIND_IN_LAYER = {
    "input_layernorm.weight": ("whole", "input_layernorm.weight"),
    "self_attention.linear_qkv.layer_norm_weight": ("whole", "input_layernorm.weight"),
    "self_attention.linear_qkv.weight": ("qkv", "self_attn"),
    "self_attention.linear_proj.weight": ("columns", "self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": ("whole", "post_attention_layernorm.weight"),
    "mlp.linear_fc1.layer_norm_weight": ("whole", "post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": ("gate_up", "mlp"),
    "mlp.linear_fc2.weight": ("columns", "mlp.down_proj.weight"),
}
_KIND_OUTSIDE = {
    "embedding.word_embeddings.weight": ("vocabulary", "model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": ("whole", "model.norm.weight"),
    "output_layer.weight": ("vocabulary", "lm_head.weight"),
}


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint of this architecture."""
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (a.hidden_size,),
            prefix + "self_attn.q_proj.weight": (a.num_attention_heads * a.head_dim, a.hidden_size),
            prefix + "self_attn.k_proj.weight": (a.num_query_groups * a.head_dim, a.hidden_size),
            prefix + "self_attn.v_proj.weight": (a.num_query_groups * a.head_dim, a.hidden_size),
            prefix + "self_attn.o_proj.weight": (a.hidden_size, a.num_attention_heads * a.head_dim),
            prefix + "post_attention_layernorm.weight": (a.hidden_size,),
            prefix + "mlp.gate_proj.weight": (a.ffn_hidden_size, a.hidden_size),
            prefix + "mlp.up_proj.weight": (a.ffn_hidden_size, a.hidden_size),
            prefix + "mlp.down_proj.weight": (a.hidden_size, a.ffn_hidden_size),
        }
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint folder, one file or sharded, read slice by slice.

    Raises (on construction, from the files' headers alone):
        ValueError: a file is missing, truncated or no safetensors file; a tensor is missing or has another shape than
        config.json
            gives it.
    """

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        self.directory = Path(directory)
        self._file_of = self._find_tensors()
        expected = expected_tensors(architecture)
        missing = sorted(set(expected) - set(self._file_of))
        if missing:
            raise ValueError(f"{self.directory}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
        self._handles = {name: self._open(name) for name in sorted({self._file_of[tensor] for tensor in expected})}
        for tensor, shape in expected.items():
            handle = self._handles[self._file_of[tensor]]
            if tensor not in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                raise ValueError(f"{self.directory / self._file_of[tensor]}: tensor {tensor} is missing")
            found = tuple(handle.get_slice(tensor).get_shape())
            if found != shape:
                raise ValueError(
                    f"{self.directory / self._file_of[tensor]}: {tensor}: expected shape {shape}, got {found}"
                )

    def _find_tensors(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
                raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
        if single.is_file():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        raise ValueError(f"{self.directory}: neither model.safetensors nor model.safetensors.index.json found")

    def _open(self, name: str) -> safe_open:
        path = self.directory / name
        if not path.is_file():
            raise ValueError(f"{path}: not found, though the index names it")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice [start:stop] of a tensor along dim 0 or 1; only those bytes are read (dim 0) or copied (dim 1)."""
        part = self._handles[self._file_of[name]].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


def import_parameter(
    name: str, layer_offset: int, architecture: Architecture, tp: TensorParallel, read: Slices
) -> Tensor:
    """This rank's shard of the Megatron-Core parameter `name`, in the checkpoint's dtype, on the CPU.

    layer_offset: global number (from 0) of the chunk's first layer; names count layers within their chunk.
    """
    a = architecture
    kind, target, prefix = _kind(name, layer_offset)
    if target == "lm_head.weight" and a.tied_embeddings:
        target = "model.embed_tokens.weight"
    if kind == "whole":
        return read(prefix + target, 0, 0, a.hidden_size)
    if kind == "vocabulary":
        rows = tp.padded_vocab_size // tp.size
        start, stop = (min(bound, a.vocab_size) for bound in (tp.rank * rows, (tp.rank + 1) * rows))
        part = read(prefix + target, 0, start, stop)
        return torch.cat((part, part.new_zeros(rows - len(part), a.hidden_size))) if len(part) < rows else part
    if kind == "columns":
        width = (a.ffn_hidden_size if target.startswith("mlp") else a.num_attention_heads * a.head_dim) // tp.size
        return read(prefix + target, 1, tp.rank * width, (tp.rank + 1) * width)
    if kind == "gate_up":
        rows = a.ffn_hidden_size // tp.size
        return torch.cat(
            [read(f"{prefix}mlp.{x}_proj.weight", 0, tp.rank * rows, (tp.rank + 1) * rows) for x in ("gate", "up")]
        )
    # Whole groups that this rank has a part of: several, or one of which it has some rows.
    first, last = tp.rank * a.num_query_groups // tp.size, -(-(tp.rank + 1) * a.num_query_groups // tp.size)
    parts = []
    for x, heads in (("q", a.num_attention_heads // a.num_query_groups), ("k", 1), ("v", 1)):
        per_group = heads * a.head_dim
        part = read(f"{prefix}self_attn.{x}_proj.weight", 0, first * per_group, last * per_group)
        parts.append(part.reshape(last - first, per_group, a.hidden_size))
    groups = torch.cat(parts, dim=1)
    rows = a.num_query_groups * groups.shape[1] // tp.size
    start = tp.rank * rows - first * groups.shape[1]
    return groups.reshape(-1, a.hidden_size)[start : start + rows]


def export_parameter(
    name: str, layer_offset: int, architecture: Architecture, shards: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors held by a Megatron-Core parameter whose shards, in tensor-parallel order, are
    `shards`."""
    a = architecture
    kind, target, prefix = _kind(name, layer_offset)
    if kind == "whole":
        yield prefix + target, shards[0]
    elif kind == "vocabulary":
        if not (target == "lm_head.weight" and a.tied_embeddings):
            yield prefix + target, torch.cat(shards)[: a.vocab_size]
    elif kind == "columns":
        yield prefix + target, torch.cat(shards, dim=1)
    elif kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        yield prefix + "mlp.gate_proj.weight", torch.cat([gate for gate, _ in halves])
        yield prefix + "mlp.up_proj.weight", torch.cat([up for _, up in halves])
    else:
        per_group = a.num_attention_heads // a.num_query_groups * a.head_dim
        qkv = torch.cat(shards).reshape(a.num_query_groups, per_group + 2 * a.head_dim, a.hidden_size)
        for x, part in zip("qkv", qkv.split((per_group, a.head_dim, a.head_dim), dim=1), strict=True):
            yield f"{prefix}self_attn.{x}_proj.weight", part.reshape(-1, a.hidden_size)


def _kind(name: str, layer_offset: int) -> tuple[str, str, str]:
    """(kind, Hugging Face name or its stem, prefix of the layer) of a Megatron-Core parameter."""
    match = _LAYER.fullmatch(name)
    if match:
        kind, target = _KIND_IN_LAYER[match[2]]
        return kind, target, f"model.layers.{int(match[1]) + layer_offset}."
    kind, target = _KIND_OUTSIDE[name]
    return kind, target, ""
